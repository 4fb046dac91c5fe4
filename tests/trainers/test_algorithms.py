"""Every advantage, surrogate, reduction and form of the KL gives what its formula, written out in loops, gives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.errors import SettingsError
from trueup.recipes import RECIPES
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.trainers import algorithms
from trueup.trainers.algorithms import Algorithm, Learned, kl_loss
from trueup.trainers.experience import Experience, new_experience
from trueup.trainers.policy import check_fits, importance
from trueup.trainers.policy_settings import KLForm, PolicySettings
from trueup.trainers.tally import Totals

LENGTHS = ((3, 1, 4), (2, 4, 4), (2, 3, 1))
SCORES = [[1.0, 0.0, 0.4], [0.3, 1.2, 0.3], [0.7, 0.7, 0.7]]
GAP = (1, 1)
"""The group and completion whose second token somebody else wrote."""
CUT = (1, 2)
"""The one that was cut off."""


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x() -> Experience:
    """Three groups of three, the last without signal, with everything that an algorithm may ask for."""

    def completion(g: int, k: int) -> Completion:
        tokens = np.arange(LENGTHS[g][k])
        mask = tokens != 1 if (g, k) == GAP else None
        reason = StopReason.LENGTH if (g, k) == CUT else StopReason.END
        return Completion(tokens=tokens, mask=mask, stop_reason=reason)

    groups = [
        CompletionGroup(prompt=np.array([1]), completions=tuple(completion(g, k) for k in range(3))) for g in range(3)
    ]
    x = new_experience(groups, torch.tensor(SCORES), mask_truncated=False, device=torch.device("cpu"))
    costs = torch.where(x.mask, 0.1 * numbers(9, 4, seed=1), 0.0)
    costs[6:] = 0.0
    steps = x.last.clone()
    steps[[0, 4, 5], 0] = True
    return replace(
        x,
        rewards=x.rewards + costs,
        values=torch.where(x.mask, numbers(9, 4, seed=2), 0.0),
        bootstrap=numbers(9, seed=3),
        step_rewards=torch.where(steps, numbers(9, 4, seed=4), 0.0),
        step_mask=steps,
        baseline=0.25,
    )


def steps_of(x: Experience, row: int) -> list[int]:
    """The columns of what the policy wrote."""
    return [t for t in range(x.mask.shape[1]) if x.mask[row, t]]


def to_go(x: Experience, row: int, rewards: Tensor, gamma: float) -> dict[int, float]:
    """Σ_{s ≥ t} γ^{s−t} r_s, where tokens of others take no time."""
    columns = steps_of(x, row)
    return {
        t: sum(gamma ** (n - place) * rewards[row, columns[n]].item() for n in range(place, len(columns)))
        for place, t in enumerate(columns)
    }


def per_completion(x: Experience, value: Callable[[list[float], int], float], scores: Tensor | None = None) -> dict:
    """The same at every token of completion k: ``value`` of the group's totals and k."""
    table = x.totals if scores is None else scores
    return {
        (g * 3 + k, t): value(table[g].tolist(), k) for g in range(3) for k in range(3) for t in steps_of(x, g * 3 + k)
    }


def plain_returns(x: Experience, settings: PolicySettings) -> dict:
    return {(row, t): v - 0.25 for row in range(9) for t, v in to_go(x, row, x.rewards, settings.gamma).items()}


def plain_returns_in_group(x: Experience, settings: PolicySettings) -> dict:
    return {
        (row, t): v - statistics.mean(x.totals[row // 3].tolist())
        for row in range(9)
        for t, v in to_go(x, row, x.rewards, settings.gamma).items()
    }


def normalized(scores: list[float], k: int) -> float:
    if max(scores) == min(scores):
        return 0.0
    return (scores[k] - statistics.mean(scores)) / (statistics.stdev(scores) + 1e-4)


def plain_process(x: Experience, settings: PolicySettings) -> dict:
    steps = torch.zeros_like(x.rewards, dtype=torch.float64)
    for g in range(3):
        places = [(r, t) for r in range(3 * g, 3 * g + 3) for t in range(4) if x.step_mask[r, t]]
        rewards = [x.step_rewards[place].item() for place in places]
        for n, place in enumerate(places):
            steps[place] = normalized(rewards, n)
    return {(row, t): v for row in range(9) for t, v in to_go(x, row, steps, settings.gamma).items()}


def plain_gae(x: Experience, settings: PolicySettings) -> dict:
    found = {}
    for row in range(9):
        following, value_after = 0.0, x.bootstrap[row].item()
        discount = settings.gamma * bool(x.truncated[row] and settings.truncated_completions == "bootstrapped")
        for t in reversed(steps_of(x, row)):
            error = x.rewards[row, t].item() + discount * value_after - x.values[row, t].item()
            following = error + discount * settings.gae_lambda * following
            found[row, t] = following
            value_after, discount = x.values[row, t].item(), settings.gamma
    return found


ADVANTAGES: dict[str, Callable[[Experience, PolicySettings], dict]] = {
    "reward_to_go": plain_returns,
    "reward_to_go_in_group": plain_returns_in_group,
    "leave_one_out": lambda x, settings: per_completion(x, lambda r, k: r[k] - (sum(r) - r[k]) / 2),
    "group_centered": lambda x, settings: per_completion(x, lambda r, k: r[k] - sum(r) / 3),
    "group_normalized": lambda x, settings: per_completion(x, normalized),
    "process_normalized": plain_process,
    "gae": plain_gae,
    "right_ones": lambda x, settings: per_completion(x, lambda r, k: float(r[k] >= 1), x.scores),
    "best_one": lambda x, settings: per_completion(x, lambda r, k: float(r.index(max(r)) == k)),
    "best_and_worst": lambda x, settings: per_completion(
        x, lambda r, k: float(r.index(max(r)) == k) - float(r.index(min(r)) == k)
    ),
}


def test_all_advantages_and_surrogates_and_reductions_of_the_table_are_held():
    for table, part in ((ADVANTAGES, "advantages"), (SURROGATES, "surrogate"), (REDUCTIONS, "reduce")):
        assert set(table) == {getattr(recipe, part) for recipe in RECIPES.values()}
    assert {*KLS, "reward"} == set(get_args(KLForm))


@pytest.mark.parametrize("truncated", ["terminal", "bootstrapped"])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name: str, truncated: Any, x: Experience):
    if name == "best_and_worst":  # of equal ones the first is both
        x = replace(x, rewards=x.rewards + 1e-3 * x.last * torch.arange(9)[:, None])
    settings = PolicySettings(gamma=0.9, gae_lambda=0.8, truncated_completions=truncated)
    x = x if name == "gae" else replace(x, bootstrap=None)
    found = getattr(algorithms, name)(x, settings)
    expected = torch.zeros(9, 4, dtype=torch.float64)
    for place, value in ADVANTAGES[name](x, settings).items():
        expected[place] = value
    assert expected.any()
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


def test_a_group_of_equal_scores_has_no_best_and_no_worst(x: Experience):
    assert not algorithms.best_and_worst(x, PolicySettings())[6:].any()


# --- losses


@pytest.fixture
def learned(x: Experience) -> Learned:
    """A policy that has moved from the old one and is away from the reference, one completion not learned from."""
    mask = x.mask & ~x.truncated[:, None]

    def rows(seed: int, scale: float) -> Tensor:
        return torch.where(mask, scale * numbers(9, 4, seed=seed), 0.0)

    logprobs = torch.where(x.mask, -1 - numbers(9, 4, seed=5).abs(), 0.0)
    return Learned(
        logprobs=logprobs.requires_grad_(True),
        old_logprobs=logprobs.detach() + rows(6, 0.3),
        ref_logprobs=logprobs.detach() + rows(7, 0.5),
        advantages=rows(8, 1.0),
        mask=mask,
        group_size=3,
        penalty_coef=0.7,
    )


def each_token(x: Learned, value: Callable[[int, int], float]) -> dict[tuple[int, int], float]:
    return {(row, t): value(row, t) for row, t in x.mask.nonzero().tolist()}


def clip(ratio: float, advantage: float, settings: PolicySettings) -> float:
    gain = min(ratio * advantage, min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high) * advantage)
    if settings.dual_clip is not None and advantage < 0:
        gain = max(gain, settings.dual_clip * advantage)
    return -gain


def moved(x: Learned, row: int, t: int) -> float:
    return (x.logprobs[row, t] - x.old_logprobs[row, t]).item()


def plain_ratio(x: Learned, row: int, t: int) -> float:
    if not x.whole_ratio:
        return math.exp(moved(x, row, t))
    columns = [s for s in range(4) if x.mask[row, s]]
    return math.exp(sum(moved(x, row, s) for s in columns) / len(columns))


def plain_dpo(x: Learned, settings: PolicySettings) -> list[float]:
    """−log σ(β · difference of log-ratios) of each group's pair, where it has one."""
    losses = []
    for g in range(3):
        sides = {}
        for row in range(3 * g, 3 * g + 3):
            columns = [t for t in range(4) if x.mask[row, t]]
            ratio = sum((x.logprobs[row, t] - x.ref_logprobs[row, t]).item() for t in columns)
            sides |= {x.advantages[row, t].item(): ratio for t in columns}
        if {1.0, -1.0} <= set(sides):
            losses.append(math.log1p(math.exp(-settings.kl_coef * (sides[1.0] - sides[-1.0]))))
        else:
            losses.append(0.0)
    return losses


SURROGATES: dict[str, Callable[[Learned, PolicySettings], Any]] = {
    "log_prob": lambda x, s: each_token(x, lambda r, t: -x.advantages[r, t].item() * x.logprobs[r, t].item()),
    "clipped": lambda x, s: each_token(x, lambda r, t: clip(plain_ratio(x, r, t), x.advantages[r, t].item(), s)),
    "penalized": lambda x, s: each_token(
        x,
        lambda r, t: (
            -plain_ratio(x, r, t) * x.advantages[r, t].item() + 0.7 * (math.exp(moved(x, r, t)) - 1 - moved(x, r, t))
        ),
    ),
    "cispo": lambda x, s: each_token(
        x,
        lambda r, t: (
            -min(max(plain_ratio(x, r, t), 1 - s.clip_low), 1 + s.clip_high)
            * x.advantages[r, t].item()
            * x.logprobs[r, t].item()
        ),
    ),
    "dpo_of_pairs": plain_dpo,
}


def lengths(x: Learned) -> list[int]:
    return x.mask.sum(-1).tolist()


REDUCTIONS: dict[str, Callable[[Any, Learned, PolicySettings], float]] = {
    "token_mean": lambda losses, x, s: sum(losses.values()) / 40,
    "sequence_mean": lambda losses, x, s: sum(v / lengths(x)[row] for (row, _), v in losses.items()) / 12,
    "sequence_sum": lambda losses, x, s: sum(losses.values()) / 12,
    "constant_length": lambda losses, x, s: sum(losses.values()) / s.max_new_tokens / 12,
    "group_mean": lambda losses, x, s: sum(losses) / 4,
}
TOTALS = Totals(groups=4, completions=12, tokens=40)
"""Of the step, of which these three groups are not the whole."""


def log_ratio(x: Learned, row: int, t: int) -> float:
    return (x.logprobs[row, t] - x.ref_logprobs[row, t]).item()


def k3(x: Learned, row: int, t: int) -> float:
    return math.exp(-log_ratio(x, row, t)) - 1 + log_ratio(x, row, t)


def prefix(x: Learned, row: int, t: int) -> float:
    return math.exp(sum(moved(x, row, s) for s in range(t + 1) if x.mask[row, s]))


def whole_k2(x: Learned, row: int, t: int) -> float:
    columns = [s for s in range(4) if x.mask[row, s]]
    return 0.5 * sum(log_ratio(x, row, s) for s in columns) ** 2 if t == columns[0] else 0.0


KLS: dict[str, Callable[[Learned, int, int], float]] = {
    "token_k3": k3,
    "token_k2": lambda x, r, t: 0.5 * log_ratio(x, r, t) ** 2,
    "weighted_k3": lambda x, r, t: math.exp(moved(x, r, t)) * k3(x, r, t),
    "prefix_k1": lambda x, r, t: prefix(x, r, t) * log_ratio(x, r, t),
    "prefix_k3": lambda x, r, t: prefix(x, r, t) * k3(x, r, t),
    "sequence_k2": whole_k2,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_of_every_recipe(name: str, learned: Learned):
    recipe = RECIPES[name]
    settings = PolicySettings(**({"max_new_tokens": 7} | recipe.settings))
    algorithm = recipe.algorithm()
    learned = replace(learned, whole_ratio=algorithm.whole_ratio)
    if algorithm.whole_groups:
        # A pair in the first group; in the second the better one was cut off; in the third all were equal.
        sides = torch.tensor([0, 1, -1, -1, 0, 1, 0, 0, 0])[:, None]
        learned = replace(learned, advantages=torch.where(learned.mask, sides, 0).float())
    loss = algorithm.reduce(algorithm.surrogate(learned, settings), learned.mask, TOTALS, settings)
    plain = SURROGATES[recipe.surrogate](learned, settings)
    assert loss.item() == pytest.approx(REDUCTIONS[recipe.reduce](plain, learned, settings), rel=1e-5, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, learned.logprobs)
    assert gradient.any()
    assert not gradient[~learned.mask].any()


def test_dual_clip(learned: Learned):
    settings = PolicySettings(dual_clip=1.3)
    found = algorithms.clipped(learned, settings)
    for place, value in SURROGATES["clipped"](learned, settings).items():
        assert found[place].item() == pytest.approx(value, rel=1e-5)
    assert not torch.equal(found, algorithms.clipped(learned, PolicySettings()))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "constant_length"])
@pytest.mark.parametrize("form", KLS)
def test_the_forms_of_the_kl(form: Any, reduction: str, learned: Learned):
    """Each averaged as the surrogate is."""
    settings = PolicySettings(kl_coef=0.1, kl_form=form, max_new_tokens=7)
    algorithm = replace(RECIPES["grpo"].algorithm(), reduce=getattr(algorithms, reduction))
    plain = each_token(learned, lambda r, t: KLS[form](learned, r, t))
    found = kl_loss(learned, algorithm, TOTALS, settings)
    assert found.item() == pytest.approx(REDUCTIONS[reduction](plain, learned, settings), rel=1e-5)


def test_weights_for_the_sampler_s_error():
    log_ratios = torch.tensor([-1.5, -0.2, 0.0, 0.5, 1.5])
    plain = [math.exp(value) for value in log_ratios.tolist()]
    for name, expected in {
        "none": [1.0] * 5,
        "truncated": [min(weight, 2.0) for weight in plain],
        "masked": [weight if 0.5 <= weight <= 2 else 0.0 for weight in plain],
    }.items():
        found = importance(log_ratios, PolicySettings(importance=name))  # pyright: ignore[reportArgumentType]
        assert found.tolist() == pytest.approx(expected)


# --- what goes together


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("rloo", {"group_size": 1}, "at least 2"),
        ("grpo", {"group_size": 1}, "at least 2"),
        ("rloo", {"truncated_completions": "bootstrapped"}, "only a critic"),
        ("rft", {"kl_coef": 0.1}, "would not see a KL"),
        ("grpo_process", {"kl_form": "reward"}, "would not see a KL"),
        ("online_dpo", {"kl_coef": 0.0}, "above 0"),
        ("online_dpo", {"kl_target": 3.0}, "stays"),
    ],
)
def test_settings_that_a_recipe_can_t_follow(recipe: str, settings: dict[str, Any], message: str):
    filled = PolicySettings(**({"recipe": recipe} | RECIPES[recipe].settings | settings))
    with pytest.raises(SettingsError, match=message):
        check_fits(filled, RECIPES[recipe].algorithm())


@pytest.mark.parametrize("name", RECIPES)
def test_the_defaults_of_every_recipe_go_together(name: str):
    check_fits(PolicySettings(**RECIPES[name].settings), RECIPES[name].algorithm())
    assert isinstance(RECIPES[name].algorithm(), Algorithm)
