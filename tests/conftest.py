"""Shared set-up: one thread per worker, shapes checked at run time, real data where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Every function of the objectives checks its annotated shapes and types while the tests run.
install_import_hook("trueup.objectives", "beartype.beartype")

import torch  # noqa: E402  (the hook has to come before anything that imports the objectives)
from hypothesis import settings  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
# A busy machine makes an example slow, not wrong.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped, with the reason, where it is absent."""
    folder = Path(os.environ.get("TRUEUP_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TRUEUP_SHARED_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests keep (reference log-probs) is not left in the user's cache, nor found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUEUP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
