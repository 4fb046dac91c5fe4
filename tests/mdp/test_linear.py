"""Every way of solving a chain's equations against the plain one; which is taken; what can't be solved."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from trueup.errors import DataError
from trueup.mdp import linear
from trueup.mdp.generators import chain, garnet
from trueup.mdp.linear import solve_chain
from trueup.mdp.tabular import chain_of


def chains() -> dict[str, sparse.csr_array]:
    narrow = chain(np.arange(700.0).tolist(), left=0.3, right=0.5, gamma=0.9)
    random = garnet(0, num_states=600, num_actions=2, num_successors=5, gamma=0.9)
    return {
        "narrow": chain_of(narrow, np.zeros(700, dtype=int))[0],
        "random": chain_of(random, np.full((600, 2), 0.5))[0],
    }


CHAINS = chains()


@pytest.mark.parametrize("method", ["auto", "lu", "krylov"])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("name", CHAINS)
def test_all_ways_give_the_same(name: str, gamma: float, method: linear.Method) -> None:
    steps = CHAINS[name]
    right = np.random.default_rng(0).normal(size=steps.shape[0])
    expected = np.linalg.solve(np.eye(len(right)) - gamma * steps.toarray(), right)
    np.testing.assert_allclose(solve_chain(steps, gamma, right, method=method), expected, rtol=0, atol=1e-8)


def test_the_way_suits_the_chain() -> None:
    suited = {name: linear._suited(steps) for name, steps in CHAINS.items()}
    assert suited == {"narrow": "lu", "random": "krylov"}
    assert linear._suited(CHAINS["random"][:10, :10]) == "dense"


def test_factors_are_taken_where_a_krylov_method_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = CHAINS["random"]
    right = np.random.default_rng(0).normal(size=steps.shape[0])
    expected = solve_chain(steps, 0.999, right, method="lu")
    monkeypatch.setattr(linear, "ITERATIONS", 2)
    np.testing.assert_allclose(solve_chain(steps, 0.999, right), expected, rtol=0, atol=1e-8)
    monkeypatch.setattr(linear, "ITERATIONS", 0)
    with pytest.raises(DataError, match="no residual below"):
        solve_chain(steps, 0.999, right, method="krylov")


@pytest.mark.parametrize("method", ["dense", "lu"])
def test_what_has_no_single_solution_is_said(method: linear.Method) -> None:
    loop = sparse.csr_array(np.eye(2)[[1, 0]])
    with pytest.raises(DataError, match="no single solution"):
        solve_chain(loop, 1.0, np.ones(2), method=method)


def test_nothing_to_earn_is_worth_nothing() -> None:
    steps = CHAINS["random"]
    assert not solve_chain(steps, 0.9, np.zeros(steps.shape[0]), method="krylov").any()


def test_a_method_that_there_is_not() -> None:
    with pytest.raises(DataError, match="method"):
        solve_chain(CHAINS["random"], 0.9, np.ones(CHAINS["random"].shape[0]), method="LU")  # type: ignore[arg-type]
