"""``trueup mdp``: what is true of a known process, as tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trueup.errors import DataError, SettingsError
from trueup.runs.settings import check_choices, check_range, check_used

if TYPE_CHECKING:
    import numpy as np

    from trueup.mdp import TabularMDP

BUILT_IN = ("chain", "random-walk", "cliff")
GYMNASIUM = "gymnasium:"


@dataclass(frozen=True, kw_only=True)
class SolveSettings:
    """Values and the best policy of a process that is known, with a bound on the error."""

    process: str = ""
    """A file (.npz or .json), gymnasium:NAME for a toy-text environment such as gymnasium:FrozenLake-v1, or a classic:
    chain (seven states of Easy-RL), random-walk, cliff (both of Sutton & Barto)."""
    gamma: float | None = None
    """Discount; by default the file's, for a classic its own, for Gymnasium 0.99."""
    policy: Literal["optimal", "uniform"] = "optimal"
    """Whose values: the best policy's, which is looked for, or those of acting at random."""
    method: Literal["modified", "value", "policy", "linear"] = "modified"
    """How the best policy is found: modified policy iteration, value iteration, policy iteration, linear program."""
    tolerance: float = 1e-6
    """With modified and value: no value is further than this from the truth."""
    columns: int | None = None
    """Show states as a map with this many columns, in place of a list."""
    symbols: str = "↑→↓←"
    """With --columns: a character for each action. Gymnasium's FrozenLake has ←↓→↑."""
    rows: int = 20
    """Rows of the list that are shown."""
    output: str = ""
    """File for all values, actions and their values (.csv); none by default."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "gamma", at_least=0, at_most=1)
        check_range(self, "tolerance", above=0)
        check_range(self, "columns", at_least=1)
        check_range(self, "rows", at_least=1)
        check_used(self, self.columns is not None, "--columns", "symbols")
        check_used(self, self.policy == "optimal", "--policy optimal", "method", "tolerance")
        if not self.process:
            raise SettingsError("which process?", where="--process", way_out=f"a file, or {', '.join(BUILT_IN)}")


def solve(settings: SolveSettings) -> None:
    """Print the table or map, and what it took. Raises ``DataError`` for what is no process."""
    import numpy as np

    from trueup.mdp import exact, planning

    mdp = process_of(settings.process, settings.gamma)
    print(
        f"{settings.process}: {mdp.num_states:,} states, {mdp.num_actions} actions, "
        f"{mdp.transitions.nnz:,} transitions, gamma {mdp.gamma:g}"
    )
    if settings.policy == "uniform":
        policy: Any = np.full((mdp.num_states, mdp.num_actions), 1 / mdp.num_actions)
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
        show_map(mdp, values, actions, settings.columns, settings.symbols)
    if settings.output:
        write_table(mdp, values, actions, Path(settings.output))
        print(f"\nall of it: {settings.output}")


def process_of(name: str, gamma: float | None) -> TabularMDP:
    """What ``--process`` means."""
    from trueup.mdp import generators
    from trueup.mdp.files import load_mdp

    if name.startswith(GYMNASIUM):
        return gymnasium_process(name.removeprefix(GYMNASIUM), 0.99 if gamma is None else gamma)
    if name == "chain":
        return generators.chain([5, 0, 0, 0, 0, 0, 10], left=0.4, right=0.4, gamma=0.5 if gamma is None else gamma)
    if name == "random-walk":
        return generators.random_walk(gamma=1.0 if gamma is None else gamma)
    if name == "cliff":
        return generators.grid_world(generators.CLIFF, gamma=1.0 if gamma is None else gamma)
    if not Path(name).suffix:
        raise DataError(
            f"there is no process {name!r}", way_out=f"a file (.npz, .json), {GYMNASIUM}NAME, or {', '.join(BUILT_IN)}"
        )
    return load_mdp(name, gamma=gamma)


def gymnasium_process(name: str, gamma: float) -> TabularMDP:
    from trueup.mdp.outcomes import from_gymnasium

    try:
        import gymnasium
    except ImportError as error:
        raise DataError(f"{name} needs the package gymnasium", way_out="pip install 'gymnasium>=1.0'") from error
    try:
        environment: Any = gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise DataError(str(error), where=f"{GYMNASIUM}{name}") from error
    return from_gymnasium(environment, gamma=gamma)


def show_list(mdp: TabularMDP, values: np.ndarray, actions: np.ndarray | None, most: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("state", box=box.SIMPLE_HEAD)
    for name in ("value", *(() if actions is None else ("action",))):
        table.add_column(name, justify="right")
    for state in range(min(most, mdp.num_states)):
        action = () if actions is None else ("end" if mdp.terminal[state] else str(actions[state]),)
        table.add_row(str(state), f"{values[state]:.4f}", *action)
    Console(highlight=False).print(table)
    if mdp.num_states > most:
        print(f"… and {mdp.num_states - most:,} more states (--rows, --output)")


def show_map(mdp: TabularMDP, values: np.ndarray, actions: np.ndarray | None, columns: int, symbols: str) -> None:
    """States row by row. A last state that doesn't fill a row, such as Gymnasium's added end, is left out."""
    if len(symbols) < mdp.num_actions and actions is not None:
        raise SettingsError(
            f"{len(symbols)} symbols for {mdp.num_actions} actions", where="--symbols", way_out="one for each action"
        )
    whole = mdp.num_states // columns * columns
    if not whole:
        raise SettingsError(f"{columns} columns for {mdp.num_states} states", where="--columns")
    cells = [f"{value:.2f}" for value in values[:whole]]
    width = max(map(len, cells))
    for first in range(0, whole, columns):
        places = range(first, first + columns)
        line = "  ".join("·".rjust(width) if mdp.terminal[place] else cells[place].rjust(width) for place in places)
        way = "" if actions is None else "".join("·" if mdp.terminal[s] else symbols[actions[s]] for s in places)
        print(f"{line}    {way}".rstrip())


def write_table(mdp: TabularMDP, values: np.ndarray, actions: np.ndarray | None, file: Path) -> None:
    """state, value, action, and the value of each action."""
    import csv

    from trueup.mdp import exact

    q = exact.values_of_actions(mdp, values)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["state", "value", "action", *(f"q_{action}" for action in range(mdp.num_actions))])
        for state in range(mdp.num_states):
            action = "" if actions is None or mdp.terminal[state] else int(actions[state])
            writer.writerow([state, repr(float(values[state])), action, *map(repr, q[state].tolist())])
