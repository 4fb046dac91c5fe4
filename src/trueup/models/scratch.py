"""A tiny model from scratch, with one token per character: for demos, tests and problems with exact answers."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trueup.errors import ModelError, SettingsError
from trueup.models.load import no_progress_bars

PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"

# Without qwen2: transformers builds a Qwen2 tokenizer of its own beside such a config, whatever the folder holds.
FAMILIES = ("llama", "qwen3", "mistral", "gpt2", "gpt_neox", "olmo2", "phi3")


def make_model(
    folder: str | Path,
    *,
    characters: str,
    family: str = "llama",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int | None = None,
    max_length: int = 128,
    initializer_range: float | None = None,
    seed: int = 0,
    chat_template: str | None = None,
) -> Path:
    """Write a randomly initialised causal language model and its character tokenizer; returns ``folder``.

    The vocabulary is ``<pad>``, ``<unk>``, ``<end>`` (0, 1, 2: the end token is not the padding token), then the
    distinct ``characters`` in order of appearance; any other character is ``<unk>``. ``intermediate_size`` is
    4 × ``hidden_size`` by default, ``max_length`` the longest sequence, in tokens. ``initializer_range`` is the
    weights' standard deviation, by default 1/√hidden_size, which keeps the size of what goes through a layer: the 0.02
    of large models is too little for a narrow one to learn from. The same arguments write the same weights. The folder
    loads with plain ``AutoModelForCausalLM`` and ``AutoTokenizer``; it appears whole or not at all.

    Raises ``SettingsError`` for a family or size that makes no model, ``ModelError`` if ``folder`` has something in it.
    """
    folder = Path(folder)
    check_sizes(characters, family, hidden_size, num_layers, num_heads, max_length)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError("is in use already", where=str(folder), way_out="choose another folder, or remove this one")
    tokenizer = character_tokenizer(characters, max_length=max_length, chat_template=chat_template)
    width = intermediate_size or 4 * hidden_size
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        **{"n_inner" if family == "gpt2" else "intermediate_size": width},
        max_position_embeddings=max_length,
        initializer_range=initializer_range or hidden_size**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with no_progress_bars():
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def character_tokenizer(
    characters: str, *, max_length: int, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer with one token per character; decoding gives the text back, spaces and newlines included.

    It adds no tokens of its own, neither at the start nor at the end.
    """
    tokens = [PAD, UNKNOWN, END, *dict.fromkeys(characters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Byte-pair encoding without a single merge stops at characters.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        chat_template=chat_template,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def check_sizes(
    characters: str, family: str, hidden_size: int, num_layers: int, num_heads: int, max_length: int
) -> None:
    """Raises ``SettingsError``, which names the size that is wrong."""
    if family not in FAMILIES:
        raise SettingsError(f"no such family: {family!r}", where="family", way_out=", ".join(FAMILIES))
    if not characters:
        raise SettingsError("the vocabulary is empty", where="characters", way_out="give the characters of your texts")
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads, "max_length": max_length}
    for name, size in sizes.items():
        if size < 1:
            raise SettingsError(f"must be above 0 (it is {size})", where=name)
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise SettingsError(
            f"{hidden_size} does not split into {num_heads} heads of even width",
            where="hidden_size",
            way_out="choose a multiple of 2 × num_heads: rotary positions turn pairs of dimensions",
        )
