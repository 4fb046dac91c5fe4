"""The mean of what ``learn`` computes over everything that can be sampled is the exact gradient, and no other.

A vocabulary of four tokens and completions of up to three: 40 sequences, or 13 of up to two and 169 groups of two. The
truth is the same model in float64, run as transformers runs it on every sequence, and autograd on the closed form of
E[r] − β KL(π‖π_ref); what is held against it are float32 gradients of the loop's own rollouts and losses.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trueup.mdp.sequences import SequenceSpace
from trueup.recipes import RECIPES
from trueup.trainers import algorithms

BETA = 0.3
PROMPT = [3, 1]
SINGLES = SequenceSpace(4, 3, end_token=2)
PAIRS = SequenceSpace(4, 2, end_token=2)


def sequences(space: SequenceSpace) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(space.tokens, space.mask, strict=True)]


class Truth:
    """A scorer's model in float64, and everything that it can say."""

    def __init__(self, scorer: Any, space: SequenceSpace) -> None:
        self.model = copy.deepcopy(scorer.model).double().requires_grad_(True)
        prompt = torch.tensor(PROMPT).expand(len(space), -1)
        logits = self.model(input_ids=torch.cat([prompt, space.tokens], 1)).logits[:, len(PROMPT) - 1 : -1]
        self.mask, self.tokens = space.mask, space.tokens
        self.distributions = logits.log_softmax(-1)
        """log π(· | y_<t), [Y, T, V]"""
        taken = self.distributions.gather(-1, space.tokens[..., None])[..., 0]
        self.logprobs = torch.where(space.mask, taken, 0.0)
        self.probs = self.logprobs.sum(-1).exp()

    def gradient(self, objective: Tensor) -> Tensor:
        parameters = [*self.model.parameters()]
        found = torch.autograd.grad(objective, parameters, allow_unused=True, retain_graph=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
        )


def close(found: Tensor, exact: Tensor, tolerance: float = 2e-5) -> bool:
    assert exact.norm() > 1e-3
    return bool((found - exact).norm() < tolerance * exact.norm())


@pytest.fixture
def singles(stage: Callable, new_group: Callable) -> Callable[..., Any]:
    """A stage on which every sequence is sampled once, each as a group of its own."""
    groups = [new_group(PROMPT, [tokens], 3) for tokens in sequences(SINGLES)]
    return lambda recipe, **settings: stage(recipe, groups, **settings)


@pytest.fixture
def short(stage: Callable, new_group: Callable) -> Callable[..., Any]:
    """The same with the 13 sequences of up to two tokens."""
    groups = [new_group(PROMPT, [tokens], 2) for tokens in sequences(PAIRS)]
    return lambda recipe, **settings: stage(recipe, groups, **settings)


@pytest.fixture
def pairs_of_all(stage: Callable, new_group: Callable) -> Callable[..., Any]:
    """A stage on which every group of two is sampled once."""
    groups = [new_group(PROMPT, pair, 2) for pair in itertools.product(sequences(PAIRS), repeat=2)]
    return lambda recipe, **settings: stage(recipe, groups, **settings)


def mean_gradient(stage: Any, x: Any, weights: Tensor) -> Tensor:
    """Σ_n w_n · the gradient of ``learn`` on group n alone."""
    return sum(  # pyright: ignore[reportReturnType]
        weight * stage.learn(x, [number])[0] for number, weight in enumerate(weights.tolist())
    )


def rewards(space: SequenceSpace, reward_of: Callable[[Sequence[int]], float]) -> Tensor:
    return torch.tensor([reward_of(tokens) for tokens in sequences(space)], dtype=torch.float64)


def objective(truth: Truth, reference: Truth, scores: Tensor, beta: float = BETA) -> Tensor:
    """E[r] − β KL(π‖π_ref)."""
    log_ratio = (truth.logprobs - reference.logprobs.detach()).sum(-1)
    return (truth.probs * (scores - beta * log_ratio)).sum()


def both(stage: Any, space: SequenceSpace) -> tuple[Truth, Truth]:
    return Truth(stage.players.scorer, space), Truth(stage.players.reference, space)


def test_the_truth_is_a_distribution(singles: Callable):
    truth, reference = both(singles("reinforce"), SINGLES)
    for each in (truth, reference):
        assert each.probs.sum().item() == pytest.approx(1, abs=1e-12)
    assert (truth.probs * (truth.logprobs - reference.logprobs).sum(-1)).sum() > 0.05  # they are not the same


# --- whole methods


def test_reinforce_is_exact(singles: Callable, reward_of: Callable):
    """With a baseline that is no good one, and the KL in the reward."""
    at = singles("reinforce", kl_coef=BETA)
    truth, reference = both(at, SINGLES)
    found = mean_gradient(at, at.rollout(), truth.probs.detach())
    assert close(found, -truth.gradient(objective(truth, reference, rewards(SINGLES, reward_of))))


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_ppo_is_exact_with_any_critic_at_lambda_1(gae_lambda: float, singles: Callable, reward_of: Callable):
    """The mean over tokens divides each group by its length, so the mean weighs it with that: the denominator of a
    large rollout is a constant."""
    at = singles("ppo", kl_coef=BETA, gae_lambda=gae_lambda, whiten_advantages=False)
    truth, reference = both(at, SINGLES)
    x = at.rollout()
    assert x.values.std() > 0.1
    found = mean_gradient(at, x, truth.probs.detach() * SINGLES.mask.sum(-1))
    exact = -truth.gradient(objective(truth, reference, rewards(SINGLES, reward_of)))
    assert close(found, exact) == (gae_lambda == 1)


@pytest.mark.parametrize(("recipe", "factor"), [("rloo", 1.0), ("dr_grpo", 0.5 / 2)])
def test_group_baselines_are_exact_up_to_their_factor(
    recipe: str, factor: float, pairs_of_all: Callable, reward_of: Callable
):
    """Over all groups of two. Dr.GRPO's own score is part of its baseline, (k − 1)/k, and it divides by the longest
    length."""
    at = pairs_of_all(recipe, kl_coef=BETA, kl_form="reward")
    truth, reference = both(at, PAIRS)
    found = mean_gradient(at, at.rollout(), torch.outer(truth.probs, truth.probs).flatten().detach())
    exact = -truth.gradient(objective(truth, reference, rewards(PAIRS, reward_of)))
    assert close(found, factor * exact)


def test_grpo_as_published(stage: Callable, new_group: Callable, reward_of: Callable):
    """The mean over one group of 1/|o| Σ_t min(ρ A, clip(ρ) A) − β k3, with A = (r − mean)/std; after the policy has
    moved, so that some of it is clipped (arXiv 2402.03300, eq. 3 and 4)."""
    said = sequences(PAIRS)
    chosen = [12, 0, 5, 7]
    at = stage("grpo", [new_group(PROMPT, [said[i] for i in chosen], 2)], kl_coef=0.4, clip_low=0.1, clip_high=0.15)
    before, reference = both(at, PAIRS)
    x = at.rollout()
    x = replace(x, old_logprobs=before.logprobs[chosen].detach().float())
    at.move()
    truth = Truth(at.players.scorer, PAIRS)
    scores = torch.tensor([reward_of(said[i]) for i in chosen], dtype=torch.float64)
    advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
    loss, clipped = torch.zeros((), dtype=torch.float64), 0
    for i, advantage in zip(chosen, advantages, strict=True):
        length = int(PAIRS.mask[i].sum())
        for t in range(length):
            new, old, ref = (each.logprobs[i, t] for each in (truth, before, reference))
            rho, towards = (new - old.detach()).exp(), ref.detach() - new
            gain = torch.minimum(rho * advantage, rho.clamp(0.9, 1.15) * advantage)
            clipped += bool(gain != rho * advantage)
            loss = loss - (gain - 0.4 * (towards.exp() - towards - 1)) / length / len(chosen)
    assert clipped
    gradient, tally = at.learn(x, [0])
    assert tally.loss == pytest.approx(loss.item(), rel=1e-5)
    assert close(gradient, truth.gradient(loss))
    assert tally.means()["clip_ratio/region_mean"] == pytest.approx(clipped / sum(len(said[i]) for i in chosen))


# --- the forms of the KL, as losses


def own_tokens(truth: Truth, reference: Truth, *, forward: bool) -> Tensor:
    """Σ over states, weighted with how often they are reached, of KL(π‖π_ref) (or the other direction) there, with the
    weights held constant: the gradient of the tokens' own KLs, without what a token does to the states after it."""
    states = (truth.logprobs.cumsum(-1) - truth.logprobs).exp() * truth.logprobs.exp()  # every token once for each y
    reached = torch.where(truth.mask, states, 0.0).detach()
    later = truth.probs[:, None].detach()
    p, q = truth.distributions, reference.distributions.detach()
    kl = (p.exp() * (p - q)).sum(-1) if forward else (q.exp() * (q - p)).sum(-1)
    assert reached.shape == kl.shape
    return (torch.where(truth.mask, later, 0.0) * kl).sum()


def kl_gradient(at: Any, truth: Truth) -> Tensor:
    """Of the KL alone: nothing is rewarded."""
    return mean_gradient(at, at.rollout(), truth.probs.detach()) / BETA


@pytest.mark.parametrize("form", ["sequence_k2", "prefix_k1", "prefix_k3"])
def test_exact_forms_of_the_kl_are_exact(form: str, singles: Callable):
    at = singles("reinforce", kl_coef=BETA, kl_form=form, reward=lambda tokens: 0.37)
    truth, reference = both(at, SINGLES)
    assert close(kl_gradient(at, truth), -truth.gradient(objective(truth, reference, torch.zeros(len(SINGLES)), 1.0)))


@pytest.mark.parametrize("form", ["token_k2", "weighted_k3", "token_k3"])
def test_token_forms_of_the_kl_have_gradients_of_their_own(form: str, singles: Callable):
    """Those of the tokens' own KLs; of k3 as GRPO publishes it, of the KLs in the other direction. All of them are far
    from that of the KL of sequences."""
    at = singles("reinforce", kl_coef=BETA, kl_form=form, reward=lambda tokens: 0.37)
    truth, reference = both(at, SINGLES)
    found = kl_gradient(at, truth)
    assert close(found, truth.gradient(own_tokens(truth, reference, forward=form != "token_k3")))
    exact = -truth.gradient(objective(truth, reference, torch.zeros(len(SINGLES)), 1.0))
    assert not close(found, exact, tolerance=0.1)


def test_published_k3_has_a_fixed_point_of_its_own(short: Callable):
    """Where GRPO's k3 balances a reward is not π*: there its gradient is not 0, that of the exact forms is.

    The reward is what makes the policy as it is the optimum: r = β log(π/π_ref).
    """
    said = {tuple(tokens): number for number, tokens in enumerate(sequences(PAIRS))}
    at = short("reinforce", kl_coef=BETA, kl_form="prefix_k1")
    truth, reference = both(at, PAIRS)
    optimal = BETA * (truth.logprobs - reference.logprobs).sum(-1).detach()
    norms = {}
    for form in ("reward", "sequence_k2", "prefix_k1", "prefix_k3", "token_k3", "token_k2", "weighted_k3"):
        at = short("reinforce", kl_coef=BETA, kl_form=form, reward=lambda tokens: optimal[said[tuple(tokens)]].item())
        norms[form] = mean_gradient(at, at.rollout(), truth.probs.detach()).norm().item()
    assert max(norms[form] for form in ("reward", "sequence_k2", "prefix_k1", "prefix_k3")) < 2e-5
    assert min(norms[form] for form in ("token_k3", "token_k2", "weighted_k3")) > 2e-3


@pytest.mark.parametrize("form", ["prefix_k1", "prefix_k3"])
def test_prefix_weights_are_exact_off_policy(form: str, singles: Callable):
    """Sampled from a policy that has moved since, and weighed with what it was."""
    at = singles("reinforce", kl_coef=BETA, kl_form=form, reward=lambda tokens: 0.37)
    before, reference = both(at, SINGLES)
    x = replace(at.rollout(), old_logprobs=before.logprobs.detach().float())
    at.move()
    truth = Truth(at.players.scorer, SINGLES)
    found = mean_gradient(at, x, before.probs.detach()) / BETA
    assert close(found, -truth.gradient(objective(truth, reference, torch.zeros(len(SINGLES)), 1.0)))


@pytest.mark.parametrize("form", ["reward", "sequence_k2", "prefix_k1", "prefix_k3"])
@pytest.mark.parametrize("recipe", ["ppo", "dr_grpo", "reinforce++"])
def test_the_kl_weighs_as_much_as_it_says_in_every_reduction(
    recipe: str, form: str, short: Callable, reward_of: Callable
):
    """A reduction scales the gradient of E[r] − β KL as a whole: β is in units of reward per nat, whatever it is."""
    plain = replace(RECIPES[recipe].algorithm(), advantages=algorithms.reward_to_go, critic=False, smallest_group=1)
    at = short(plain, kl_coef=BETA, kl_form=form, whiten_advantages=False)
    truth, reference = both(at, PAIRS)
    lengths = PAIRS.mask.sum(-1)
    weights, factor = (truth.probs, 1 / 2) if recipe == "dr_grpo" else (truth.probs * lengths, 1.0)
    found = mean_gradient(at, at.rollout(), weights.detach())
    assert close(found, -factor * truth.gradient(objective(truth, reference, rewards(PAIRS, reward_of))))


# --- surrogates


def some_groups(new_group: Callable, size: int = 3) -> list:
    said = sequences(SINGLES)
    return [
        new_group(PROMPT, [said[(17 * number + 11 * k) % len(said)] for k in range(size)], 3) for number in range(4)
    ]


@pytest.mark.parametrize(
    "recipe", ["reinforce++", "reinforce++-baseline", "ppo", "ppo_penalty", "grpo", "dr_grpo", "dapo", "gspo", "cispo"]
)
def test_with_one_step_per_rollout_every_surrogate_is_reinforce(recipe: str, stage: Callable, new_group: Callable):
    """With the same advantages and the same reduction: nothing has moved, so nothing is clipped."""
    given = RECIPES[recipe].algorithm()
    gradients = []
    for algorithm in (given, replace(given, surrogate=algorithms.log_prob)):
        settings = RECIPES[recipe].settings | {"group_size": 3, "batch_size": 4, "filter_groups": False}
        at = stage(algorithm, some_groups(new_group), **settings | {"num_mini_batches": 1, "inner_epochs": 1})
        gradients.append(at.learn(at.rollout(), range(4))[0])
    assert close(gradients[0], gradients[1])


def test_gspo_has_the_gradient_of_sequences(stage: Callable, new_group: Callable):
    """Token by token it is computed, yet it is GSPO's: one ratio per completion, clipped as a whole
    (arXiv 2507.18071)."""
    groups = some_groups(new_group)
    at = stage("gspo", groups, clip_low=0.02, clip_high=0.03)
    before = Truth(at.players.scorer, SINGLES)
    rows = [sequences(SINGLES).index(list(c.tokens)) for each in groups for c in each.completions]
    x = at.rollout()
    x = replace(x, old_logprobs=before.logprobs[rows].detach().float())
    at.move(0.02)
    truth = Truth(at.players.scorer, SINGLES)
    lengths = SINGLES.mask[rows].sum(-1)
    ratio = ((truth.logprobs - before.logprobs.detach())[rows].sum(-1) / lengths).exp()
    advantages = torch.cat([(s - s.mean()) / (s.std() + 1e-4) for s in x.scores.double()])
    gains = torch.minimum(ratio * advantages, ratio.clamp(0.98, 1.03) * advantages)
    stopped = gains != ratio * advantages
    assert stopped.any()
    assert not stopped.all()
    gradient, tally = at.learn(x, range(4))
    assert tally.loss == pytest.approx(-gains.mean().item(), rel=1e-4)
    assert close(gradient, -truth.gradient(gains.mean()))
    assert tally.means()["clip_ratio/region_mean"] == pytest.approx(stopped.double().mean().item())
