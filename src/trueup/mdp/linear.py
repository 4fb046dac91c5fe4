"""Linear equations of a Markov chain, (I − γ·P) x = b, by whichever way suits the chain's size and structure."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp.tabular import Rows, check_choice

Method = Literal["auto", "dense", "lu", "krylov"]

DENSE_STATES = 500
"""Up to here a dense solution takes 2 ms."""
NARROW = 64
"""A chain that leads at most so far up or down its states has factors that are as narrow."""
ITERATIONS = 300
"""After so many steps of a Krylov method factors are the better bet."""


def solve_chain(
    chain: Rows,
    gamma: float,
    right: Float[np.ndarray, " s"],
    *,
    method: Method = "auto",
    tolerance: float = 1e-12,
) -> Float[np.ndarray, " s"]:
    """x of (I − γ·P) x = b, ``chain`` P [S, S] and ``right`` b [S].

    ``method``: "dense" (LAPACK), "lu" (SuperLU's sparse factors), "krylov" (BiCGSTAB, van der Vorst 1992, until the
    residual ‖b − (I − γP) x‖∞ ≤ ``tolerance`` · max(1, ‖b‖∞)), or "auto": dense for a few hundred states, factors where
    no step leads far, as in chains and small grids, else Krylov, which takes as many steps as it takes the process to
    forget where it began, and factors if these are too many.

    Raises ``DataError`` if the system is singular, or if a Krylov method that was asked for doesn't converge.
    """
    check_choice("method", method, Method)
    if method == "auto":
        method = _suited(chain)
        if method == "krylov":
            found = _krylov(chain, gamma, right, tolerance, ITERATIONS)
            return _factors(chain, gamma, right) if found is None else found
    if method == "dense":
        try:
            return scipy.linalg.solve(np.eye(chain.shape[0]) - gamma * chain.toarray(), right)
        except scipy.linalg.LinAlgError as error:
            raise _singular(error) from error
    if method == "lu":
        return _factors(chain, gamma, right)
    found = _krylov(chain, gamma, right, tolerance, 100 * ITERATIONS)
    if found is None:
        raise DataError(
            f"no residual below {tolerance} after {100 * ITERATIONS} steps of BiCGSTAB", way_out='method="lu"'
        )
    return found


def _suited(chain: Rows) -> Method:
    if chain.shape[0] <= DENSE_STATES:
        return "dense"
    rows = np.repeat(np.arange(chain.shape[0]), np.diff(chain.indptr))
    return "lu" if np.abs(rows - chain.indices).max(initial=0) <= NARROW else "krylov"


def _factors(chain: Rows, gamma: float, right: np.ndarray) -> np.ndarray:
    system = sparse.csc_array(sparse.eye_array(chain.shape[0]) - gamma * chain)
    try:
        return scipy.sparse.linalg.splu(system).solve(right)
    except RuntimeError as error:
        raise _singular(error) from error


def _singular(error: Exception) -> DataError:
    return DataError(
        f"the chain's equations have no single solution: {error}", way_out="gamma < 1, or a chain that ends"
    )


def _krylov(chain: Rows, gamma: float, right: np.ndarray, tolerance: float, most: int) -> np.ndarray | None:
    """The solution, or None if it takes more than ``most`` steps. Restarted from what it has where rounding makes the
    method's own idea of the residual wrong."""
    system: Any = scipy.sparse.linalg.aslinearoperator(sparse.eye_array(chain.shape[0]) - gamma * chain)
    wanted = tolerance * max(1.0, np.abs(right).max(initial=0.0))
    x, steps = np.zeros_like(right), 0

    def count(_: np.ndarray) -> None:
        nonlocal steps
        steps += 1

    while np.abs(residual := right - system @ x).max(initial=0.0) > wanted:
        if steps >= most:
            return None
        # The largest entry is at most the Euclidean norm, which is what the method stops at.
        correction, _ = scipy.sparse.linalg.bicgstab(
            system, residual, rtol=0.0, atol=wanted, maxiter=most - steps, callback=count
        )
        steps += 1
        if not np.isfinite(correction).all():
            return None
        x += correction
    return x
