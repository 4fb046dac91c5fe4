"""``trueup mdp solve``: what is true of a known process, as tables and pictures."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trueup.cli import mdp_figures
from trueup.cli.mdp_process import ProcessSettings, begin, uniform, write
from trueup.cli.tables import show, table_of
from trueup.errors import SettingsError
from trueup.runs.settings import check_range, check_used

if TYPE_CHECKING:
    import numpy as np

    from trueup.mdp import TabularMDP


@dataclass(frozen=True, kw_only=True)
class SolveSettings(ProcessSettings):
    """Values and the best policy of a process that is known, with a bound on the error."""

    policy: Literal["optimal", "uniform"] = "optimal"
    """Whose values: the best policy's, which is looked for, or those of acting at random."""
    method: Literal["modified", "value", "policy", "linear"] = "modified"
    """How the best policy is found: modified policy iteration, value iteration, policy iteration, linear program."""
    tolerance: float = 1e-6
    """With modified and value: no value is further than this from the truth."""
    columns: int | None = None
    """Show states as a map with this many columns, in place of a list."""
    symbols: str = "↑→↓←"
    """With --columns: a character for each action. Gymnasium's FrozenLake has ←↓→↑, its CliffWalking ↑→↓←."""
    rows: int = 20
    """Rows of the list that are shown."""
    output: str = ""
    """File for all values, actions and their values (.csv); none by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "tolerance", above=0)
        check_range(self, "columns", at_least=1)
        check_range(self, "rows", at_least=1)
        check_used(self, self.columns is not None, "--columns", "symbols")
        check_used(self, self.policy == "optimal", "--policy optimal", "method", "tolerance")


def solve(settings: SolveSettings) -> None:
    """Print the table or map, and what it took. Raises ``DataError`` for what is no process."""
    import numpy as np

    from trueup.mdp import exact, planning

    mdp = begin(settings)
    if settings.policy == "uniform":
        policy = uniform(mdp)
        values, actions = exact.values(mdp, policy), None
        print(f"acting at random; residual of Bellman's equation {exact.bellman_residual(mdp, policy, values):.1e}")
    else:
        planners: dict[str, Any] = {
            "modified": lambda: planning.modified_policy_iteration(mdp, tolerance=settings.tolerance),
            "value": lambda: planning.value_iteration(mdp, tolerance=settings.tolerance),
            "policy": lambda: planning.policy_iteration(mdp),
            "linear": lambda: planning.linear_program(mdp),
        }
        found = planners[settings.method]()
        values, actions = found.values, found.policy
        bound = (
            f"residual {found.residual:.1e}, no bound without a discount"
            if np.isnan(found.error)
            else f"values are off by at most {found.error:.1e}, the policy loses at most {found.regret:.1e}"
        )
        print(f"{found.sweeps} {'sweep' if found.sweeps == 1 else 'sweeps'} over all actions; {bound}")
    print(f"expected return from the start: {mdp.start @ values:.6g}\n")
    if settings.columns is None:
        show_list(mdp, values, actions, settings.rows)
    else:
        show_map(mdp, values, actions, over(mdp), settings.columns, settings.symbols)
    if settings.output:
        write(settings.output, as_csv(mdp, values, actions), "--output")
        print(f"\nall of it: {settings.output}")
    if settings.figure:
        whose = "acting at random" if actions is None else "the best policy"
        title = f"{settings.process}, γ = {mdp.gamma:g}: values of {whose}"
        if settings.columns is None:
            figure = mdp_figures.bars(mdp, values, actions, title=title)
        else:
            figure = mdp_figures.grid(mdp, values, actions, over(mdp), settings.columns, settings.symbols, title=title)
        mdp_figures.save(figure, settings.figure)


def show_list(mdp: TabularMDP, values: np.ndarray, actions: np.ndarray | None, most: int) -> None:
    table = table_of("state", "value", *(() if actions is None else ("action",)))
    for state in range(min(most, mdp.num_states)):
        action = () if actions is None else ("end" if mdp.terminal[state] else str(actions[state]),)
        table.add_row(str(state), f"{values[state]:.4f}", *action)
    show(table)
    if mdp.num_states > most:
        print(f"… and {mdp.num_states - most:,} more states (--rows, --output)")


def over(mdp: TabularMDP) -> np.ndarray:
    """Cells of a map in which nothing is left to win or to lose: bool [S]. Terminal ones, and those like the holes of
    Gymnasium's FrozenLake, whose every action earns nothing and ends."""
    goes_on = mdp.expected_next((~mdp.terminal).astype(float)) > 0
    return ~(goes_on | (mdp.expected_rewards != 0)).any(-1)


def show_map(
    mdp: TabularMDP,
    values: np.ndarray,
    actions: np.ndarray | None,
    over: np.ndarray,
    columns: int,
    symbols: str,
) -> None:
    """States row by row. A last state that doesn't fill a row, such as Gymnasium's added end, is left out."""
    if len(symbols) < mdp.num_actions and actions is not None:
        raise SettingsError(
            f"{len(symbols)} symbols for {mdp.num_actions} actions", where="--symbols", way_out="one for each action"
        )
    whole = mdp.num_states // columns * columns
    if not whole:
        raise SettingsError(f"{columns} columns for {mdp.num_states} states", where="--columns")
    cells = ["·" if over[state] else f"{values[state]:.2f}" for state in range(whole)]
    ways = ["·" if over[state] or actions is None else symbols[actions[state]] for state in range(whole)]
    width = max(map(len, cells))
    for first in range(0, whole, columns):
        row = slice(first, first + columns)
        way = "" if actions is None else "".join(ways[row])
        print(f"{'  '.join(cell.rjust(width) for cell in cells[row])}    {way}".rstrip())


def as_csv(mdp: TabularMDP, values: np.ndarray, actions: np.ndarray | None) -> bytes:
    """state, value, action, and the value of each action."""
    from trueup.mdp import exact

    q = exact.values_of_actions(mdp, values)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["state", "value", "action", *(f"q_{action}" for action in range(mdp.num_actions))])
    for state in range(mdp.num_states):
        action = "" if actions is None or mdp.terminal[state] else int(actions[state])
        writer.writerow([state, repr(float(values[state])), action, *map(repr, q[state].tolist())])
    return text.getvalue().encode()
