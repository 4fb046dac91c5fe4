"""The tiny models of many architectures that the tests of ``trueup.models`` use, and a small one to enumerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

_spec = importlib.util.spec_from_file_location("model_fixtures", Path(__file__).parents[1] / "models" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)

tiny_model = _fixtures.tiny_model


@pytest.fixture(scope="session")
def small_vocabulary(tiny_model) -> Callable[..., PreTrainedModel]:
    """A model with five tokens, so few that all of its sequences can be listed."""

    def make(family: str = "llama", **changes) -> PreTrainedModel:
        return tiny_model(family, vocab_size=5, **changes)

    return make
