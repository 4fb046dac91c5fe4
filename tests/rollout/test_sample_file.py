"""Samples in a file: what a line says, and that a run which was stopped anywhere writes what one left alone writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trueup.data.chat import completion_text, load_prompts
from trueup.data.prompts import Request
from trueup.data.settings import TokenizeSettings
from trueup.errors import CheckpointError, SettingsError
from trueup.models.load import LoadedModel, load_model
from trueup.models.scratch import make_model
from trueup.records import StopReason
from trueup.rollout.sample_file import Written, config_path, write_samples
from trueup.rollout.settings import SamplingParams
from trueup.rollout.torch_engine import TorchEngine

ROWS = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(3) for b in range(0, 60, 20)]
SAMPLING = SamplingParams(num_completions=3, max_new_tokens=6, temperature=0.8, stop_tokens=(2,), seed=5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return load_model(make_model(folder, characters="0123456789+=", hidden_size=16, num_heads=2), dtype="float32")


@pytest.fixture(scope="module")
def requests(loaded: LoadedModel) -> list[Request]:
    prompts = load_prompts(ROWS, loaded.tokenizer, settings=TokenizeSettings())
    return [Request(number=i, row=prompts.rows[i], tokens=prompts.tokens[i]) for i in range(len(ROWS))]


def write(loaded: LoadedModel, requests: list[Request], output: Path, **options: Any) -> Written:
    how = {"prompts_per_part": 4, "quiet": True, "started_with": {"--seed": 5}, "sampling": SAMPLING} | options
    return write_samples(
        TorchEngine(loaded.model, loaded.tokenizer, dtype="float32"),
        requests,
        how.pop("sampling"),
        output,
        text_of=lambda row, completion: completion_text(loaded.tokenizer, completion.tokens, row.prompt),
        **how,
    )


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, requests: list[Request], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "samples.jsonl"
    write(loaded, requests, output)
    return output


def test_a_line_says_what_the_engine_gave(loaded, requests, whole):
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [line["request"] for line in lines] == list(range(9))
    assert [line["columns"] for line in lines] == [{"answer": row["answer"]} for row in ROWS]
    engine = TorchEngine(loaded.model, loaded.tokenizer, dtype="float32")
    (group,) = engine.generate([requests[7].tokens], SAMPLING, requests=[7])
    line = lines[7]
    assert line["prompt"] == ROWS[7]["prompt"]
    assert line["where"] == "row 8"
    for index, completion in enumerate(group.completions):
        assert line["completion_ids"][index] == completion.tokens.tolist()
        assert line["lengths"][index] == len(completion.tokens)
        assert line["stop_reasons"][index] == completion.stop_reason
        assert line["completions"][index] == loaded.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert line["sampler_logprobs"][index] == pytest.approx(completion.sampler_logprobs.sum(), abs=1e-4)
        assert line["untempered_logprobs"][index] == pytest.approx(completion.untempered_logprobs.sum(), abs=1e-4)
    reasons = {reason for line in lines for reason in line["stop_reasons"]}
    assert reasons == {"end", "length"}  # both kinds are looked at above and below


def test_what_is_said_of_the_whole_file(loaded, requests, whole, tmp_path):
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    written = write(loaded, requests, whole, resume="yes")  # all is there: nothing is sampled, the same is said
    assert written.num_prompts == 9
    assert written.lengths.tolist() == [length for line in lines for length in line["lengths"]]
    assert written.truncated == np.mean([r == "length" for line in lines for r in line["stop_reasons"]])
    assert written.stop_reasons[0] in StopReason


def test_stopped_anywhere_it_goes_on_to_the_bit(loaded, requests, whole, tmp_path):
    content = whole.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    output = tmp_path / "samples.jsonl"
    # nothing yet, inside the first line, in a part, at a part's end, in the last line, at its end
    for size in (0, 7, ends[0], ends[2] + 30, ends[3], ends[5], ends[7] + 9, len(content) - 1, len(content)):
        config_path(output).write_bytes(config_path(whole).read_bytes())
        output.write_bytes(content[:size])
        write(loaded, requests, output, resume="auto")
        assert output.read_bytes() == content, size


def test_stopped_by_the_engine_it_leaves_whole_parts(loaded, requests, whole, tmp_path, monkeypatch):
    output, calls, generate = tmp_path / "samples.jsonl", [], TorchEngine.generate

    def stopping(self: TorchEngine, prompts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **options)

    monkeypatch.setattr(TorchEngine, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(loaded, requests, output)
    assert calls == [4, 4, 1]
    assert len(output.read_text().splitlines()) == 8
    write(loaded, requests, output, resume="auto")
    assert calls[3:] == [1]  # nothing that is there is sampled again
    assert output.read_bytes() == whole.read_bytes()


def test_numbers_key_the_streams(loaded, requests, whole, tmp_path):
    """A prompt is answered alike whichever others are asked beside it, and the same prompt under two numbers is not."""
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    write(loaded, [requests[8], requests[2]], tmp_path / "two.jsonl")
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [line["completion_ids"] for line in two] == [lines[8]["completion_ids"], lines[2]["completion_ids"]]
    again = Request(number=100, row=requests[2].row, tokens=requests[2].tokens)
    write(loaded, [again], tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "again.jsonl").read_text())["completion_ids"] != lines[2]["completion_ids"]


def test_going_on_with_something_else_is_refused(loaded, requests, whole, tmp_path):
    def changed(what: str, requests: list[Request] = requests, **options: Any) -> str:
        content = whole.read_bytes()
        with pytest.raises(CheckpointError, match=what) as raised:
            write(loaded, requests, whole, resume="auto", **options)
        assert whole.read_bytes() == content
        return str(raised.value)

    changed("--seed was 5 and is 6 now", started_with={"--seed": 6})
    assert "weights" in changed(
        "not what this file was begun with: weights", started_with={"--seed": 5, "weights": "x"}
    )
    changed("prompts_per_part", prompts_per_part=5)
    changed("begun with: prompts", requests[:8])
    changed("begun with: prompts", requests[::-1])
    config_path(whole).rename(tmp_path / "away")
    changed("can't be read")
    (tmp_path / "away").rename(config_path(whole))
    with pytest.raises(SettingsError, match="such a file already"):
        write(loaded, requests, whole)
    with pytest.raises(CheckpointError, match="nothing to go on with"):
        write(loaded, requests, tmp_path / "none.jsonl", resume="yes")
