"""Losses that judge each completion by itself, so that a thumb up or down is enough: no pair is needed.

``log_ratios`` is u = log π(y|x) − log π_ref(y|x) of each completion, ``desirable`` is True where it is a good one; both
``[*batch]``, any shape. For pairs, call them once for each side and add, or once with a last dimension of two. Losses
come back unreduced, one per completion. Every function raises ``ValueError`` for shapes that differ.

What a loss has to know of the whole batch (KTO's ``kl``, BCO's ``shift``) is an argument without gradient: compute it
over all of a step, then cut into micro-batches.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from trueup.objectives.shapes import require_not_negative, require_positive, require_same_shape


def kto(
    log_ratios: Float[Tensor, "*batch"],
    desirable: Bool[Tensor, "*batch"],
    *,
    kl: Float[Tensor, ""],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Kahneman–Tversky optimisation: gains and losses against a reference point, both with diminishing effect.

        desirable     L = λ_D·[1 − σ(β·(u − z₀))]
        undesirable   L = λ_U·[1 − σ(β·(z₀ − u))]

    ``kl`` is the reference point z₀ ≥ 0, from ``kto_kl``; it takes no gradient. The loss is linear in σ, so a
    completion that is desirable with probability p goes up without end where λ_D·p > λ_U·(1 − p), and down otherwise:
    it decides by majority and estimates no reward. The weights make up for unequal counts: keep λ_D·n_D near λ_U·n_U.
    Raises ``ValueError`` unless β > 0 and both weights are ≥ 0.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306).
    """
    require_not_negative("desirable_weight", desirable_weight)
    require_not_negative("undesirable_weight", undesirable_weight)
    losses = apo_zero(log_ratios - kl.detach(), desirable, beta=beta)
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)


def kto_kl(mismatched_log_ratios: Float[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """KTO's reference point: the mean log-ratio of completions that belong to other prompts, at least 0, no gradient.

        z₀ = max(0, mean[log π(y'|x) − log π_ref(y'|x)])

    Take it over the whole batch. If y' were drawn from the policy, the mean would estimate KL(π ‖ π_ref) without bias;
    with completions of the data it is the paper's stand-in for that.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306).
    """
    return mismatched_log_ratios.detach().mean().clamp(min=0)


def bco(
    log_ratios: Float[Tensor, "*batch"], desirable: Bool[Tensor, "*batch"], *, beta: float, shift: Float[Tensor, ""]
) -> Float[Tensor, "*batch"]:
    """Binary classifier optimisation: the implicit reward, shifted, is the logit of being desirable.

        desirable     L = −log σ(β·u − δ)
        undesirable   L = −log σ(δ − β·u)

    A completion that is desirable with probability p ends at β·u = δ + log(p/(1 − p)): unlike KTO it recovers a reward,
    that of which p is the logistic. ``shift`` δ, from ``bco_shift`` or a running mean of it, takes no gradient.
    Raises ``ValueError`` unless β > 0.
    Source: Jung et al. 2024 (arXiv 2404.04656).
    """
    require_positive("beta", beta)
    require_same_shape(log_ratios, desirable=desirable)
    logits = beta * log_ratios - shift.detach()
    return -logsigmoid(torch.where(desirable, logits, -logits))


def bco_shift(
    log_ratios: Float[Tensor, "*batch"], desirable: Bool[Tensor, "*batch"], *, beta: float
) -> Float[Tensor, ""]:
    """Half-way between the mean implicit rewards of the desirable and of the undesirable completions, no gradient.

        δ = ½·( E[β·u | desirable] + E[β·u | undesirable] )

    Take it over the whole batch. Of a kind that is missing there nothing is known, and δ is the mean of the other: the
    paper's running mean over steps would have remembered it. Raises ``ValueError`` unless β > 0, and for no completion.
    Source: Jung et al. 2024 (arXiv 2404.04656).
    """
    require_positive("beta", beta)
    require_same_shape(log_ratios, desirable=desirable)
    kinds = [log_ratios.detach()[kind] for kind in (desirable, ~desirable) if kind.any()]
    if not kinds:
        raise ValueError("the shift needs at least one completion")
    return beta * torch.stack([kind.mean() for kind in kinds]).mean()


def apo_zero(
    log_ratios: Float[Tensor, "*batch"], desirable: Bool[Tensor, "*batch"], *, beta: float
) -> Float[Tensor, "*batch"]:
    """Anchored preference optimisation for chosen completions that are better than what the model writes by itself.

        desirable     L = 1 − σ(β·u)
        undesirable   L = σ(β·u)

    Desirable completions go up, undesirable ones down, both against the reference: KTO with z₀ = 0. The counterpart is
    ``preference.apo_down``. Raises ``ValueError`` unless β > 0.
    Source: eq. 7 of D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    require_positive("beta", beta)
    require_same_shape(log_ratios, desirable=desirable)
    rewards = beta * log_ratios
    return torch.where(desirable, -rewards, rewards).sigmoid()


def nca(
    log_ratios: Float[Tensor, "*batch"], desirable: Bool[Tensor, "*batch"], *, beta: float
) -> Float[Tensor, "*batch"]:
    """Noise contrastive alignment on pairs: the better one is told from noise, both are taken for noise.

        desirable     L = −log σ(β·u) − ½·log σ(−β·u)
        undesirable   L = −½·log σ(−β·u)

    Each pair gives one of each, so a completion that wins with probability p ends at β·u = log 2p. With β = 1 and pairs
    drawn from π_ref that is a policy as it stands, π* = 2·π_ref·p(y ≻ π_ref). The desirable completion's probability
    is held up: at u = 0 it rises as fast as the other falls. Raises ``ValueError`` unless β > 0.
    Source: the form for preference pairs in Chen et al. 2024 (arXiv 2402.05369).
    """
    require_positive("beta", beta)
    require_same_shape(log_ratios, desirable=desirable)
    rewards = beta * log_ratios
    noise = -logsigmoid(-rewards) / 2
    return torch.where(desirable, noise - logsigmoid(rewards), noise)


def sppo(
    log_ratios: Float[Tensor, "*batch"], win_probability: Float[Tensor, "*batch"], *, beta: float
) -> Float[Tensor, "*batch"]:
    """Self-play preference optimisation: least squares on what one step of multiplicative weights asks for.

        L = ( u − (P − ½)/β )²

    ``win_probability`` P is how often the completion beats one of the reference policy, which in self-play is the
    policy of the round before: the mean over several opponents, or 1 for the chosen and 0 for the rejected of a pair
    (TRL's ``sppo_hard``). Hard labels have the same mean gradient. 1/β is the paper's learning rate η. The minimiser of
    each u is (P − ½)/β: π_ref·exp(P/β) but for its normaliser, in whose place the paper puts exp(1/(2β)).
    Raises ``ValueError`` unless β > 0.
    Source: Wu et al. 2024 (arXiv 2405.00675).
    """
    require_positive("beta", beta)
    require_same_shape(log_ratios, win_probability=win_probability)
    return (log_ratios - (win_probability - 0.5) / beta).square()
