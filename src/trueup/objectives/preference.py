"""Learning from comparisons: Bradley–Terry, Plackett–Luce, the reward-model loss, DPO and the pair losses beside it.

Scores and **sequence** log-probabilities (sums over the scored tokens of a completion) have the shape ``[*batch]`` for
pairs and ``[*batch, K]`` for ranked lists, the best first. Losses come back unreduced, one per pair or list; logarithms
are natural, so losses are in nats. Every function raises ``ValueError`` for shapes that differ.

A pair loss sees the two policies only through the log-ratio of each completion,

    u = log π(y|x) − log π_ref(y|x),

``chosen_log_ratios`` of y_w and ``rejected_log_ratios`` of y_l, and nearly all look only at the margin h = u_w − u_l.
So the family composes::

    u = logprobs - ref_logprobs                                        # what the papers write
    u = (logprobs - ref_logprobs) / lengths                            # per token: length-normalised DPO; TRL's IPO
    u = divergence_rewards(logprobs - ref_logprobs, "jensen_shannon")  # f-DPO: another leash than reverse KL
    u = desensitized - ref_desensitized                                # LD-DPO: length_desensitized_logprobs of both
    losses = 0.8 * dpo(u_w, u_l, beta=0.1) + 0.2 * hinge(u_w, u_l, beta=0.1)
    losses = wpo_weights(...).prod(-1) * dpo(u_w, u_l, beta=0.1)       # WPO

Losses that judge each completion by itself are in ``pointwise``, those without a reference in ``reference_free``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from trueup.objectives.logprobs import sequence_logprobs
from trueup.objectives.shapes import fill_masked, require_not_negative, require_positive, require_same_shape

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]

MAX_EXPONENT = 20.0
"""Where the exponential of ``divergence_rewards`` goes over into its tangent."""


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
    require_not_negative("centering_coef", centering_coef)
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
    require_positive("beta", beta)
    require_same_shape(logprobs, ref_logprobs=ref_logprobs)
    return beta * (logprobs - ref_logprobs)


def divergence_rewards(
    log_ratios: Float[Tensor, "*batch"], divergence: Divergence, *, alpha: float = 0.5
) -> Float[Tensor, "*batch"]:
    """What a log-ratio is worth when another f-divergence than reverse KL holds the policy to its reference.

        reverse_kl        f(t) = t·log t                                      g(u) = u
        forward_kl        f(t) = −log t                                       g(u) = 1 − e^(−u)
        jensen_shannon    f(t) = t·log t − (t + 1)·log((t + 1)/2)             g(u) = log 2 + log σ(u)
        alpha             f(t) = (t^(1−α) − (1 − α)·t − α)/(α·(α − 1))        g(u) = (1 − e^(−αu))/α

    The optimum of E_π[r] − β·Σ_y π_ref·f(π/π_ref) has r = β·f'(π/π_ref) + a constant of the prompt. g(u) is f'(e^u)
    with the constant that makes g(0) = 0. A pair loss that sees only differences takes g(u) for u: ``dpo`` of it is
    f-DPO, and its population minimiser under Bradley–Terry labels is that optimum.

    α in (0, 1) goes from reverse (0) to forward KL (1); the coefficient that TRL takes is 1 − α. Jensen–Shannon is f
    as written, twice the symmetric mean of two KLs. All but reverse KL bound the reward from above, at log 2 or 1/α.
    Where −αu exceeds 20, e^(−αu) goes on as its tangent: the exponential would overflow, and a cut would leave no
    gradient where it is needed most.
    Raises ``ValueError`` for an unknown divergence and for α outside (0, 1).
    Source: Wang et al. 2023 (arXiv 2309.16240), whose α this is.
    """
    match divergence:
        case "reverse_kl":
            return log_ratios
        case "forward_kl":
            return _saturating(log_ratios, 1.0)
        case "jensen_shannon":
            return math.log(2) + logsigmoid(log_ratios)
        case "alpha":
            if not 0 < alpha < 1:
                raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
            return _saturating(log_ratios, alpha)
    raise ValueError(f"divergence must be reverse_kl, forward_kl, jensen_shannon or alpha, got {divergence!r}")


def dpo(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
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
    return -logsigmoid(_rewards_margin(chosen_log_ratios, rejected_log_ratios, beta))


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
    require_same_shape(pi_logps, ref_logps=ref_logps)
    log_ratios = pi_logps - ref_logps
    return dpo(log_ratios[yw_idxs], log_ratios[yl_idxs], beta=beta), beta * log_ratios.detach()


def conservative_dpo(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
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
    _require_noise_rate(label_smoothing)
    margin = _rewards_margin(chosen_log_ratios, rejected_log_ratios, beta)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def robust_dpo(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
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
    _require_noise_rate(label_smoothing)
    margin = _rewards_margin(chosen_log_ratios, rejected_log_ratios, beta)
    signed = -(1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return signed / (1 - 2 * label_smoothing)


def exo(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
    *,
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, "*batch"]:
    """Efficient exact optimisation on pairs: reverse KL from the policy's choice to the label's, softened by ε.

        L = KL( (q, 1 − q) ‖ (1 − ε, ε) ),   q = σ(β·h)

    ``conservative_dpo`` is the forward KL of the same two, up to a constant; both are content at β·h = log((1 − ε)/ε),
    but a pair that is badly wrong has almost no gradient here. A pair labelled right with probability p ends at
    β·h = (2p − 1)·log((1 − ε)/ε), as IPO's does at β·h = p − ½. Raises ``ValueError`` unless β > 0 and 0 < ε < ½.
    Source: eq. 16 of Ji et al. 2024 (arXiv 2402.00856), which recommends ε = 1e-3.
    """
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in (0, 0.5), got {label_smoothing}")
    margin = _rewards_margin(chosen_log_ratios, rejected_log_ratios, beta)
    right = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-label_smoothing))
    wrong = (-margin).sigmoid() * (logsigmoid(-margin) - math.log(label_smoothing))
    return right + wrong


def ipo(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    """Identity preference optimisation: the margin is drawn to a set width instead of to infinity.

        L = (h − 1/(2β))²

    β is the paper's τ. With log-ratios summed over the tokens, as in the paper, the population minimiser is
    π* ∝ π_ref·exp(p(y ≻ μ)/β), p(y ≻ μ) the probability to beat a completion of the data. With log-ratios per token, as
    in TRL, β is on the scale of one token, and the closed form no longer holds.
    Raises ``ValueError`` unless β > 0.
    Source: eq. 17 of Azar et al. 2023 (arXiv 2310.12036).
    """
    return ((_rewards_margin(chosen_log_ratios, rejected_log_ratios, beta) - 0.5) / beta).square()


def hinge(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
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
    return relu(1 - _rewards_margin(chosen_log_ratios, rejected_log_ratios, beta))


def discopop(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
    *,
    beta: float,
    tau: float = 0.05,
) -> Float[Tensor, "*batch"]:
    """Log-ratio modulated loss (LRML, DiscoPOP): logistic where a pair is wrong, exponential where it is right.

        L = (1 − m)·[−log σ(z)] + m·exp(−z),   z = β·h,   m = σ(z/τ)

    It was found by a language model's search. The change at z = 0, from log 2 up to 1, makes it *rise* with the margin
    on a stretch about 0, for the published β = τ = 0.05 from h = −2.37 to 1.44: a pair inside comes to rest at its left
    end, a little wrong.
    Raises ``ValueError`` unless β > 0 and 0 < τ ≤ 1 (above 1 the exponential wins where the pair is wrong).
    Source: eq. 5 of Lu et al. 2024 (arXiv 2406.08414).
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")
    margin = _rewards_margin(chosen_log_ratios, rejected_log_ratios, beta)
    # m·exp(−z) in one exponential: its exponent is never above 0, while exp(−z) alone overflows.
    return (logsigmoid(margin / tau) - margin).exp() - (-margin / tau).sigmoid() * logsigmoid(margin)


def apo_down(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    """Anchored preference optimisation for chosen completions that are worse than what the model writes by itself.

        L = σ(β·u_w) + σ(−β·h)

    Both completions go down, the rejected one further. The counterpart, for chosen completions that are better than the
    model's own, is ``pointwise.apo_zero``. Raises ``ValueError`` unless β > 0.
    Source: eq. 8 of D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    margin = _rewards_margin(chosen_log_ratios, rejected_log_ratios, beta)
    return (beta * chosen_log_ratios).sigmoid() + (-margin).sigmoid()


def rpo(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
    chosen_mean_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float,
    alpha: float,
) -> Float[Tensor, "*batch"]:
    """DPO with the mean token NLL of the chosen completion beside it (the loss of iterative RPO).

        L = −log σ(β·h) − α·log π(y_w|x)/|y_w|

    DPO alone may lower the chosen completion's probability as long as the rejected one's falls further; the second term
    pulls against that. ``chosen_mean_logprobs`` is log π(y_w|x)/|y_w|. α = 0 is ``dpo``.
    Raises ``ValueError`` unless β > 0 and α ≥ 0.
    Source: eq. 1 of Pang et al. 2024 (arXiv 2404.19733).
    """
    require_not_negative("alpha", alpha)
    require_same_shape(chosen_log_ratios, chosen_mean_logprobs=chosen_mean_logprobs)
    return dpo(chosen_log_ratios, rejected_log_ratios, beta=beta) - alpha * chosen_mean_logprobs


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


def match_ranks(values: Float[Tensor, " n"], targets: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """For each value the target of the same rank, without gradient: smallest to smallest, largest to largest.

    The optimal transport between two sets of numbers under any convex cost of their difference. It couples the batch:
    take it over all of a step, then cut into micro-batches. Of equal values any order is as good.
    Source: Melnyk et al. 2024 (arXiv 2406.05882).
    """
    require_same_shape(values, targets=targets)
    ranks = values.argsort(stable=True).argsort()
    return targets.detach().sort().values[ranks]


def aot(
    values: Float[Tensor, "*batch"],
    matched: Float[Tensor, "*batch"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*batch"]:
    """Alignment by optimal transport: a distribution is pushed above another, quantile by quantile.

        L_i = −(1 − ε)·log σ(z_i) − ε·log σ(−z_i),   z_i = β·(v_i − m_i),   m = match_ranks(v, targets)

    Paired: v = log π(y_w|x) − log π(y_l|x), the targets are the same under π_ref. Two sides that both move are
    ``aot_unpaired``. The matches take no gradient, so parts of the batch add up to the gradient of the whole.
    Raises ``ValueError`` unless β > 0 and 0 ≤ ε < ½.
    Source: Melnyk et al. 2024 (arXiv 2406.05882), with the logistic loss as the cost.
    """
    return conservative_dpo(values, matched.detach(), beta=beta, label_smoothing=label_smoothing)


def aot_unpaired(
    chosen_log_ratios: Float[Tensor, "*batch"],
    rejected_log_ratios: Float[Tensor, "*batch"],
    *,
    chosen_matched: Float[Tensor, "*batch"],
    rejected_matched: Float[Tensor, "*batch"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*batch"]:
    """AOT of as many chosen completions as rejected ones, of whatever prompts: both sides move.

        L_i = ½·[ ℓ(u_i, m_i) + ℓ(−u'_i, m'_i) ],   m = match_ranks(u, u'),   m' = match_ranks(−u', −u)

    u are the log-ratios of all chosen completions of the step, u' those of the rejected ones, ℓ(v, m) is ``aot``: the
    mean over i is the sorted loss of the paper. Every difference is seen from both of its ends, hence the ½. Its
    gradient is not halved, for at each end it moves that end only, the match being held: so parts of the batch add up
    to the gradient of the whole, whichever chosen and rejected completions they hold.
    Raises ``ValueError`` unless β > 0 and 0 ≤ ε < ½.
    Source: Melnyk et al. 2024 (arXiv 2406.05882), with the logistic loss as the cost.
    """
    require_same_shape(chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    both = aot(chosen_log_ratios, chosen_matched, beta=beta, label_smoothing=label_smoothing)
    both = both + aot(-rejected_log_ratios, rejected_matched, beta=beta, label_smoothing=label_smoothing)
    return both - both.detach() / 2


def wpo_weights(
    token_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    log_collision: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch"]:
    """How much like the policy's own writing a completion is, to weigh the loss of pairs that others wrote.

        w = exp( 1/|y| · Σ_t [ log π(y_t|x, y_<t) − log Σ_v π(v|x, y_<t)² ] )

    ``log_collision`` is the second term: the log-probability that two draws of that token agree. A token drawn from
    the policy weighs 1 on average. A pair weighs the product of its two completions. No gradient; no scored token
    gives 1.
    Source: eq. 2 of Zhou et al. 2024 (arXiv 2406.11827).
    """
    require_same_shape(token_logprobs, mask=mask, log_collision=log_collision)
    aligned = sequence_logprobs((token_logprobs - log_collision).detach(), mask)
    return (aligned / mask.sum(-1).clamp(min=1)).exp()


def length_desensitized_logprobs(
    token_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    shared_lengths: Int[Tensor, "*batch"],
    *,
    alpha: float,
) -> Float[Tensor, "*batch"]:
    """Sequence log-probabilities in which what one completion has beyond the other's length counts α (LD-DPO).

        log π̂(y|x) = Σ_{t≤l} log π(y_t|x, y_<t) + α·Σ_{t>l} log π(y_t|x, y_<t)

    l is ``shared_lengths``, the smaller number of scored tokens of the pair; only scored tokens count. Take it under
    both policies. α = 1 is ``sequence_logprobs``, α = 0 cuts both completions to one length.
    Raises ``ValueError`` unless 0 ≤ α ≤ 1.
    Source: Liu et al. 2024 (arXiv 2409.06411).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    require_same_shape(token_logprobs[..., 0], shared_lengths=shared_lengths)
    shared = mask & (mask.cumsum(-1) <= shared_lengths.unsqueeze(-1))
    return alpha * sequence_logprobs(token_logprobs, mask) + (1 - alpha) * sequence_logprobs(token_logprobs, shared)


def _rewards_margin(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, beta: float) -> Tensor:
    """β·h: by how much the implicit reward of the chosen completion is ahead."""
    require_positive("beta", beta)
    require_same_shape(chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    return beta * (chosen_log_ratios - rejected_log_ratios)


def _saturating(log_ratios: Tensor, alpha: float) -> Tensor:
    """(1 − e^(−αu))/α, exact for small αu; for −αu above ``MAX_EXPONENT`` its tangent there."""
    exponents = -alpha * log_ratios
    bounded = exponents.clamp(max=MAX_EXPONENT)
    return (torch.expm1(bounded) + math.exp(MAX_EXPONENT) * (exponents - bounded)) / -alpha


def _require_noise_rate(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
