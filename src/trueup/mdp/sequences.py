"""A language model small enough to list everything it can say: every sequence, its token log-probs, its probability.

The model is a table of logits ``[contexts, vocabulary]``: one distribution over the next token for every prefix. Any
autoregressive model of that vocabulary and length is one of these, so what holds here holds for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trueup.errors import DataError


@dataclass(frozen=True, eq=False)
class SequenceSpace:
    """All sequences over tokens 0…V−1 that end with ``end_token``, or at ``max_length`` tokens if it hasn't come yet.

    ``end_token`` None: all have ``max_length``. ``tokens`` [Y, T], 0 after the end; ``mask`` [Y, T]; ``contexts``
    [Y, T], the index of the prefix that each token was chosen after: counted by length, the empty prefix is 0.
    Raises ``DataError`` for an empty vocabulary or length, or an end token outside the vocabulary.
    """

    vocabulary_size: int
    max_length: int
    end_token: int | None = None
    tokens: Int[Tensor, "y t"] = field(init=False, repr=False)
    mask: Bool[Tensor, "y t"] = field(init=False, repr=False)
    contexts: Int[Tensor, "y t"] = field(init=False, repr=False)
    num_contexts: int = field(init=False)

    def __post_init__(self) -> None:
        if self.vocabulary_size < 1 or self.max_length < 1:
            raise DataError(
                f"a vocabulary of {self.vocabulary_size} and a length of {self.max_length} give no sequence"
            )
        if self.end_token is not None and not 0 <= self.end_token < self.vocabulary_size:
            raise DataError(f"the end token {self.end_token} isn't one of the {self.vocabulary_size} tokens")
        context_of: dict[tuple[int, ...], int] = {}
        finished: list[tuple[int, ...]] = []
        open_prefixes: list[tuple[int, ...]] = [()]
        for length in range(1, self.max_length + 1):
            context_of |= {prefix: len(context_of) + i for i, prefix in enumerate(open_prefixes)}
            longer = [(*prefix, token) for prefix in open_prefixes for token in range(self.vocabulary_size)]
            done = [seq[-1] == self.end_token or length == self.max_length for seq in longer]
            finished += [seq for seq, over in zip(longer, done, strict=True) if over]
            open_prefixes = [seq for seq, over in zip(longer, done, strict=True) if not over]
        shape = (len(finished), self.max_length)
        tokens, contexts = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, seq in enumerate(finished):
            tokens[row, : len(seq)] = torch.tensor(seq)
            contexts[row, : len(seq)] = torch.tensor([context_of[seq[:t]] for t in range(len(seq))])
            mask[row, : len(seq)] = True
        for name, value in (("tokens", tokens), ("mask", mask), ("contexts", contexts)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "num_contexts", len(context_of))

    def __len__(self) -> int:
        return len(self.tokens)

    def token_logprobs(self, logits: Float[Tensor, "c v"]) -> Float[Tensor, "y t"]:
        """log π(y_t | y_<t) of every token of every sequence, differentiable; 0 after the end.

        ``logits`` [num_contexts, vocabulary_size]. Raises ``DataError`` for another shape.
        """
        if logits.shape != (self.num_contexts, self.vocabulary_size):
            expected = (self.num_contexts, self.vocabulary_size)
            raise DataError(f"the logits have the shape {tuple(logits.shape)}, expected {expected}")
        picked = torch.log_softmax(logits, -1)[self.contexts, self.tokens]
        return torch.where(self.mask, picked, 0.0)

    def sequence_logprobs(self, logits: Float[Tensor, "c v"]) -> Float[Tensor, " y"]:
        """log π(y) = Σ_t log π(y_t | y_<t) of every sequence; their exponentials add up to 1."""
        return self.token_logprobs(logits).sum(-1)

    def kl(self, logits: Float[Tensor, "c v"], ref_logits: Float[Tensor, "c v"]) -> Float[Tensor, ""]:
        """KL(π‖π_ref) = Σ_y π(y) · (log π(y) − log π_ref(y)) over whole sequences, in nats, differentiable."""
        logprobs = self.sequence_logprobs(logits)
        return (logprobs.exp() * (logprobs - self.sequence_logprobs(ref_logits))).sum()
