"""A recipe is a row of the table, and what is new about it a function: the loop stays as it is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trueup import rl
from trueup.models.scratch import make_model
from trueup.recipes import RECIPES, Recipe
from trueup.runs.folder import read_metrics
from trueup.trainers import policy
from trueup.trainers.algorithms import Learned
from trueup.trainers.experience import Experience
from trueup.trainers.policy_settings import PolicySettings


def ranks(x: Experience, settings: PolicySettings) -> Tensor:
    """A made-up advantage: the place in the group, from −1 for the worst to 1 for the best."""
    places = x.totals.argsort(-1).argsort(-1).float()
    return x.spread(2 * places / (x.group_size - 1) - 1)


def soft_clipped(x: Learned, settings: PolicySettings) -> Tensor:
    """A made-up surrogate: the ratio is bent, not cut."""
    return -x.advantages * settings.clip_high * torch.tanh((x.ratio - 1) / settings.clip_high)


def test_a_made_up_recipe_is_a_function_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model(tmp_path / "model", characters="01", hidden_size=16, num_layers=1, num_heads=2)
    row = Recipe(
        summary="the place in the group, softly clipped",
        source="made up",
        advantages=ranks,
        surrogate=soft_clipped,
        reduce="token_mean",
        traits={"smallest_group": 2},
        settings={"group_size": 4, "clip_high": 0.3},
    )
    monkeypatch.setitem(RECIPES, "ranks", row)
    rl(
        recipe="ranks",
        model=str(model),
        data=[{"prompt": "0"}, {"prompt": "1"}] * 4,
        reward=lambda completions: [each.count("1") - each.count("0") for each in completions],
        output=str(tmp_path / "run"),
        batch_size=8,
        max_steps=30,
        inner_epochs=2,
        max_new_tokens=4,
        learning_rate=0.01,
        quiet=True,
    )
    lines: list[dict[str, Any]] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1
    assert "recipe: ranks" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_loop_can_be_read_in_one_sitting():
    assert len(inspect.getsource(policy).splitlines()) <= 350


@pytest.mark.parametrize("name", RECIPES)
def test_the_loop_knows_no_recipe(name: str):
    """What a method does differently stands in its row."""
    code = "\n".join(line for line in inspect.getsource(policy).splitlines() if "`" not in line)
    assert f'"{name}"' not in code
