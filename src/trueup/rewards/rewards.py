"""All rewards of a run, loaded from their names, and what they say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trueup.data.settings import TextSettings
from trueup.errors import RewardError, SettingsError
from trueup.rewards.calls import Caller, Reward, RewardFunction, checked
from trueup.rewards.samples import RewardScores, Samples, StepScores
from trueup.rewards.settings import check_timeout, check_weights
from trueup.rewards.sources import load_reward


class Rewards:
    """Several rewards, weighted and added up. Made by ``Rewards.load``."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None, *, timeout: float = 60.0) -> None:
        check_timeout(timeout)
        check_weights(None if weights is None else tuple(weights), len(rewards))
        if not rewards:
            raise SettingsError("no reward is given", where="--reward", way_out="--reward exact, for example")
        self.rewards = unique_names(rewards)
        self.weights = np.ones(len(rewards)) if weights is None else np.array(weights, dtype=np.float64)
        judges = [each for each in self.rewards if each.scores_steps]
        if len(judges) > 1:
            raise SettingsError(
                f"{judges[0].name} and {judges[1].name} are both process reward models",
                where="--reward",
                way_out="one of them scores the steps: leave out the other",
            )
        self._caller = Caller(timeout)

    @classmethod
    def load(
        cls,
        specs: Sequence[str | RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        timeout: float = 60.0,
        tokenizer: Any = None,
        text: TextSettings | None = None,
        dtype: Any = "auto",
        device: str = "auto",
        tokens_per_batch: int = 8192,
    ) -> Rewards:
        """Rewards by their specs: functions, or strings as ``sources.load_reward`` reads them.

        ``weights``: one for each, by default 1. ``timeout``: seconds that one may take for one batch. ``tokenizer``:
        the policy's, which a process reward model needs to say where the steps end. ``text``, ``dtype``, ``device``,
        ``tokens_per_batch``: for reward models, which read text with their own tokenizer.

        Raises ``SettingsError`` for what can't be one of these, ``RewardError`` for code that can't be imported,
        ``MissingExtraError`` for a built-in whose package is missing, ``ModelError`` for a model that can't be loaded.
        """
        options = {"dtype": dtype, "device": device, "tokens_per_batch": tokens_per_batch}
        loaded = [load_reward(spec, timeout=timeout, tokenizer=tokenizer, text=text, **options) for spec in specs]
        return cls(loaded, weights, timeout=timeout)

    @property
    def names(self) -> tuple[str, ...]:
        """What metrics call them, each another."""
        return tuple(reward.name for reward in self.rewards)

    def score(self, samples: Samples) -> RewardScores:
        """What every reward says of every sample, and the weighted sum of what applies.

        Raises ``RewardError`` for a reward that fails (``calls.Caller``), and for a sample that none applies to.
        """
        results = self._caller.results(self.rewards, samples)
        judged = next((result for result in results if isinstance(result, StepScores)), None)
        lists = [result.scores if isinstance(result, StepScores) else result for result in results]
        found = np.stack([checked(each, name, samples) for each, name in zip(lists, self.names, strict=True)])
        silent = np.flatnonzero(np.isnan(found).all(0))
        if len(silent):
            raise RewardError(
                f"none of the rewards applies ({', '.join(self.names)}: all None)",
                where=samples.place(int(silent[0])),
                way_out="add a reward that does, or leave the row out of the data",
            )
        return RewardScores(
            total=np.nansum(self.weights[:, None] * found, 0),
            each=dict(zip(self.names, found, strict=True)),
            steps=judged and judged.steps,
            step_ends=judged and judged.step_ends,
        )


def unique_names(rewards: Sequence[Reward]) -> tuple[Reward, ...]:
    """The same rewards; of several with one name the second is called NAME_2 and so on."""
    seen: Counter[str] = Counter()
    named = []
    for reward in rewards:
        seen[reward.name] += 1
        count = seen[reward.name]
        named.append(reward if count == 1 else replace(reward, name=f"{reward.name}_{count}"))
    return tuple(named)
