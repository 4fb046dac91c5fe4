"""What the online methods differ in: how good a completion's tokens were, what is made smaller, and how it is averaged.

An ``Algorithm`` is a record of functions; the loop calls them and knows nothing else of a method. A new one is a
function here (or anywhere) and a row of ``recipes.RECIPES``. The formulas stand in ``trueup.objectives``; what stands
here says which of them goes where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trueup.objectives import advantages, divergence, policy_gradient, preference, reduce, returns
from trueup.trainers.experience import Experience, first_tokens
from trueup.trainers.policy_settings import KLForm, PolicySettings
from trueup.trainers.tally import Totals

GROUP_EPS = 1e-4
"""What is added to a group's standard deviation, in units of the scores; that and the sample's deviation (ddof 1) are
TRL's choice, the paper does not say."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A micro-batch of a rollout under the current policy: c rows, t columns.

    ``logprobs`` and ``entropy`` carry gradient. ``advantages`` are weighted for the sampler's error already
    (``importance``), and 0 outside of ``mask``: the tokens that are learned from.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    group_size: int
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    penalty_coef: float = 0.0
    """The present coefficient of the KL to the policy that sampled."""
    whole_ratio: bool = False
    """Whether the ratio is the completion's, as ``Algorithm`` says."""

    @property
    def ratio(self) -> Tensor:
        """What is clipped: each token's ratio, or the whole completion's with the gradient of each token."""
        ratio = policy_gradient.sequence_ratio_per_token if self.whole_ratio else policy_gradient.ratio
        return ratio(self.logprobs, self.old_logprobs, self.mask)


Advantages = Callable[[Experience, PolicySettings], Tensor]
"""[C, T], how much better each token was than expected: 0 outside of the mask."""
Surrogate = Callable[[Learned, PolicySettings], Tensor]
"""What is made smaller, unreduced: [c, t], or whatever the reduction takes."""
Reduction = Callable[[Tensor, Tensor, Totals, PolicySettings], Tensor]
"""(losses, mask, totals of the whole optimiser step, settings) → this micro-batch's share of the step's loss."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row of DESIGN's table, made of functions."""

    advantages: Advantages
    surrogate: Surrogate
    reduce: Reduction
    samples_from: Literal["policy", "start"] = "policy"
    """Who writes the completions: the policy as it learns, or the model that the run starts from."""
    whole_ratio: bool = False
    """Whether the ratio that is clipped is the completion's (GSPO) and not each token's."""
    kl_in_reward: bool = True
    """Whether the advantages see a KL that is in the reward."""
    critic: bool = False
    """Whether a critic is trained beside the policy."""
    reference: bool = False
    """Whether the surrogate reads the reference's log-probs, whatever ``kl_coef`` is."""
    every_completion: bool = False
    """Whether the surrogate has a gradient where the advantage is 0."""
    whole_groups: bool = False
    """Whether the surrogate compares the completions of a group, so that none may be missing in a pass."""
    steps: bool = False
    """Whether the advantages are made of the scores of steps, which a process reward model gives."""
    smallest_group: int = 1
    """Fewest completions of a prompt that it is defined for."""


# --- advantages


def reward_to_go(x: Experience, settings: PolicySettings) -> Tensor:
    """What was earned from each token on, less the mean return of earlier rollouts."""
    return torch.where(x.mask, _returns(x, settings) - x.baseline, 0.0)


def reward_to_go_in_group(x: Experience, settings: PolicySettings) -> Tensor:
    """What was earned from each token on, less the mean return of the group."""
    mean = x.totals.mean(-1, keepdim=True).expand_as(x.totals)
    return _returns(x, settings) - x.spread(mean)


def leave_one_out(x: Experience, settings: PolicySettings) -> Tensor:
    """What the completion earned, less the mean of its siblings."""
    return x.spread(advantages.leave_one_out(x.totals))


def group_centered(x: Experience, settings: PolicySettings) -> Tensor:
    """What the completion earned, less the mean of its group."""
    return x.spread(advantages.group_centered(x.totals))


def group_normalized(x: Experience, settings: PolicySettings) -> Tensor:
    """The same, divided by the group's standard deviation."""
    return x.spread(advantages.group_normalized(x.totals, ddof=1, eps=GROUP_EPS))


def process_normalized(x: Experience, settings: PolicySettings) -> Tensor:
    """The rewards of all steps of a group, normalised together; a token's advantage is the sum of those from it on."""
    if x.step_rewards is None or x.step_mask is None:
        raise ValueError("process supervision needs a reward that scores steps")
    shape = (len(x.groups), -1)
    normalized = advantages.group_normalized(
        x.step_rewards.reshape(shape), x.step_mask.reshape(shape), ddof=1, eps=GROUP_EPS
    )
    return _returns(replace(x, rewards=normalized.view_as(x.rewards)), settings)


def gae(x: Experience, settings: PolicySettings) -> Tensor:
    """Generalised advantage estimation with the critic's values."""
    assert x.values is not None
    after = returns.next_values(x.values, x.bootstrap, x.mask)
    return advantages.gae(
        x.rewards, _discounts(x, settings), x.values, after, gae_lambda=settings.gae_lambda, mask=x.mask
    )


def right_ones(x: Experience, settings: PolicySettings) -> Tensor:
    """1 for what is right, 0 for what is not."""
    return x.spread((x.scores >= settings.success_score).float())


def best_one(x: Experience, settings: PolicySettings) -> Tensor:
    """1 for the best of the group (of several equal ones, the first), 0 for the others."""
    return x.spread(torch.nn.functional.one_hot(x.totals.argmax(-1), x.group_size).float())


def best_and_worst(x: Experience, settings: PolicySettings) -> Tensor:
    """1 for the best of the group, −1 for the worst; 0 where all are equal."""
    best, worst = (
        torch.nn.functional.one_hot(index, x.group_size) for index in (x.totals.argmax(-1), x.totals.argmin(-1))
    )
    return x.spread((best - worst).float())


def _discounts(x: Experience, settings: PolicySettings) -> Tensor:
    """γ, and 0 where a completion ends: it is cut off, too, unless the critic says what would have come."""
    goes_on = x.truncated[:, None] & (x.bootstrap is not None and settings.truncated_completions == "bootstrapped")
    return returns.discounts_from(x.last & ~goes_on, settings.gamma, dtype=x.rewards.dtype)


def _returns(x: Experience, settings: PolicySettings) -> Tensor:
    return returns.discounted_returns(x.rewards, _discounts(x, settings), mask=x.mask)


# --- surrogates


def log_prob(x: Learned, settings: PolicySettings) -> Tensor:
    """REINFORCE, and with advantages of 0 and 1 maximum likelihood of what is chosen."""
    return policy_gradient.reinforce(x.logprobs, x.advantages)


def clipped(x: Learned, settings: PolicySettings) -> Tensor:
    """PPO's, and with the ratio of the whole completion GSPO's."""
    bounds = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    if settings.dual_clip is None:
        return policy_gradient.clipped_surrogate(x.ratio, x.advantages, **bounds)
    return policy_gradient.dual_clipped_surrogate(x.ratio, x.advantages, **bounds, clip_ratio=settings.dual_clip)


def penalized(x: Learned, settings: PolicySettings) -> Tensor:
    """PPO's other one: no clip, a penalty on the distance to the policy that sampled."""
    kl = divergence.k3_of_old(x.logprobs, x.old_logprobs)
    return policy_gradient.kl_penalized_surrogate(x.ratio, x.advantages, kl, kl_coef=x.penalty_coef)


def cispo(x: Learned, settings: PolicySettings) -> Tensor:
    """CISPO's: REINFORCE with a clipped weight."""
    bounds = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    return policy_gradient.cispo(x.logprobs, x.ratio, x.advantages, **bounds)


def dpo_of_pairs(x: Learned, settings: PolicySettings) -> Tensor:
    """DPO's loss of the best and the worst completion of each group, [n]; 0 where one of them is not learned from."""
    assert x.ref_logprobs is not None
    log_ratios = reduce.sequence_sum(x.logprobs - x.ref_logprobs, x.mask).view(-1, x.group_size)
    sign = x.advantages.sum(-1).view(-1, x.group_size)
    chosen, rejected = (log_ratios.gather(-1, index[:, None])[:, 0] for index in (sign.argmax(-1), sign.argmin(-1)))
    losses = preference.dpo(chosen, rejected, beta=settings.kl_coef)
    return torch.where((sign > 0).any(-1) & (sign < 0).any(-1), losses, 0.0)


# --- reductions


def token_mean(losses: Tensor, mask: Tensor, totals: Totals, settings: PolicySettings) -> Tensor:
    """Every token of the step weighs the same."""
    return reduce.token_mean(losses, mask, max(totals.tokens, 1))


def sequence_mean(losses: Tensor, mask: Tensor, totals: Totals, settings: PolicySettings) -> Tensor:
    """Every completion of the step weighs the same."""
    return reduce.sequence_mean(losses, mask, totals.completions)


def sequence_sum(losses: Tensor, mask: Tensor, totals: Totals, settings: PolicySettings) -> Tensor:
    """Summed over a completion's tokens, mean over the completions."""
    return reduce.sequence_sum(losses, mask).sum() / totals.completions


def constant_length(losses: Tensor, mask: Tensor, totals: Totals, settings: PolicySettings) -> Tensor:
    """Summed over tokens, divided by the longest length there can be."""
    return reduce.constant_length_mean(losses, mask, settings.max_new_tokens, totals.completions)


def group_mean(losses: Tensor, mask: Tensor, totals: Totals, settings: PolicySettings) -> Tensor:
    """One loss per group, mean over the groups."""
    return losses.sum() / totals.groups


# --- the KL to the reference, as a loss


def kl_loss(x: Learned, algorithm: Algorithm, totals: Totals, settings: PolicySettings) -> Tensor:
    """This micro-batch's share of the step's KL, in the form that the settings name.

    It is averaged as the surrogate is, so that β is the same in both: where a reduction divides the reward's gradient
    by a number (of tokens, of the longest length), it divides the KL's by it too.
    """
    assert x.ref_logprobs is not None
    return algorithm.reduce(KL_LOSSES[settings.kl_form](x), x.mask, totals, settings)


def _per_token(estimate: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Learned], Tensor]:
    return lambda x: estimate(x.logprobs, x.ref_logprobs)  # pyright: ignore[reportArgumentType]


def _weighted(
    weigh: Callable[..., Tensor], estimate: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Learned], Tensor]:
    def weighted(x: Learned) -> Tensor:
        assert x.ref_logprobs is not None
        return weigh(estimate(x.logprobs, x.ref_logprobs), x.logprobs, x.old_logprobs, x.mask)

    return weighted


def _sequence_k2(x: Learned) -> Tensor:
    """At the first token of each completion, so that it is summed as the other forms are."""
    assert x.ref_logprobs is not None
    whole = divergence.sequence_k2(x.logprobs, x.ref_logprobs, x.mask)
    return torch.where(first_tokens(x.mask), whole[:, None], 0.0)


KL_LOSSES: dict[KLForm, Callable[[Learned], Tensor]] = {
    "token_k3": _per_token(divergence.k3),
    "token_k2": _per_token(divergence.k2),
    "weighted_k3": _weighted(divergence.token_weighted, divergence.k3),
    "prefix_k1": _weighted(divergence.prefix_weighted, divergence.k1),
    "prefix_k3": _weighted(divergence.prefix_weighted, divergence.k3),
    "sequence_k2": _sequence_k2,
}
"""Of each form that is a loss: its value per token. The sum of the last three over tokens has the gradient of the KL of
sequences; a reduction that weighs completions by their length (``sequence_mean``) weighs that too, as it does with what
is rewarded."""
