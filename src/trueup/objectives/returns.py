"""Returns: what a step was worth, from the rewards that followed it.

Conventions, the same in every function here and in ``advantages``. Time is last, ``[..., T]``; step t goes from state t
to its next state and earns ``rewards[t]``.

- ``discounts[t]`` multiplies everything after step t. It is ``gamma``, and 0 where the episode *terminated* with step
  t: after that there is nothing to earn (``discounts_from``).
- ``next_values[t]`` estimates the value of the state that step t leads to.
- ``truncated[t]``: the recording stops after step t although the episode doesn't (a time limit, an automatic reset).
  The bootstrap ``discounts[t] * next_values[t]`` is kept, the recursion is cut: nothing that stands to the right in the
  array flows back. The last step of the array is always cut. There is no ``done``: it would mix the two up.
- ``mask[t]`` is False where nothing was decided (padding, a tool's tokens). Such entries are not steps: their rewards,
  discounts and flags are not read, a gap between two steps is bridged without any discount, and the result there is 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueup.objectives.shapes import fill_masked, require_same_shape


def discounts_from(
    terminated: Bool[Tensor, "*batch t"], gamma: float, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "*batch t"]:
    """The discount after every step: γ, and 0 where the episode terminated.

        d_t = γ · (1 − terminated_t)

    Truncation is no reason for a 0 here: a truncated episode would have gone on, so its bootstrap is kept.
    Shape: [..., T], in torch's default dtype unless given. Raises ``ValueError`` unless 0 ≤ γ ≤ 1.
    Source: Sutton & Barto 2018, §3.4 (episodic and continuing tasks in one notation).
    """
    _fraction("gamma", gamma)
    return gamma * (~terminated).to(dtype or torch.get_default_dtype())


def next_values(
    values: Float[Tensor, "*batch t"],
    bootstrap: Float[Tensor, "*batch"] | None = None,
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """Values shifted by one step: V(s_{t+1}) for every t, and the bootstrap (default 0) after the last step.

    For one unbroken recording per row. Where a recording restarts inside the row (``truncated``), the value of the
    state that was left has to be put in by the caller: the next entry belongs to another episode. Masked gaps are
    bridged.
    Shapes: values and mask [..., T], bootstrap [...] → [..., T]; 0 where masked.
    Raises ``ValueError`` if the shapes differ.
    """
    nothing = values.new_zeros(values.shape[:-1])
    require_same_shape(nothing, bootstrap=bootstrap)
    end = nothing if bootstrap is None else bootstrap
    shifted = torch.cat([values, end.unsqueeze(-1)], -1).gather(-1, _following(values, mask))
    return fill_masked(shifted, mask)


def discounted_returns(
    rewards: Float[Tensor, "*batch t"],
    discounts: Float[Tensor, "*batch t"],
    next_values: Float[Tensor, "*batch t"] | None = None,
    *,
    truncated: Bool[Tensor, "*batch t"] | None = None,
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """Discounted sum of the rewards from every step on (with γ = 1: the reward-to-go).

        G_t = r_t + d_t · G_{t+1},    and where the recording is cut:    G_t = r_t + d_t · V(s_{t+1})

    ``next_values`` is read only at the last step and at truncated ones; None stands for 0 there, which is right where
    every recording ends by termination. Shapes: all [..., T]. Units: those of the rewards.
    Raises ``ValueError`` if the shapes differ. Source: Sutton & Barto 2018, eq. 3.8 and 3.9.
    """
    require_same_shape(rewards, next_values=next_values)
    values = torch.zeros_like(rewards)
    if next_values is not None:
        values = torch.where(_cut(rewards, truncated, mask), next_values, values)
    return lambda_returns(rewards, discounts, values, lambda_=1.0, truncated=truncated, mask=mask)


def lambda_returns(
    rewards: Float[Tensor, "*batch t"],
    discounts: Float[Tensor, "*batch t"],
    next_values: Float[Tensor, "*batch t"],
    *,
    lambda_: float,
    truncated: Bool[Tensor, "*batch t"] | None = None,
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """The λ-return: all n-step returns, averaged with weights (1 − λ)·λ^{n−1}.

        G_t = r_t + d_t · [(1 − λ) · V(s_{t+1}) + λ · G_{t+1}],    and where cut:    G_t = r_t + d_t · V(s_{t+1})

    λ = 0 is the one-step TD target, λ = 1 the bootstrapped Monte-Carlo return.
    Shapes: all [..., T]. Units: those of the rewards.
    Raises ``ValueError`` if the shapes differ or λ lies outside [0, 1].
    Source: Sutton & Barto 2018, §12.1; with a discount per step §12.8.
    """
    _fraction("lambda_", lambda_)
    require_same_shape(rewards, discounts=discounts, next_values=next_values, truncated=truncated)
    mixing = lambda_ * (~_cut(rewards, truncated, mask)).to(rewards.dtype)
    inputs = rewards + discounts * (1 - mixing) * next_values
    return reverse_scan(inputs, discounts * mixing, mask)


def n_step_returns(
    rewards: Float[Tensor, "*batch t"],
    discounts: Float[Tensor, "*batch t"],
    next_values: Float[Tensor, "*batch t"],
    *,
    num_steps: int,
    truncated: Bool[Tensor, "*batch t"] | None = None,
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """n rewards, then the value estimate of the state they lead to.

        G^{(1)}_t = r_t + d_t · V(s_{t+1}),    G^{(n)}_t = r_t + d_t · G^{(n−1)}_{t+1}

    Where the recording is cut before n steps, the return bootstraps there. ``num_steps`` ≥ T gives the λ-return at
    λ = 1. Shapes: all [..., T]. Units: those of the rewards.
    Raises ``ValueError`` if the shapes differ or ``num_steps`` < 1.
    Source: Sutton & Barto 2018, eq. 7.1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps has to be at least 1, not {num_steps}")
    require_same_shape(rewards, discounts=discounts, next_values=next_values, truncated=truncated)
    one_step = rewards + discounts * next_values
    cut = _cut(rewards, truncated, mask)
    # A cut step doesn't look at the step after it, so any index will do there.
    following = _following(rewards, mask).clamp(max=rewards.shape[-1] - 1)
    returns = one_step
    for _ in range(min(num_steps, rewards.shape[-1]) - 1):
        returns = torch.where(cut, one_step, rewards + discounts * returns.gather(-1, following))
    return fill_masked(returns, mask)


def elapsed_discounts(
    ended: Bool[Tensor, "*batch t"],
    gamma: float,
    mask: Bool[Tensor, "*batch t"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch t"]:
    """γ^t, where t counts the steps since the episode began.

        w_0 = 1,    w_{t+1} = γ · w_t,    and 1 again after a step that ``ended`` an episode (terminated or truncated)

    The factor in front of ∇log π that makes REINFORCE the gradient of the discounted return (``reinforce_discounted``).
    Shapes: all [..., T]; 0 where masked; torch's default dtype unless given.
    Raises ``ValueError`` if the shapes differ, or unless 0 ≤ γ ≤ 1.
    Source: Sutton & Barto 2018, §13.3 (the γ^t in the box of REINFORCE).
    """
    _fraction("gamma", gamma)
    require_same_shape(ended, mask=mask)
    steps = torch.ones_like(ended) if mask is None else mask
    number = steps.cumsum(-1) - 1
    begun_next = torch.where(ended & steps, number + 1, 0).cummax(-1).values
    age = number - torch.nn.functional.pad(begun_next[..., :-1], (1, 0))
    weights = torch.full_like(age, gamma, dtype=dtype or torch.get_default_dtype()) ** age
    return fill_masked(weights, mask)


def reverse_scan(
    inputs: Float[Tensor, "*batch t"],
    decays: Float[Tensor, "*batch t"],
    mask: Bool[Tensor, "*batch t"] | None = None,
) -> Float[Tensor, "*batch t"]:
    """Solve x_t = inputs_t + decays_t · x_{t+1} backwards in time, with x = 0 after the end.

    Returns, λ-returns and advantages are all this one recursion. Masked steps hand on what they get and come out as 0.
    Done in ⌈log₂ T⌉ doublings instead of T steps, each of which lets every step see twice as far.
    Shapes: all [..., T]. Differentiable. Raises ``ValueError`` if the shapes differ.
    Source: Blelloch 1990, "Prefix sums and their applications" (recurrences as scans), in Hillis and Steele's form.
    """
    require_same_shape(inputs, decays=decays)
    num_steps = inputs.shape[-1]
    sums, products = fill_masked(inputs, mask), fill_masked(decays, mask, 1.0)
    reach = 1
    while reach < num_steps:
        sums = sums + products * _shifted(sums, reach)
        products = products * _shifted(products, reach)
        reach *= 2
    return fill_masked(sums, mask)


def _shifted(x: Tensor, steps: int) -> Tensor:
    """x_{t + steps}, and 0 beyond the end."""
    return torch.nn.functional.pad(x[..., steps:], (0, steps))


def _following(x: Tensor, mask: Tensor | None) -> Tensor:
    """Index of the next step after each entry, T where there is none: [..., T]."""
    num_steps = x.shape[-1]
    indices = torch.arange(num_steps, device=x.device).expand(x.shape)
    if mask is None:
        return indices + 1
    steps = torch.where(mask, indices, num_steps)
    after = torch.nn.functional.pad(steps[..., 1:], (0, 1), value=num_steps)
    return after.flip(-1).cummin(-1).values.flip(-1)


def _cut(x: Tensor, truncated: Tensor | None, mask: Tensor | None) -> Tensor:
    """Steps after which the recursion stops: truncated ones and the last of each row."""
    last = _following(x, mask) == x.shape[-1]
    return last if truncated is None else last | truncated


def _fraction(name: str, number: float) -> None:
    if not 0 <= number <= 1:
        raise ValueError(f"{name} has to lie in [0, 1], not {number}")
