"""Text → tokens, so that only what the library and a chat template write can become a control token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trueup.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode noncharacters: no text means anything by them, and those in the data are marked like control tokens.
_OPEN, _CLOSE, BOUND = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")

Bounds = list[tuple[int, int]]
"""Of every bound in a text: how many tokens begin before it, and how many have ended by then. The two differ where a
token stands across the bound."""


class StepsNotFound(Exception):
    """It can't be told which token a step ends with. The message is the reason that gets counted."""


class Encoder:
    """Encodes text so that only what the library and the template write can become a control token.

    ``mark`` replaces control-token text in data by a mark before a template sees it; ``encode`` encodes the rest as
    usual and what was marked as plain text. Control tokens are all special tokens and those that the template puts
    around a user's turn; other added tokens (``<think>``, ``<tool_call>``) may be written by anyone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str], *, mark_control: bool) -> None:
        self._tokenizer = tokenizer
        self.control = tuple(sorted(control, key=lambda text: (-len(text), text)))
        self._literals = (*(self.control if mark_control else ()), _OPEN, _CLOSE, BOUND)
        self._index = {text: index for index, text in enumerate(self._literals)}
        self._find = re.compile("|".join(map(re.escape, self._literals)))
        # What the vocabulary can't write becomes the unknown token, whoever writes it: it controls nothing.
        self._control_ids = set(tokenizer.convert_tokens_to_ids(list(self.control))) - {tokenizer.unk_token_id}  # type: ignore[arg-type]
        self._plain: dict[int, list[int]] = {}
        # A tokenizer of the SentencePiece kind puts a space before whatever it is given. In the middle of a text that
        # would be one too many: encode behind a line break, then take the break away.
        self._break = self._ids("\n")
        self._needs_break = self._ids("\nx")[len(self._break) :] != self._ids("x")

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])  # type: ignore[arg-type]

    def mark(self, value: Any) -> Any:
        """``value`` (a string, or lists and dicts of them) with every control-token text marked."""
        if isinstance(value, str):
            return self._find.sub(lambda found: f"{_OPEN}{self._index[found[0]]}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def finds(self, value: Any) -> bool:
        """Whether control-token text stands anywhere in ``value``."""
        if isinstance(value, str):
            return self._find.search(value) is not None
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return any(map(self.finds, inner))

    def mark_bounds(self, text: str, bounds: Sequence[int]) -> str:
        """``mark(text)`` with a further mark at every bound, a number of characters; ``encode_bounds`` finds them.

        Raises ``StepsNotFound`` where control-token text stands across a bound: marked in parts it would be a token.
        """
        if any(found.start() < bound < found.end() for found in self._find.finditer(text) for bound in bounds):
            raise StepsNotFound("text of special tokens runs over the end of a step")
        parts = itertools.pairwise((0, *bounds, len(text)))
        return BOUND.join(self.mark(text[start:end]) for start, end in parts)

    def encode(self, marked: str, *, continues: bool) -> list[int]:
        """Tokens of a marked text, which stands at the beginning or ``continues`` another."""
        return self.encode_bounds(marked, continues=continues)[0]

    def encode_bounds(self, marked: str, *, continues: bool) -> tuple[list[int], Bounds]:
        """The tokens, the same as without bounds, and what is counted at every bound."""
        tokens: list[int] = []
        bounds: Bounds = []
        for index, piece in enumerate(_MARKED.split(marked)):
            if index % 2:
                tokens += self._as_plain(int(piece))
                continue
            if _OPEN in piece or _CLOSE in piece:
                raise ModelError("the chat template cuts into a message's text", way_out="set another chat_template")
            *parts, _ = piece.split(BOUND)
            found, spans = self._located(
                piece.replace(BOUND, ""), continues=continues or bool(tokens), with_spans=bool(parts)
            )
            for bound in itertools.accumulate(map(len, parts)):
                begun, ended = sum(start < bound for start, _ in spans), sum(end <= bound for _, end in spans)
                bounds.append((len(tokens) + begun, len(tokens) + ended))
            tokens += found
        return tokens, bounds

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens that continue another text, special ones left out: undoes ``encode(continues=True)``."""
        before = self._break if self._needs_break else []
        text = self._text([*before, *tokens])
        return text[len(self._text(before)) :] if before else text

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _located(self, text: str, *, continues: bool, with_spans: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of unmarked text, and if asked for which of its characters each was made of."""
        if not text:
            return [], []
        if with_spans and not self._tokenizer.is_fast:
            raise ModelError(
                "the tokenizer does not say which characters a token is made of, so steps can't be found in its tokens",
                way_out="take a model with a tokenizer.json",
            )
        before = "\n" if continues and self._needs_break else ""
        encoded = self._tokenizer(
            before + text, add_special_tokens=False, verbose=False, return_offsets_mapping=with_spans
        )
        tokens: list[int] = list(encoded["input_ids"])  # type: ignore[arg-type]
        spans: list[tuple[int, int]] = encoded["offset_mapping"] if with_spans else []  # type: ignore[assignment]
        if not before:
            return tokens, spans
        skipped = len(self._break)
        if tokens[:skipped] != self._break:
            return self._located(text, continues=False, with_spans=with_spans)
        return tokens[skipped:], [(start - 1, end - 1) for start, end in spans[skipped:]]

    def _as_plain(self, index: int) -> list[int]:
        if index not in self._plain:
            self._plain[index] = self._tokens_of_literal(self._literals[index])
        return self._plain[index]

    def _tokens_of_literal(self, text: str) -> list[int]:
        whole = self._ids(text, split_special_tokens=True)
        by_character = itertools.chain.from_iterable(self._ids(character) for character in text)
        for tokens in (whole, list(by_character)):
            if not self._control_ids.intersection(tokens):
                return tokens
        raise ModelError(
            f"the tokenizer has no way to write {text!r} as plain text",
            way_out="remove it from the data, or trust it: special_tokens_in_text='token'",
        )


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def bracketed_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Added tokens that look like marks, ``<…>`` or ``[…]``. Others are words or spaces, added to save tokens."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return {text for text in texts if re.fullmatch(r"[^\w\s].*[^\w\s]", text)}


def start_and_end(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int | None]:
    """(the tokens that the tokenizer puts before plain text, the token that ends it)."""
    bare = list(tokenizer("x", add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    full = list(tokenizer("x")["input_ids"])  # type: ignore[arg-type]
    end = tokenizer.eos_token_id
    if not bare:  # a vocabulary that has no "x" and drops it: what is left are the start and perhaps the end token
        return [token for token in full if token != end], end  # type: ignore[return-value]
    start = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    return full[:start], end  # type: ignore[return-value]
