"""Learning from comparisons: Bradley–Terry, Plackett–Luce, the reward-model loss, DPO and its family.

Every loss is a function of **sequence** log-probabilities (the sum of the token log-probabilities of one completion) or
of scalar scores. Shapes are ``[*batch]`` for pairs and ``[*batch, K]`` for ranked lists, the best first. Losses come
back unreduced, one per pair or list; logarithms are natural, so losses are in nats. Every function raises
``ValueError`` for shapes that differ.

The four arguments that most losses share, all ``[*batch]``::

    chosen_logprobs        log π(y_w | x)          ref_chosen_logprobs    log π_ref(y_w | x)
    rejected_logprobs      log π(y_l | x)          ref_rejected_logprobs  log π_ref(y_l | x)

and the one number that nearly all of them look at, the log-ratio margin

    h = [log π(y_w|x) − log π_ref(y_w|x)] − [log π(y_l|x) − log π_ref(y_l|x)].
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from trueup.objectives.shapes import fill_masked, require_same_shape

Lengths = Int[Tensor, "*batch"] | Float[Tensor, "*batch"]


def bradley_terry_logprob(
    score_winner: Float[Tensor, "*batch"], score_loser: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Log-probability that the winner beats the loser.

        log p(w ≻ l) = log σ(s_w − s_l)

    Scores are in logits: a lead of 1 is odds of e : 1. Only differences matter.
    Source: Bradley & Terry 1952; eq. 1 of Rafailov et al. 2023 (arXiv 2305.18290).
    """
    require_same_shape(score_winner, score_loser=score_loser)
    return logsigmoid(score_winner - score_loser)


def plackett_luce_logprob(
    scores: Float[Tensor, "*batch k"], mask: Bool[Tensor, "*batch k"] | None = None
) -> Float[Tensor, "*batch"]:
    """Log-probability of a whole ranking, the best first.

        log p(1 ≻ 2 ≻ … ≻ K) = Σ_k [ s_k − log Σ_{j≥k} exp(s_j) ]

    The best is drawn from all by a softmax over the scores, the next from those that remain, and so on. With K = 2 it
    equals ``bradley_terry_logprob``, to the bit. Entries where ``mask`` is False take no part; a list with fewer than
    two entries has log-probability 0. Raises ``ValueError`` for K = 0.
    Source: Plackett 1975; Luce 1959; appendix A.3 of Rafailov et al. 2023 (arXiv 2305.18290).
    """
    require_same_shape(scores, mask=mask)
    size = scores.shape[-1]
    if size == 0:
        raise ValueError("a ranking needs at least one entry, got K = 0")
    # log p(k is drawn from {k, …, K}) = log σ(−log Σ_{j>k} exp(s_j − s_k)). Differences come first, so that scores
    # of 1e4 lose nothing, and so that K = 2 is Bradley–Terry without rounding.
    leads_over = scores.unsqueeze(-2) - scores.unsqueeze(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
    if mask is not None:
        later = later & mask.unsqueeze(-2) & mask.unsqueeze(-1)
    # A finite stand-in for −∞: the last entry competes with nobody, and an all −∞ logsumexp has no gradient.
    nobody = torch.finfo(scores.dtype).min / 4
    return logsigmoid(-leads_over.masked_fill(~later, nobody).logsumexp(-1)).sum(-1)


def reward_model_loss(
    scores: Float[Tensor, "*batch k"],
    *,
    margin: Float[Tensor, "*batch"] | None = None,
    centering_coef: float = 0.0,
    mask: Bool[Tensor, "*batch k"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of a ranking under the scores of a reward model, the best first.

        K = 2:   −log σ(s_w − s_l − m) + c·(s_w + s_l)²
        any K:   −log PL(s_1 − m, s_2, …, s_K) + c·(2·mean_k s_k)²

    ``margin`` m (in logits): by how much the first must lead before the loss is content. ``centering_coef`` c pulls
    the scores of each list towards mean 0, which the likelihood leaves free. Both bias the recovered score differences;
    with both at 0 the population minimiser has the true ones. Masked entries take no part in either term.
    Raises ``ValueError`` for a negative ``centering_coef`` or K = 0.
    Source: eq. 2 of Rafailov et al. 2023 (arXiv 2305.18290); margin: eq. 2 of Touvron et al. 2023 (arXiv 2307.09288);
    centring for pairs: Eisenstein et al. 2023 (arXiv 2312.09244). The form for K > 2 is ours, equal to those for K = 2.
    """
    _require_not_negative("centering_coef", centering_coef)
    leads = scores
    if margin is not None:
        require_same_shape(scores[..., 0], margin=margin)
        leads = torch.cat([scores[..., :1] - margin.unsqueeze(-1), scores[..., 1:]], dim=-1)
    loss = -plackett_luce_logprob(leads, mask)
    if centering_coef == 0:
        return loss
    num_present = scores.shape[-1] if mask is None else mask.sum(-1).clamp(min=1)
    mean = fill_masked(scores, mask).sum(-1) / num_present
    return loss + centering_coef * (2 * mean).square()


def implicit_rewards(
    logprobs: Float[Tensor, "*batch"], ref_logprobs: Float[Tensor, "*batch"], beta: float
) -> Float[Tensor, "*batch"]:
    """The reward that a policy stands for, up to a constant of the prompt.

        r̂(x, y) = β·[log π(y|x) − log π_ref(y|x)]

    If π is optimal for a reward r with KL weight β, then r̂ = r − β·log Z(x): differences between completions of one
    prompt are the reward's own. Raises ``ValueError`` unless β > 0.
    Source: eq. 5 of Rafailov et al. 2023 (arXiv 2305.18290).
    """
    _require_positive("beta", beta)
    require_same_shape(logprobs, ref_logprobs=ref_logprobs)
    return beta * (logprobs - ref_logprobs)


def dpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    """Direct preference optimisation: Bradley–Terry on the implicit rewards.

        L = −log σ(β·h) = −log σ(r̂_w − r̂_l)
        ∇L = −β·σ(r̂_l − r̂_w)·[∇log π(y_w|x) − ∇log π(y_l|x)]

    Its population minimiser on pairs labelled by Bradley–Terry with reward r is π* ∝ π_ref·exp(r/β).
    Raises ``ValueError`` unless β > 0.
    Source: eq. 7 of Rafailov et al. 2023 (arXiv 2305.18290).
    """
    _require_positive("beta", beta)
    return -logsigmoid(
        beta * _log_ratio_margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    )


def dpo_by_index(
    pi_logps: Float[Tensor, " completions"],
    ref_logps: Float[Tensor, " completions"],
    yw_idxs: Int[Tensor, " pairs"],
    yl_idxs: Int[Tensor, " pairs"],
    beta: float,
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " completions"]]:
    """``dpo`` in the signature of the paper: completions once, pairs as indices into them.

    Returns the loss of every pair, and the implicit reward of every completion, without gradient.
    Raises ``ValueError`` unless β > 0.
    Source: appendix B of Rafailov et al. 2023 (arXiv 2305.18290).
    """
    losses = dpo(pi_logps[yw_idxs], pi_logps[yl_idxs], ref_logps[yw_idxs], ref_logps[yl_idxs], beta=beta)
    return losses, implicit_rewards(pi_logps, ref_logps, beta).detach()


def conservative_dpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, "*batch"]:
    """DPO that holds each label for wrong with probability ε (cDPO).

        L = −(1 − ε)·log σ(β·h) − ε·log σ(−β·h)

    Cross-entropy against 1 − ε instead of 1: the margin of a pair stops growing at β·h = log((1 − ε)/ε).
    ε = 0 is ``dpo``. Raises ``ValueError`` unless β > 0 and 0 ≤ ε < ½.
    Source: eq. 3 of Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    """
    _require_positive("beta", beta)
    _require_noise_rate(label_smoothing)
    rewards_margin = beta * _log_ratio_margin(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    )
    return -(1 - label_smoothing) * logsigmoid(rewards_margin) - label_smoothing * logsigmoid(-rewards_margin)


def robust_dpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, "*batch"]:
    """DPO made unbiased for labels that were flipped with probability ε (rDPO).

        L = [ −(1 − ε)·log σ(β·h) + ε·log σ(−β·h) ] / (1 − 2ε)

    Its mean over the flips is the DPO loss of the clean label. The price: it is unbounded below, and its variance grows
    as ε nears ½. ε = 0 is ``dpo``. Raises ``ValueError`` unless β > 0 and 0 ≤ ε < ½.
    Source: Chowdhury, Kini & Natarajan 2024 (arXiv 2403.00409).
    """
    _require_positive("beta", beta)
    _require_noise_rate(label_smoothing)
    rewards_margin = beta * _log_ratio_margin(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    )
    signed = -(1 - label_smoothing) * logsigmoid(rewards_margin) + label_smoothing * logsigmoid(-rewards_margin)
    return signed / (1 - 2 * label_smoothing)


def ipo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float,
    chosen_lengths: Lengths | None = None,
    rejected_lengths: Lengths | None = None,
) -> Float[Tensor, "*batch"]:
    """Identity preference optimisation: the margin is drawn to a set width instead of to infinity.

        L = (h − 1/(2β))²

    β is the paper's τ. Without lengths the log-probabilities are sums over the tokens, as in the paper, and the
    population minimiser is π* ∝ π_ref·exp(p(y ≻ μ)/β), p(y ≻ μ) the probability to beat a completion of the data.
    With both lengths (tokens, ≥ 1) each log-ratio is divided by its completion's length first, as TRL does; β is then
    on the scale of one token, and the closed form no longer holds.
    Raises ``ValueError`` unless β > 0, and for one length without the other.
    Source: eq. 17 of Azar et al. 2023 (arXiv 2310.12036).
    """
    _require_positive("beta", beta)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("ipo takes the lengths of both completions or of neither")
    if chosen_lengths is not None and rejected_lengths is not None:
        require_same_shape(chosen_logprobs, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        chosen_logprobs, ref_chosen_logprobs = chosen_logprobs / chosen_lengths, ref_chosen_logprobs / chosen_lengths
        rejected_logprobs = rejected_logprobs / rejected_lengths
        ref_rejected_logprobs = ref_rejected_logprobs / rejected_lengths
    margin = _log_ratio_margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return (margin - 1 / (2 * beta)).square()


def hinge(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    """Hinge loss on the implicit rewards.

        L = max(0, 1 − β·h)

    A pair whose rewards are 1 apart or more has no gradient; at the kink itself the gradient is taken as 0.
    Raises ``ValueError`` unless β > 0.
    Source: the normalised hinge loss of Liu et al. 2023 (RSO, arXiv 2309.06657), after SLiC: Zhao et al. 2023
    (arXiv 2305.10425), which has no reference policy in it.
    """
    _require_positive("beta", beta)
    return relu(
        1 - beta * _log_ratio_margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    )


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
    _require_positive("beta", beta)
    _require_not_negative("margin", margin)
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
    _require_not_negative("coef", coef)
    compared = odds_ratio_loss(
        chosen_logprobs, rejected_logprobs, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    return coef * compared - chosen_logprobs / chosen_lengths


def plackett_luce_dpo(
    logprobs: Float[Tensor, "*batch k"],
    ref_logprobs: Float[Tensor, "*batch k"],
    *,
    beta: float,
    mask: Bool[Tensor, "*batch k"] | None = None,
) -> Float[Tensor, "*batch"]:
    """DPO on ranked lists: Plackett–Luce on the implicit rewards, the best first.

        L = −log PL(r̂_1, …, r̂_K),   r̂_k = β·[log π(y_k|x) − log π_ref(y_k|x)]

    K = 2 is ``dpo``. Entries where ``mask`` is False take no part. The population minimiser on rankings drawn from
    Plackett–Luce with reward r is π* ∝ π_ref·exp(r/β). Raises ``ValueError`` unless β > 0 and K ≥ 1.
    Source: appendix A.3 of Rafailov et al. 2023 (arXiv 2305.18290).
    """
    return -plackett_luce_logprob(implicit_rewards(logprobs, ref_logprobs, beta), mask)


def rpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float,
    alpha: float,
    chosen_lengths: Lengths,
) -> Float[Tensor, "*batch"]:
    """DPO with the mean token NLL of the chosen completion beside it (the loss of iterative RPO).

        L = −log σ(β·h) − α·log π(y_w|x)/|y_w|

    DPO alone may lower the chosen completion's probability as long as the rejected one's falls further; the second term
    pulls against that. α = 0 is ``dpo``. Lengths are counts of scored tokens, ≥ 1.
    Raises ``ValueError`` unless β > 0 and α ≥ 0.
    Source: eq. 1 of Pang et al. 2024 (arXiv 2404.19733).
    """
    _require_not_negative("alpha", alpha)
    require_same_shape(chosen_logprobs, chosen_lengths=chosen_lengths)
    losses = dpo(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta)
    return losses - alpha * chosen_logprobs / chosen_lengths


def _log_ratio_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """h: how much more the policy leans to the chosen completion than its reference does."""
    require_same_shape(
        chosen, rejected_logprobs=rejected, ref_chosen_logprobs=ref_chosen, ref_rejected_logprobs=ref_rejected
    )
    return (chosen - ref_chosen) - (rejected - ref_rejected)


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


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _require_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def _require_noise_rate(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
