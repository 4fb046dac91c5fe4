"""One score from several reward models. Pure functions on [models, completions].

A policy that is trained against one model finds what that model takes for good by mistake; several models rarely make
the same mistake, and where they disagree caution is in place. Each model's scores must be on one scale beforehand,
because comparisons leave the zero of each open: the lowest of three would else always be the one whose zero lies lowest
(see ``normalization``). Models that share a pre-trained trunk share mistakes too, and no rule here finds those.

Sources: Coste et al. 2023 (arXiv 2310.02743) for mean, worst case and variance penalty; Eisenstein et al. 2023 (arXiv
2312.09244) for what ensembles don't cure.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def ensemble_mean(scores: ArrayLike) -> np.ndarray:
    """[M, C] → [C]: the mean over the models. Raises ``ValueError`` for another shape, or no model."""
    return _checked(scores).mean(0)


def ensemble_std(scores: ArrayLike) -> np.ndarray:
    """[M, C] → [C]: √(1/M Σ_m (r_m − r̄)²), how far the models disagree; 0 for a single one.

    It describes these M models and divides by M. Raises ``ValueError`` as ``ensemble_mean``.
    """
    return _checked(scores).std(0)


def worst_case(scores: ArrayLike) -> np.ndarray:
    """[M, C] → [C]: min_m r_m, what the least convinced model says. Raises ``ValueError`` as ``ensemble_mean``."""
    return _checked(scores).min(0)


def mean_minus_std(scores: ArrayLike, coef: float = 1.0) -> np.ndarray:
    """[M, C] → [C]: r̄ − coef · std, in units of the score. Raises ``ValueError`` as ``ensemble_mean``."""
    return ensemble_mean(scores) - coef * ensemble_std(scores)


def mean_minus_variance(scores: ArrayLike, coef: float = 1.0) -> np.ndarray:
    """[M, C] → [C]: r̄ − coef · std², the uncertainty-weighted score of Coste et al.; ``coef`` is in 1/score.

    It forgives small disagreement and punishes large more than ``mean_minus_std``. Raises ``ValueError`` as
    ``ensemble_mean``.
    """
    return ensemble_mean(scores) - coef * ensemble_std(scores) ** 2


AGGREGATES: dict[str, Callable[[ArrayLike, float], np.ndarray]] = {
    "mean": lambda scores, coef: ensemble_mean(scores),
    "min": lambda scores, coef: worst_case(scores),
    "mean_minus_std": mean_minus_std,
    "mean_minus_variance": mean_minus_variance,
}
"""By name, each with the coefficient that some of them read."""


def _checked(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) == 0:
        raise ValueError(f"scores must be of shape [models, completions], with a model at least, not {scores.shape}")
    return scores
