"""What ``trueup mdp estimate`` found, as tables and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trueup.cli import mdp_figures
from trueup.cli.tables import rounded, show, table_of

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from trueup.mdp.estimation import Learned


@dataclass(frozen=True, eq=False, kw_only=True)
class Estimated:
    """What the runs of one method say of [K] numbers, and what these are."""

    learned: Learned
    truth: np.ndarray
    num_episodes: int | None
    """Of each run, where a method takes whole ones."""

    @property
    def distances(self) -> np.ndarray:
        """Root mean squared over the numbers, at each look in each run: [E, R]."""
        return self.learned.distances(self.truth)


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Estimates by method: of states' values, and of the expected return."""

    of_states: Mapping[str, Estimated]
    of_returns: Mapping[str, Estimated]
    num_runs: int
    of_whom: str
    by_whom: str

    def show(self, acted: np.ndarray, most_states: int) -> None:
        """Print all tables; one of single states if there are no more than so many."""
        if self.of_states:
            show(self.distances())
            print("±: standard error. A mean further off than twice its standard error: the method is biased so far.\n")
            if acted.sum() <= most_states:
                show(self.values(acted))
        if self.of_returns:
            show(self.returns())
            print("±: standard error of the mean over runs, far too small where next to no episodes are effective")

    def distances(self) -> Table:
        import numpy as np

        (num_states,) = next(iter(self.of_states.values())).truth.shape
        table = table_of(
            *("method", "steps", "episodes", "one run", f"mean of {self.num_runs} runs", "its standard error"),
            title=f"distance to the exact values of {num_states} states, root mean square",
        )
        for method, each in self.of_states.items():
            of_runs = each.distances[-1]
            table.add_row(
                *spent(method, each),
                f"{of_runs.mean():.4g} ± {rounded(of_runs.std(ddof=1) / math.sqrt(self.num_runs))}",
                f"{np.sqrt(((each.learned.mean - each.truth) ** 2).mean()):.4g}",
                rounded(np.sqrt((each.learned.errors**2).mean())),
            )
        return table

    def values(self, acted: np.ndarray) -> Table:
        import numpy as np

        table = table_of("state", "exact", *self.of_states, title="values, ± standard error of the mean over runs")
        columns = [each.learned for each in self.of_states.values()]
        truth = next(iter(self.of_states.values())).truth
        for place, state in enumerate(np.flatnonzero(acted)):
            estimates = (f"{each.mean[place]:.4f} ± {each.errors[place]:.4f}" for each in columns)
            table.add_row(str(state), f"{truth[place]:.4f}", *estimates)
        return table

    def returns(self) -> Table:
        from trueup.mdp.convergence import LearnedReturns

        table = table_of(
            *("method", "steps", "episodes", "estimate", "one run's distance", "effective episodes"),
            title=f"expected return of {self.of_whom}, {self.by_whom}",
        )
        for method, each in self.of_returns.items():
            learned = each.learned
            effective = learned.effective_episodes.mean() if isinstance(learned, LearnedReturns) else math.nan
            table.add_row(
                *spent(method, each),
                f"{learned.mean[0]:.5g} ± {rounded(learned.errors[0])}",
                f"{each.distances[-1].mean():.4g}",
                f"{effective:.3g}",
            )
        table.add_row("exact", "", "", f"{self.exact_return:.5g}")
        return table

    @property
    def exact_return(self) -> float:
        return float(next(iter(self.of_returns.values())).truth[0])

    def figure(self, title: str) -> Any:
        panels = []
        if self.of_states:
            panels.append(
                mdp_figures.Panel(
                    title="Values of states",
                    y_label="distance to the exact values (RMS)",
                    curves=curves(self.of_states, lambda each: each.distances),
                    linear_up_to=0,
                )
            )
        if self.of_returns:
            panels.append(
                mdp_figures.Panel(
                    title=f"Return from the start, {self.by_whom}",
                    y_label="estimated return",
                    curves=curves(self.of_returns, lambda each: each.learned.curve[:, :, 0]),
                    exact=self.exact_return,
                )
            )
        return mdp_figures.convergence(panels, title=title, num_runs=self.num_runs)


def curves(found: Mapping[str, Estimated], values: Callable[[Estimated], np.ndarray]) -> list[mdp_figures.Curve]:
    return [
        mdp_figures.Curve(label=method, place=place, steps=each.learned.steps, values=values(each))
        for place, (method, each) in enumerate(found.items())
    ]


def spent(method: str, each: Estimated) -> tuple[str, str, str]:
    episodes = "" if each.num_episodes is None else f"{each.num_episodes:,}"
    return method, f"{each.learned.steps[-1]:,}", episodes
