"""Reference-free losses: the reward of a completion is its own log-probability, so one forward pass is enough.

Arguments are **sequence** log-probabilities under the trained policy (sums over the scored tokens), and lengths,
the counts of those tokens, ≥ 1, all ``[*batch]``. Losses come back unreduced, one per pair, in nats. Every function
raises ``ValueError`` for shapes that differ.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from trueup.objectives.preference import conservative_dpo
from trueup.objectives.shapes import require_not_negative, require_positive, require_same_shape

Lengths = Int[Tensor, "*batch"] | Float[Tensor, "*batch"]


def simpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    beta: float,
    margin: float,
) -> Float[Tensor, "*batch"]:
    """Simple preference optimisation: the reward is the mean token log-probability, and no reference is needed.

        L = −log σ( β/|y_w|·log π(y_w|x) − β/|y_l|·log π(y_l|x) − γ )

    ``margin`` γ is in logits, not multiplied by β (libraries that take the ratio γ/β multiply it back). Lengths are
    counts of scored tokens, ≥ 1. Raises ``ValueError`` unless β > 0 and γ ≥ 0.
    Source: eq. 6 of Meng, Xia & Chen 2024 (arXiv 2405.14734).
    """
    require_positive("beta", beta)
    require_not_negative("margin", margin)
    require_same_shape(
        chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    lead = chosen_logprobs / chosen_lengths - rejected_logprobs / rejected_lengths
    return -logsigmoid(beta * lead - margin)


def odds_ratio_loss(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
) -> Float[Tensor, "*batch"]:
    """The comparing term of ORPO.

        L_OR = −log σ( log odds(y_w|x) − log odds(y_l|x) ),   odds = p/(1 − p),   p(y|x) = exp(log π(y|x)/|y|)

    p is the geometric mean of the token probabilities. Lengths are counts of scored tokens, ≥ 1. A p that rounds to 1
    is held one rounding step below it, without gradient: its odds would be infinite.
    Source: eqs. 4 and 7 of Hong, Lee & Thorne 2024 (arXiv 2403.07691).
    """
    require_same_shape(
        chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return -logsigmoid(_log_odds(chosen_logprobs / chosen_lengths) - _log_odds(rejected_logprobs / rejected_lengths))


def orpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    coef: float,
) -> Float[Tensor, "*batch"]:
    """Odds-ratio preference optimisation: fine-tuning on the chosen completion and comparing, in one loss.

        L = −log π(y_w|x)/|y_w| + λ·L_OR

    No reference policy; meant to start from the base model. ``coef`` is λ, L_OR is ``odds_ratio_loss``. The first term
    is over the completion's tokens only. Raises ``ValueError`` for a negative λ.
    Source: eq. 6 of Hong, Lee & Thorne 2024 (arXiv 2403.07691).
    """
    require_not_negative("coef", coef)
    compared = odds_ratio_loss(
        chosen_logprobs, rejected_logprobs, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    return coef * compared - chosen_logprobs / chosen_lengths


def cpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    chosen_lengths: Lengths,
    beta: float,
    label_smoothing: float = 0.0,
    nll_coef: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Contrastive preference optimisation: DPO under a reference that likes all completions alike, and fine-tuning.

        L = −(1 − ε)·log σ(z) − ε·log σ(−z) − c·log π(y_w|x)/|y_w|,   z = β·[log π(y_w|x) − log π(y_l|x)]

    ``nll_coef`` c weighs the second term, which keeps the chosen completion likely; with c = 0 the population minimiser
    on Bradley–Terry labels is π* ∝ exp(r/β). ``label_smoothing`` ε is that of ``conservative_dpo``, 0 in the paper.
    Raises ``ValueError`` unless β > 0, 0 ≤ ε < ½ and c ≥ 0.
    Source: Xu et al. 2024 (arXiv 2401.08417), eq. 3 for the comparison; the likelihood is per token, as in ORPO.
    """
    require_not_negative("nll_coef", nll_coef)
    require_same_shape(chosen_logprobs, chosen_lengths=chosen_lengths)
    compared = conservative_dpo(chosen_logprobs, rejected_logprobs, beta=beta, label_smoothing=label_smoothing)
    return compared - nll_coef * chosen_logprobs / chosen_lengths


def _log_odds(logprobs: Tensor) -> Tensor:
    """log p/(1 − p) from log p, exact at both ends: 1 − p is −expm1(log p) near 1 and 1 − exp(log p) near 0."""
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    near_one = logprobs > -math.log(2)
    # Each branch sees only arguments it is good at, for the gradient of `where` goes through both.
    log_complement = torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, logprobs, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, logprobs))),
    )
    return logprobs - log_complement
