"""``trueup score`` and ``trueup model normalize``, from flags to files and words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trueup.cli.main import main
from trueup.models.adapters import merge_and_save
from trueup.models.heads import load_reward_model
from trueup.models.scratch import make_model
from trueup.rewards import scoring

ROWS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a}{b}{a}"[: 1 + b % 3] + "="}
    for a in range(5)
    for b in range(4)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, folders = tmp_path_factory.mktemp("models"), []
    for seed in (1, 2):
        trunk = make_model(folder / f"trunk-{seed}", characters="0123456789+=", hidden_size=16, num_heads=2, seed=seed)
        loaded = load_reward_model(trunk, dtype="float32", seed=seed)
        with torch.no_grad():
            loaded.model.score.weight.mul_(3)
        merge_and_save(loaded.model, folder / str(seed))
        loaded.tokenizer.save_pretrained(folder / str(seed))
        folders.append(str(folder / str(seed)))
    return folders


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    Path("demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    return tmp_path


def scores_in(path: str) -> np.ndarray:
    return np.array([json.loads(line)["scores"] for line in Path(path).read_text().splitlines()])


def test_scores_and_what_they_are_worth(models, files, capsys):
    assert main(["score", "--model", models[0], "--data", "pairs.jsonl", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "20 rows, 40 completions" in out
    scores = scores_in("scores.jsonl")
    right = (scores[:, 0] > scores[:, 1]).mean()
    assert f"all pairs             {right:.3f} [" in out
    assert f"score: mean {scores.mean():.4g}, standard deviation {scores.std():.4g}" in out
    for words in ("lengths balanced", "of the longer answer", "by length gap", "calibration: ECE", "by chance", "sure"):
        assert words in out

    assert main(["score", "--model", models[0], "--data", "pairs.jsonl"]) == 2
    assert "--resume auto" in capsys.readouterr().err
    before = Path("scores.jsonl").read_bytes()
    Path("scores.jsonl").write_bytes(before[:700])
    assert main(["score", "--model", models[0], "--data", "pairs.jsonl", "--resume", "auto", "--quiet"]) == 0
    assert Path("scores.jsonl").read_bytes() == before


def test_an_interrupt_says_how_to_go_on(models, files, capsys, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score_part", interrupted)
    assert main(["score", "--model", models[0], "--data", "pairs.jsonl", "--quiet"]) == 130
    assert "--resume auto goes on with scores.jsonl" in capsys.readouterr().err


def test_several_models_normalised_for_the_file(models, files, capsys):
    flags = ["--dtype", "float32", "--quiet", "--normalize-on", "demonstrations.jsonl", "--scale"]
    flags += ["--aggregate", "mean_minus_std", "--spread-coef", "0.5"]
    assert main(["score", "--model", *models, "--data", "pairs.jsonl", *flags]) == 0
    out = capsys.readouterr().out
    assert "model 1 alone" in out
    assert "model 2 alone" in out
    lines = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    each = np.array([line["model_scores"] for line in lines])  # [rows, models, sides]
    chosen = each[:, :, 0]
    assert chosen.mean(0) == pytest.approx([0, 0], abs=1e-5)
    assert chosen.std(0) == pytest.approx([1, 1], abs=1e-4)
    assert scores_in("scores.jsonl") == pytest.approx(each.mean(1) - 0.5 * each.std(1))


def test_a_normalised_copy_scores_as_it_says(models, files, capsys):
    flags = ["--data", "demonstrations.jsonl", "--dtype", "float32"]
    assert main(["model", "normalize", "--model", models[0], *flags, "--output", "models/reward"]) == 0
    out = capsys.readouterr().out
    mean = json.loads(Path("models/reward/config.json").read_text())["score_mean"]
    assert f"models/reward: score = (raw score {'+' if mean < 0 else '−'} {abs(mean):.6g}) / 1" in out
    assert main(["score", "--model", "models/reward", *flags, "--quiet"]) == 0
    assert scores_in("scores.jsonl").mean() == pytest.approx(0, abs=1e-6)
    assert main(["model", "normalize", "--model", models[0], *flags, "--output", "models/reward"]) == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["score", "--data", "pairs.jsonl"], "--model"),
        (["score", "--model", "m"], "--data"),
        (["model", "normalize", "--data", "pairs.jsonl"], "--model"),
        (["score", "--model", "m", "--data", "d", "--aggregate", "min"], "--aggregate: has no effect without"),
        (["score", "--model", "m", "n", "--data", "d", "--spread-coef", "2"], "--spread-coef: has no effect without"),
        (["score", "--model", "m", "--data", "d", "--scale"], "--scale: has no effect without --normalize-on"),
        (["score", "--model", "m", "--data", "d", "--limit", "0"], "--limit: is 0, but must be at least 1"),
        (["score", "--model", "m", "--data", "d", "--resume", "yes"], "nothing to go on with"),
        (["score", "--model", "./m", "--data", "pairs.jsonl"], "no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(argv, message, files, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == ["demonstrations.jsonl", "pairs.jsonl"]
