"""What several samples of each prompt say: pass@k and means, with intervals that count prompts, not samples.

The samples of one prompt are not independent of each other as samples of different prompts are: a hard prompt is hard
for all of them. What is new with every prompt is the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from trueup.runs.statistics import wilson


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> np.ndarray:
    """The probability that at least one of k samples is correct, estimated for each prompt from n ≥ k samples of it.

        1 − C(n − c, k) / C(n, k)  =  1 − Π_{j=0}^{k−1} (1 − c/(n − j))

    with c of the n correct: the share of all choices of k out of the n that hold a correct one. Unbiased, unlike
    1 − (1 − c/n)^k. The product is taken in logarithms, and 1 minus it without cancellation.

    ``num_samples`` (n), ``num_correct`` (c): [P]. Returns float64 [P]. Raises ``ValueError`` for k < 1, n < k and c
    outside 0 … n. Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    n, c = (np.asarray(each, dtype=np.float64) for each in (num_samples, num_correct))
    if n.shape != c.shape or n.ndim != 1:
        raise ValueError(f"as many counts of samples as of correct ones are needed, not {n.shape} and {c.shape}")
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of every prompt, and k at least 1")
    if ((c < 0) | (c > n)).any():
        raise ValueError("the number of correct samples must lie between 0 and the number of samples")
    log_none = np.zeros_like(n)
    with np.errstate(divide="ignore"):  # log 0: every choice holds a correct one
        for j in range(k):
            log_none += np.log1p(-np.minimum(c / (n - j), 1.0))
    return -np.expm1(log_none)


def pass_at_k_interval(
    num_samples: ArrayLike, num_correct: ArrayLike, k: int, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``pass_at_k`` over the prompts, and its interval: (mean, low, high).

    Wilson's, at the number of independent outcomes that would have the variance of the mean, with s² the variance of
    the P estimates between prompts:

        ñ = P · m(1 − m) / s²        held between P and Σ_p n_p

    P is what it is if every estimate is 0 or 1 (it can't be less), and what is taken where nothing can be measured: one
    prompt, or equal estimates. For k = 1 and as many samples of every prompt this is ``accuracy_interval`` with each
    prompt as a list. Arguments as in ``pass_at_k``; raises ``ValueError`` also for no prompts.
    """
    estimates = pass_at_k(num_samples, num_correct, k)
    if len(estimates) == 0:
        raise ValueError("there must be at least one prompt")
    mean, prompts = float(estimates.mean()), len(estimates)
    variance = float(estimates.var(ddof=1)) if prompts > 1 else 0.0
    count = prompts * mean * (1 - mean) / variance if variance > 0 else prompts
    return wilson(mean, min(max(count, prompts), float(np.sum(num_samples))), level)


def pass_at_k_metrics(num_samples: ArrayLike, num_correct: ArrayLike, ks: Iterable[int]) -> dict[str, float]:
    """``pass@k``, ``pass@k_low`` and ``pass@k_high`` (95 %) for every k in ``ks``. Arguments as in ``pass_at_k``."""
    metrics = {}
    for k in ks:
        names = (f"pass@{k}", f"pass@{k}_low", f"pass@{k}_high")
        metrics |= dict(zip(names, pass_at_k_interval(num_samples, num_correct, k), strict=True))
    return metrics


def mean_interval(
    values: ArrayLike, prompts: ArrayLike | None = None, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the values of all samples, and its interval, whatever the values' range: (mean, low, high).

        ȳ ± t_{P−1} · se,      se² = P/(P − 1) · Σ_p (Σ_{i∈p} (y_i − ȳ))² / N²

    over prompts p = 1 … P with N samples in all; t is Student's quantile of (1 + level)/2. With as many samples of each
    prompt it is the interval of the mean of the prompts' means. The ends are NaN with one prompt, of which nothing can
    be learned about others.

    ``values``: [N]; ``prompts``: [N], equal for samples of one prompt. None: each stands for itself, which gives
    Student's interval of a mean. Raises ``ValueError`` for no values, unequal shapes and a level outside (0, 1).
    Source: ratio estimator over clusters, Cochran 1977, "Sampling Techniques", ch. 6 and 9A.
    """
    from scipy.special import stdtrit  # slow to import, and this module is read by commands that don't need it

    y = np.asarray(values, dtype=np.float64)
    names = np.arange(len(y)) if prompts is None else np.asarray(prompts)
    if y.ndim != 1 or len(y) == 0 or y.shape != names.shape:
        raise ValueError(f"a list of values and the prompt of each are needed, not {y.shape} and {names.shape}")
    if not 0 < level < 1:
        raise ValueError("the level must lie between 0 and 1")
    mean = float(y.mean())
    sums = np.bincount(np.unique(names, return_inverse=True)[1], y - mean)
    if len(sums) == 1:
        return mean, math.nan, math.nan
    error = math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(y)
    half = float(stdtrit(len(sums) - 1, (1 + level) / 2)) * error
    return mean, mean - half, mean + half


def with_interval(name: str, values: ArrayLike, prompts: ArrayLike | None = None) -> dict[str, float]:
    """The mean, and where its 95 % interval begins and ends: ``name``, ``name_low``, ``name_high``."""
    names = (name, f"{name}_low", f"{name}_high")
    return dict(zip(names, mean_interval(values, prompts), strict=True))
