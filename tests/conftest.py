"""Shared set-up: one thread per worker, shapes checked at run time, real data where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Every function of the objectives checks its annotated shapes and types while the tests run.
install_import_hook("trueup.objectives", "beartype.beartype")

import torch  # noqa: E402  (the hook has to come before anything that imports the objectives)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped, with the reason, where it is absent."""
    folder = Path(os.environ.get("TRUEUP_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TRUEUP_SHARED_DATA to the folder that holds it")
    return folder
