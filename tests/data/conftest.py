"""Tokenizers: two real ones with chat templates, one of the SentencePiece kind, and one made here from letters."""

from __future__ import annotations

import gzip
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def letters_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """One token per character; ``<|im_end|>`` is both end and padding; ``<think>`` is added, but not special."""
    special = ["<|unk|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {text: index for index, text in enumerate([*special, *sorted(set(string.printable))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerBase:
    return letters_tokenizer()


@pytest.fixture(scope="session")
def smollm2(shared_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared_data / "smollm2-tokenizer")


@pytest.fixture(scope="session")
def qwen(shared_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared_data / "qwen2_5-tokenizer")


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared_data / "stories260K")


@pytest.fixture(scope="session")
def hh_rows(shared_data: Path) -> Callable[[str], list[dict[str, str]]]:
    """The raw rows of one HH file."""

    def rows(name: str) -> list[dict[str, str]]:
        with gzip.open(shared_data / "hh-rlhf" / f"{name}.test.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    return rows


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
