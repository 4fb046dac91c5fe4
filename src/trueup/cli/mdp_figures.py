"""Pictures of what ``trueup mdp`` finds: convergence with bands over runs, maps and bars of values."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueup.cli.mdp_process import write
from trueup.errors import require_extra

if TYPE_CHECKING:
    import numpy as np

    from trueup.mdp import TabularMDP

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito's, which people who see few colours can tell apart; dashes tell them apart in grey."""
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "trueup",  # the same picture is the same file
}
GREY, START = "#d9d9d9", "#D55E00"
BAND = (0.25, 0.5, 0.75)
NUM_POINTS = 20
"""Of a curve: evenly on the logarithmic axis, where evenly spaced looks would crowd at its end."""
MOST_BARS = 60
MOST_CELLS_WITH_TEXT = 200


@dataclass(frozen=True, eq=False, kw_only=True)
class Curve:
    """What each of R runs had at each of E looks: ``values`` [E, R] after ``steps`` [E]."""

    label: str
    place: int
    """Says which colour and dashes: the same ones in all panels."""
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class Panel:
    """Curves that share their axes, and the exact answer where it is a level of theirs."""

    title: str
    y_label: str
    curves: Sequence[Curve]
    exact: float | None = None
    exact_label: str = "exact"
    linear_up_to: float | None = None
    """On a linear axis, by default; otherwise logarithmic on both sides of what lies within this distance of 0."""


def convergence(panels: Sequence[Panel], *, title: str, num_runs: int) -> Any:
    """One above the other: medians of the runs, with bands that hold the middle half of them."""
    with style():
        figure = new_figure(8.0, 0.6 + 2.9 * len(panels))
        figure.suptitle(f"{title}\nmedian and middle half of {num_runs} runs", fontsize=11)
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            draw_panel(axes, panel)
        rows[-1].set_xlabel("steps of a run")
    return figure


def draw_panel(axes: Any, panel: Panel) -> None:
    import numpy as np

    axes.set_title(panel.title, loc="left")
    axes.set_ylabel(panel.y_label)
    for curve in panel.curves:
        colour, dashes = COLOURS[curve.place], DASHES[curve.place]
        shown = np.unique(np.geomspace(1, len(curve.steps), NUM_POINTS).round().astype(int)) - 1
        steps = curve.steps[shown]
        low, middle, high = np.quantile(curve.values[shown], BAND, axis=1)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, middle, color=colour, linestyle=dashes, linewidth=1.6, label=curve.label)
    if panel.exact is not None:
        axes.axhline(panel.exact, color="black", linewidth=1, label=panel.exact_label, zorder=1)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    if panel.linear_up_to == 0 and any((curve.values > 0).any() for curve in panel.curves):
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    elif panel.linear_up_to:
        axes.set_yscale("symlog", linthresh=panel.linear_up_to)
        axes.yaxis.set_major_formatter("{x:,g}")
        low, high = axes.dataLim.intervaly
        axes.set_ylim(low - 0.4 * abs(low), high + 0.4 * abs(high))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, handlelength=2.6)


def plain_numbers(axis: Any) -> None:
    """On a logarithmic axis, and the more of them to a decade the fewer decades there are."""
    ticker: Any = require_extra("matplotlib.ticker", "plots")
    low, high = axis.get_view_interval()
    if high < 300 * low:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high > 6 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def grid(
    mdp: TabularMDP,
    values: np.ndarray,
    actions: np.ndarray | None,
    over: np.ndarray,
    columns: int,
    symbols: str,
    *,
    title: str,
) -> Any:
    """A map: colours and numbers are values, symbols the policy's actions. ``over`` [S]: cells that are left grey."""
    import numpy as np

    patches: Any = require_extra("matplotlib.patches", "plots")
    rows = mdp.num_states // columns
    num_cells = rows * columns
    cells = np.ma.masked_array(values[:num_cells], over[:num_cells]).reshape(rows, columns)
    size = min(0.8, 16 / columns)
    with style():
        figure = new_figure(size * columns + 1.8, size * rows + 1.4)
        axes = figure.add_subplot()
        axes.set_facecolor(GREY)
        image = axes.imshow(cells, cmap="viridis")
        figure.suptitle(title, fontsize=10.5, wrap=True)
        axes.set(xlabel="column", ylabel="row")
        for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
            axis.set_ticks(range(0, count, 1 + count // 20))
            axis.set_ticks(np.arange(count + 1) - 0.5, minor=True)
        axes.tick_params(which="both", length=0)
        axes.grid(visible=False)
        axes.grid(which="minor", color="white", alpha=1, linewidth=0.8)
        axes.spines[:].set_visible(False)
        beside = axes.inset_axes((1 + 0.3 / columns, 0, 0.25 / columns, 1))
        figure.colorbar(image, cax=beside, label="value V(s)")
        begins = (mdp.start > 0) & ~over
        if begins.sum() > 0.2 * (~over).sum():
            begins[:] = False  # nearly everywhere is no place to mark
        for state in np.flatnonzero(begins[:num_cells]):
            row, column = divmod(state, columns)
            frame = patches.Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor=START, linewidth=2)
            axes.add_patch(frame)
        if num_cells <= MOST_CELLS_WITH_TEXT:
            write_cells(axes, image, cells, actions, symbols)
        named = [patches.Patch(facecolor="none", edgecolor=START, linewidth=2, label="start")] * bool(begins.any())
        named += [patches.Patch(facecolor=GREY, label="the end, or a wall")] * bool(over[:num_cells].any())
        if named:
            figure.legend(handles=named, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def write_cells(axes: Any, image: Any, cells: np.ma.MaskedArray, actions: np.ndarray | None, symbols: str) -> None:
    """Action and value into every cell that has a value, dark on light and light on dark."""
    import numpy as np

    red_green_blue = np.array([0.299, 0.587, 0.114])  # how bright each looks (Rec. 601)
    for state in np.flatnonzero(~np.ma.getmaskarray(cells)):
        row, column = divmod(int(state), cells.shape[1])
        colour = "black" if image.to_rgba(cells[row, column])[:3] @ red_green_blue > 0.5 else "white"
        place = {"color": colour, "ha": "center", "va": "center"}
        if actions is not None:
            axes.text(column, row - 0.15, symbols[actions[state]], fontsize=15, **place)
        axes.text(
            column,
            row + 0.28 * (actions is not None),
            f"{cells[row, column]:.2f}".replace("-", "−"),
            fontsize=8,
            **place,
        )


def bars(mdp: TabularMDP, values: np.ndarray, actions: np.ndarray | None, *, title: str) -> Any:
    """A bar for each state, coloured by its action; points where there are many."""
    import numpy as np

    states = np.arange(mdp.num_states)
    with style():
        figure = new_figure(7.0, 3.6)
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
        axes.set_xlabel("state")
        axes.set_ylabel("value V(s)")
        axes.grid(visible=False, axis="x")
        if len(states) > MOST_BARS:
            axes.plot(states, values, ".", color=COLOURS[0], markersize=3)
        elif actions is None or not 1 < mdp.num_actions <= len(COLOURS):
            axes.bar(states, values, color=COLOURS[0])
        else:
            for action in np.unique(actions[~mdp.terminal]):
                chosen = (actions == action) & ~mdp.terminal
                axes.bar(states[chosen], values[chosen], color=COLOURS[action], label=f"action {action}")
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def style() -> Any:
    return require_extra("matplotlib", "plots").rc_context(STYLE)


def new_figure(width: float, height: float) -> Any:
    """In inches. Without pyplot: no window system, no global state."""
    return require_extra("matplotlib.figure", "plots").Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, file: str) -> None:
    """Write the picture in the form that its ending says, and say so."""
    content = io.BytesIO()
    # No date inside: the same picture is the same file.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(file).suffix)
    with style():
        figure.savefig(content, format=Path(file).suffix[1:], dpi=160, bbox_inches="tight", metadata=metadata)
    write(file, content.getvalue(), "--figure")
    print(f"\npicture: {file}")
