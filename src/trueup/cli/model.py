"""``trueup model new``: write a tiny model from scratch."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trueup.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class NewSettings:
    """A randomly initialised model with a tokenizer of single characters, in the Hugging Face layout."""

    output: str = "models/new"
    """Folder to write; it must be new or empty."""
    family: Literal["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "olmo2", "phi3"] = "llama"
    """Architecture."""
    characters: str = string.digits + string.ascii_letters + string.punctuation + " \n"
    """The vocabulary: every character the model can read and write. Any other becomes <unk>."""
    characters_from: tuple[str, ...] = ()
    """Take the vocabulary from these text files instead: every character in them, a data file's quotes and all."""
    hidden_size: int = 64
    """Width of the model; a multiple of 2 × --num-heads."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    intermediate_size: int | None = None
    """Width inside the feed-forward layers; by default 4 × --hidden-size."""
    max_length: int = 256
    """Longest sequence, in tokens (characters)."""
    chat_template: str | None = None
    """File with a Jinja chat template to put into the tokenizer."""
    seed: int = 0
    """Seed of the weights; the same settings write the same model."""


def new(settings: NewSettings) -> None:
    """Write the model and say what it is. Raises ``SettingsError`` and ``ModelError``."""
    characters = "".join(map(read_text, settings.characters_from)) or settings.characters
    template = None if settings.chat_template is None else read_text(settings.chat_template)

    from trueup.models.load import load_model
    from trueup.models.scratch import make_model

    folder = make_model(
        settings.output,
        characters=characters,
        family=settings.family,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        intermediate_size=settings.intermediate_size,
        max_length=settings.max_length,
        seed=settings.seed,
        chat_template=template,
    )
    loaded = load_model(folder, device="cpu")
    print(f"{folder}: {settings.family}, {loaded.model.num_parameters():,} parameters, {len(loaded.tokenizer)} tokens")


def read_text(path: str) -> str:
    """The text of a UTF-8 file. Raises ``SettingsError``."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"can't be read: {reason}", where=path) from error
