"""Pictures: files of the right kind, the same bytes for the same picture, and what is drawn in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trueup.cli import mdp_figures
from trueup.mdp import exact
from trueup.mdp.generators import CLIFF, garnet, grid_world, random_walk

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
WORLD = grid_world(CLIFF, gamma=0.9)
VALUES = exact.values(WORLD, np.full((48, 4), 0.25))


def curve(values: np.ndarray, place: int = 0) -> mdp_figures.Curve:
    return mdp_figures.Curve(label=f"method {place}", place=place, steps=np.arange(1, len(values) + 1), values=values)


@pytest.mark.parametrize("ending", MAGIC)
def test_files(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = []
    for name in ("once", "again"):
        figure = mdp_figures.bars(WORLD, VALUES, None, title="cliff")
        mdp_figures.save(figure, str(tmp_path / "new" / f"{name}{ending}"))
        contents.append((tmp_path / "new" / f"{name}{ending}").read_bytes())
    assert contents[0].startswith(MAGIC[ending])
    assert len(contents[0]) > 2000
    assert contents[0] == contents[1]
    assert "picture: " in capsys.readouterr().out


def test_medians_and_the_middle_half() -> None:
    values = np.array([[1.0, 2, 3, 4, 100], [1, 2, 2, 2, 50]])
    panel = mdp_figures.Panel(title="t", y_label="distance", curves=[curve(values)], exact=2.5, exact_label="truth")
    figure = mdp_figures.convergence([panel], title="walk", num_runs=5)
    (axes,) = figure.axes
    middle, level = axes.lines
    assert middle.get_ydata().tolist() == [3, 2]
    assert level.get_ydata() == [2.5, 2.5]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (2, 4)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["method 0", "truth"]
    assert axes.get_xlabel() == "steps of a run"
    assert axes.get_ylabel() == "distance"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert "middle half of 5 runs" in figure.get_suptitle()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "linear_up_to", "scale"), [(1.0, 0, "log"), (0.0, 0, "linear"), (-50.0, 13.0, "symlog")]
)
def test_scales(values: float, linear_up_to: float, scale: str, tmp_path: Path) -> None:
    """A logarithmic axis needs something above 0 to show; without it the axis stays linear, and no warning is heard."""
    panels = [
        mdp_figures.Panel(
            title="t", y_label="y", curves=[curve(np.full((30, 4), values), 3)], linear_up_to=linear_up_to
        )
    ] * 2
    figure = mdp_figures.convergence(panels, title="t", num_runs=4)
    mdp_figures.save(figure, str(tmp_path / "scales.png"))
    assert [axes.get_yscale() for axes in figure.axes] == [scale] * 2
    assert figure.axes[0].lines[0].get_color() == mdp_figures.COLOURS[3]
    assert len(figure.axes[0].lines[0].get_xdata()) <= mdp_figures.NUM_POINTS


def test_a_map() -> None:
    policy = np.full(48, 1)
    over = WORLD.terminal
    figure = mdp_figures.grid(WORLD, VALUES, policy, over, 12, "^>v<", title="cliff")
    axes = figure.axes[0]
    written = [text.get_text() for text in axes.texts]
    assert written.count(">") == 37
    assert len(written) == 2 * 37
    assert f"{VALUES[0]:.2f}".replace("-", "−") in written
    (start,) = axes.patches
    assert start.get_xy() == (-0.45, 2.55)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["start", "the end, or a wall"]
    alone = mdp_figures.grid(WORLD, VALUES, None, over, 12, "", title="cliff")
    assert len(alone.axes[0].texts) == 37


def test_bars_and_points() -> None:
    policy = np.arange(48) % 2
    by_action = mdp_figures.bars(WORLD, VALUES, policy, title="cliff").axes[0]
    assert len(by_action.patches) == 37
    assert [text.get_text() for text in by_action.get_legend().get_texts()] == ["action 0", "action 1"]
    walk = random_walk(5)
    nothing_to_decide = mdp_figures.bars(walk, np.arange(7.0), np.zeros(7, dtype=int), title="walk").axes[0]
    assert [bar.get_height() for bar in nothing_to_decide.patches] == list(range(7))
    many = garnet(0, num_states=80, num_actions=2, num_successors=2, gamma=0.9)
    points = mdp_figures.bars(many, np.arange(80.0), None, title="garnet").axes[0].lines[0]
    assert points.get_ydata().tolist() == list(range(80))
    assert points.get_linestyle() == "None"
