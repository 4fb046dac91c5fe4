"""Which defaults an online command has: those of its recipe, wherever that is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trueup.cli.main import COMMANDS
from trueup.cli.train import grpo_defaults, rl_defaults
from trueup.errors import SettingsError
from trueup.recipes import RECIPES, policy_defaults
from trueup.runs.settings import parse, to_yaml
from trueup.trainers.policy_settings import PolicySettings


def parsed(*argv: str) -> PolicySettings:
    return parse(PolicySettings, argv, "trueup rl", default=rl_defaults(argv))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_in_a_file_chooses_the_defaults(recipe: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(f"recipe: {recipe}\nbatch_size: 8\n")
    assert parsed("--config", str(tmp_path / "c.yaml")) == PolicySettings(**policy_defaults(recipe) | {"batch_size": 8})


def test_a_flag_wins_over_the_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("recipe: grpo\n")
    found = parsed("--config", str(tmp_path / "c.yaml"), "--recipe=dapo", "--clip-high", "0.3")
    assert found == PolicySettings(**policy_defaults("dapo") | {"clip_high": 0.3})


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_run_writes_repeats_it(recipe: str, tmp_path: Path):
    settings = PolicySettings(**policy_defaults(recipe) | {"stop_strings": ("\n", "a: b"), "reward": ("regex:\\d+",)})
    settings = replace(settings, reward_weights=(0.5,), max_batch_tokens=None, gamma=0.9)
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    assert parsed("--config", str(tmp_path / "config.yaml")) == settings


def test_a_verb_has_its_own_recipe(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("recipe: grpo\n")
    assert grpo_defaults(["--config", str(tmp_path / "c.yaml")]) == grpo_defaults([])
    (tmp_path / "c.yaml").write_text("recipe: rloo\n")
    with pytest.raises(SettingsError, match=r"--recipe: is rloo, but the command is trueup grpo"):
        grpo_defaults(["--config", str(tmp_path / "c.yaml")])


def test_every_verb_of_the_online_loop_is_a_recipe():
    verbs = {name for name, command in COMMANDS.items() if command.settings == "PolicySettings"} - {"rl"}
    assert verbs <= set(RECIPES)
    assert {rl_defaults([], recipe=verb).recipe for verb in verbs} == verbs
