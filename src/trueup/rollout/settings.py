"""How completions are sampled. Free of torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass

from trueup.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One way of sampling, for every request of a call.

    Applied to the logits in this order: repetition penalty, temperature, top-k, top-p, min-p; what is left is
    normalised, and that is the distribution which is sampled and whose log-probs are recorded.
    """

    num_completions: int = 1
    """Completions of each prompt."""
    max_new_tokens: int = 256
    """Longest completion, its end token included. The model's context may end it sooner."""
    temperature: float = 1.0
    """Divides the logits. 0: always the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens. 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have at least this probability (the one that crosses it included)."""
    min_p: float = 0.0
    """Only tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token that the prompt or the completion holds."""
    stop_tokens: tuple[int, ...] = ()
    """A completion ends with the first of these, which belongs to it. Empty: only length and strings end it."""
    stop_strings: tuple[str, ...] = ()
    """A completion ends with the token that completes one of these in its text."""
    seed: int = 0
    """Random streams depend on this, on the request and on the position, and on nothing else."""

    def __post_init__(self) -> None:
        checks = {
            "num_completions": self.num_completions >= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": 0 <= self.temperature < float("inf"),
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < float("inf"),
        }
        for name, fine in checks.items():
            if not fine:
                raise SettingsError(f"{getattr(self, name)} is out of range", where=f"--{name.replace('_', '-')}")

    @property
    def cuts_support(self) -> bool:
        """Whether tokens that the model gives a probability can never be sampled."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1 or self.min_p > 0
