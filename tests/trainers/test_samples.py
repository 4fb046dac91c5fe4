"""Evaluation samples: greedy, cut at the stop token, and empty where the context is full."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trueup.models.load import context_length, load_model
from trueup.rollout.torch_engine import TorchEngine
from trueup.runs.folder import RunFolder
from trueup.trainers.samples import greedy_completions, sample_writer


def by_transformers(model: Any, prompt: np.ndarray, stop_token: int, count: int) -> list[int]:
    tokens = torch.from_numpy(prompt)[None]
    options = {"do_sample": False, "eos_token_id": stop_token, "pad_token_id": 0, "max_new_tokens": count}
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(prompt) :].tolist()
    return written[: written.index(stop_token)] if stop_token in written else written


def test_up_to_the_stop_token_or_the_end_of_the_context(tiny_model) -> None:
    model: Any = load_model(tiny_model, dtype="float32").model
    context, vocabulary = context_length(model), model.config.vocab_size
    assert context is not None
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, vocabulary, length) for length in (4, context, 9, context - 2, context + 5)]
    engine = TorchEngine(model, dtype="same")
    (free,) = greedy_completions(engine, prompts[:1], stop_tokens=[], max_new_tokens=6)
    stop_token = free[3]
    written = greedy_completions(engine, prompts, stop_tokens=[stop_token], max_new_tokens=6)
    assert written[0] == free[: free.index(stop_token)]
    assert written[1] == written[4] == []
    for index, count in ((0, 6), (2, 6), (3, 2)):
        assert written[index] == by_transformers(model, prompts[index], stop_token, count)


def test_the_writer_follows_the_model(tiny_model, tmp_path) -> None:
    loaded = load_model(tiny_model, dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = np.array([4, 5, 6])
    session: Any = SimpleNamespace(folder=RunFolder(tmp_path), settings=SimpleNamespace(sample_tokens=8))
    inputs: Any = SimpleNamespace(sampled=[SimpleNamespace(prompt=prompt)], stop_tokens=[])
    write = sample_writer(session, model, tokenizer, inputs)
    expected = []
    for step in (0, 1):
        write(step)
        expected.append(str(tokenizer.decode(by_transformers(model, prompt, -1, 8))))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == expected
    assert expected[0] != expected[1]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["prompt"] == tokenizer.decode(prompt.tolist())
