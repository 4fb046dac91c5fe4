"""Plain text as tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trueup.data.encoder import Bounds, Encoder, special_texts, start_and_end
from trueup.data.settings import TokenizeSettings
from trueup.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlainText:
    """Plain text: the tokenizer's start token, if it adds one, and its end-of-text token behind a completion."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> None:
        self.start, end = start_and_end(tokenizer)
        if end is None:
            raise ModelError(
                "the tokenizer has no end-of-text token (eos_token), so a text could not end",
                way_out="set eos_token in its tokenizer_config.json",
            )
        self.end = end
        self.encoder = Encoder(
            tokenizer, list(special_texts(tokenizer)), mark_control=settings.special_tokens_in_text == "plain"
        )

    def prompt(self, text: str) -> list[int]:
        return self.start + self.encoder.encode(self.encoder.mark(text), continues=False)

    def completion(self, text: str, *, continues: bool = True) -> list[int]:
        return self._ended(self.encoder.encode(self.encoder.mark(text), continues=continues))

    def stepwise(self, text: str, bounds: Sequence[int], *, continues: bool) -> tuple[list[int], Bounds]:
        """The tokens of ``completion``, and those around every bound."""
        tokens, found = self.encoder.encode_bounds(self.encoder.mark_bounds(text, bounds), continues=continues)
        return self._ended(tokens), found

    def _ended(self, tokens: list[int]) -> list[int]:
        # Text that is trusted to hold tokens may bring its own end token.
        return tokens if tokens and tokens[-1] == self.end else [*tokens, self.end]


@functools.lru_cache(maxsize=8)
def plain_text_of(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> PlainText:
    return PlainText(tokenizer, settings)
