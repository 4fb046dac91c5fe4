"""The engine against the truth: transformers' greedy search, enumerated sequences, and the scorer's log-probs."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch._inductor import config as inductor_config
from transformers import PreTrainedTokenizerFast

from trueup.errors import DataError, ModelError, NonFiniteError, SettingsError
from trueup.mdp.sequences import SequenceSpace
from trueup.models.adapters import add_lora, merge_and_save, merged_state_dict
from trueup.models.scorer import prepare_scorer
from trueup.models.scratch import character_tokenizer
from trueup.models.tree import tree_batch
from trueup.records import Completion, CompletionGroup, StopReason
from trueup.rollout import torch_engine
from trueup.rollout.settings import SamplingParams
from trueup.rollout.torch_engine import TorchEngine

SHARING = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gemma2", "phi3", "olmo2", "smollm3", "gpt_neox", "gpt2"),
    *("granite", "cohere", "starcoder2", "opt", "qwen3_moe", "gpt_oss", "phi"),
]
ROWS = ["bloom", "lfm2", "falcon_h1", "gptj", "bamba"]


def engine_of(model: Any, tokenizer: Any = None, **options) -> TorchEngine:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*can't share prompts")
        return TorchEngine(model, tokenizer, **({"dtype": "float32"} | options))


def draw(*lengths: int, vocab: int = 97, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length) for length in lengths]


def tokens_of(groups: Sequence[CompletionGroup]) -> list[list[list[int]]]:
    return [[completion.tokens.tolist() for completion in group.completions] for group in groups]


def only(groups: Sequence[CompletionGroup]) -> Completion:
    ((completion,),) = (group.completions for group in groups)
    return completion


# --- what is written


def by_transformers(model: Any, prompt: np.ndarray, count: int) -> list[int]:
    rows = torch.from_numpy(prompt)[None]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count}
    return model.generate(rows, attention_mask=torch.ones_like(rows), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", SHARING + ROWS)
def test_greedy_is_transformers_greedy(tiny_model, family) -> None:
    """Prompts shorter and longer than the windows, in one call; the longest completion grows its room once."""
    model = tiny_model(family, max_position_embeddings=128, n_positions=128, max_seq_len=128)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = TorchEngine(model, dtype="float32")
    sharing = [warning for warning in caught if "can't share prompts" in str(warning.message)]
    assert len(sharing) == (family in ROWS)
    assert engine.decoder.path == ("rows" if family in ROWS else "tree")
    prompts = draw(9, 1, 6, 14)
    count = 80 if family in ("mistral", "gemma2", "gpt2", "qwen3") else 14
    written = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=count, num_completions=2))
    for prompt, completions in zip(prompts, tokens_of(written), strict=True):
        assert completions == [by_transformers(model, prompt, count)] * 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gemma2", "gpt_oss", "phi3"))]
)
def test_compiled_attention_writes_the_same(tiny_model, family) -> None:
    """With shared keys, soft caps and windows, and sinks; rows that leave, prompts that join."""
    model = tiny_model(family)
    options = SamplingParams(num_completions=3, max_new_tokens=20, stop_tokens=tuple(range(5)), seed=3)
    plain, compiled = (
        engine_of(model, compiled=compiled, max_batch_tokens=200).generate(draw(9, 2, 6, 14, 5), options)
        for compiled in (False, True)
    )
    assert tokens_of(plain) == tokens_of(compiled)
    for ours, theirs in zip(plain, compiled, strict=True):
        for one, other in zip(ours.completions, theirs.completions, strict=True):
            np.testing.assert_allclose(one.sampler_logprobs, other.sampler_logprobs, atol=1e-4)


def test_where_nothing_can_be_compiled_the_setting_is_named(tiny_model) -> None:
    torch._dynamo.reset()
    without_compiler = inductor_config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with without_compiler, pytest.raises(SettingsError, match=r"compile.*C\+\+"):
        engine_of(tiny_model("llama"), compiled=True)
    torch._dynamo.reset()


WAYS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "penalty": {"repetition_penalty": 2.0},
    "all": {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.2},
}
END, LENGTH = 2, 3


def exact_logprobs(model: Any, prompt: np.ndarray, space: SequenceSpace, ways: SamplingParams) -> torch.Tensor:
    """log-prob of every sequence by the model's plain forward pass and the definition of each setting, in float64."""
    prefixes = {
        int(contexts[position]): np.r_[prompt, tokens[:position].numpy()]
        for tokens, mask, contexts in zip(space.tokens, space.mask, space.contexts, strict=True)
        for position in range(int(mask.sum()))
    }
    logits = torch.zeros(space.num_contexts, space.vocabulary_size, dtype=torch.float64)
    for context, prefix in prefixes.items():
        scores = model(input_ids=torch.from_numpy(prefix)[None], use_cache=False).logits[0, -1].double()
        for token in set(prefix.tolist()):
            penalty = ways.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        p = (scores / ways.temperature).softmax(-1)
        if ways.top_k:
            p[p < p.sort(descending=True).values[ways.top_k - 1]] = 0
        p /= p.sum()
        order = p.argsort(descending=True)
        p[order[1:][(p[order].cumsum(0) >= ways.top_p)[:-1]]] = 0
        p[p < ways.min_p * p.max()] = 0
        logits[context] = (p / p.sum()).log()
    return space.sequence_logprobs(logits.log_softmax(-1).nan_to_num(neginf=-1e9))


@pytest.mark.parametrize(
    ("family", "way"), [*(("llama", way) for way in WAYS), ("gemma2", "plain"), ("lfm2", "plain"), ("bloom", "all")]
)
@torch.no_grad()
def test_sequences_come_as_often_as_they_should(small_vocabulary, family, way) -> None:
    """Chi-square of 5,000 completions against the exact probability of each of the 53 sequences."""
    model = small_vocabulary(family)
    prompt = np.array([4, 3, 1])
    ways = SamplingParams(num_completions=5_000, max_new_tokens=LENGTH, stop_tokens=(END,), seed=1, **WAYS[way])
    space = SequenceSpace(5, LENGTH, end_token=END)
    p = exact_logprobs(model, prompt, space, ways).exp().numpy()
    assert abs(p.sum() - 1) < 1e-9
    names = [tuple(row[mask].tolist()) for row, mask in zip(space.tokens, space.mask, strict=True)]
    (group,) = engine_of(model).generate([prompt], ways)
    counts = dict.fromkeys(names, 0)
    for completion in group.completions:
        counts[tuple(completion.tokens.tolist())] += 1
        assert (completion.stop_reason is StopReason.END) == (completion.tokens[-1] == END)
    found = np.array([counts[name] for name in names])
    assert not found[p < 1e-12].any()  # what is cut off never comes
    often = p * ways.num_completions > 5
    rare = [found[~often].sum(), p[~often].sum() * ways.num_completions]
    observed, expected = [*found[often], rare[0]], [*(p[often] * ways.num_completions), rare[1]]
    kept = len(observed) if rare[1] > 5 else -1
    scaled = np.array(expected[:kept]) * sum(observed[:kept]) / sum(expected[:kept])
    assert stats.chisquare(observed[:kept], scaled).pvalue > 1e-3
    for completion in group.completions[:50]:
        exactly = np.log(p[names.index(tuple(completion.tokens.tolist()))])
        assert completion.sampler_logprobs is not None
        assert abs(completion.sampler_logprobs.sum() - exactly) < 1e-4


@pytest.mark.parametrize("family", [*SHARING, "lfm2", "bloom"])
def test_logprobs_are_the_scorers(tiny_model, family) -> None:
    """Rows leave at different times, prompts join while others run; what is recorded is what a scorer says."""
    model = tiny_model(family)
    ways = SamplingParams(num_completions=3, max_new_tokens=20, temperature=0.8, stop_tokens=tuple(range(3, 9)))
    groups = engine_of(model, max_batch_tokens=160).generate(draw(9, 1, 6, 14, 5, 5), ways)
    completions = [completion for group in groups for completion in group.completions]
    assert len({len(completion.tokens) for completion in completions}) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = prepare_scorer(model)
    batch = tree_batch(groups)
    with torch.no_grad():
        for temperature, name in ((0.8, "sampler_logprobs"), (1.0, "untempered_logprobs")):
            recorded = np.concatenate([getattr(completion, name) for completion in completions])
            assert recorded.dtype == np.float32
            np.testing.assert_allclose(scorer(batch, temperature=temperature).logprobs, recorded, rtol=1e-5, atol=1e-5)


def test_at_temperature_1_both_logprobs_are_the_same(tiny_model) -> None:
    completion = only(engine_of(tiny_model("llama")).generate(draw(5), SamplingParams(max_new_tokens=9)))
    assert completion.sampler_logprobs is not None
    np.testing.assert_array_equal(completion.sampler_logprobs, completion.untempered_logprobs)


# --- random streams


@pytest.mark.parametrize(("family", "way"), [("llama", "plain"), ("mistral", "all"), ("lfm2", "plain")])
def test_the_batch_changes_nothing(tiny_model, family, way) -> None:
    """How much fits at once, which prompts there are beside one, and in which order: the same tokens."""
    model = tiny_model(family)
    prompts = draw(9, 3, 14, 6, 3, 20)
    ways = SamplingParams(num_completions=4, max_new_tokens=12, stop_tokens=(5, 6, 7, 8), seed=3, **WAYS[way])
    expected = tokens_of(engine_of(model).generate(prompts, ways))
    for max_batch_tokens in (32, 70, 200):  # of one completion at a time, some prompts in parts, several at once
        assert tokens_of(engine_of(model, max_batch_tokens=max_batch_tokens).generate(prompts, ways)) == expected
    engine = engine_of(model)
    order = [4, 0, 5, 2]
    some = engine.generate([prompts[index] for index in order], ways, requests=order)
    assert tokens_of(some) == [expected[index] for index in order]


def test_streams_are_keyed_by_request_completion_position_and_seed(tiny_model) -> None:
    engine = engine_of(tiny_model("llama"))
    prompt = draw(6)[0]
    ways = SamplingParams(num_completions=3, max_new_tokens=70 - 20)
    first, second, again = tokens_of(engine.generate([prompt] * 3, ways, requests=[1, 2, 1]))
    assert first == again
    assert len({tuple(tokens) for tokens in first + second}) == 6
    other = tokens_of(engine.generate([prompt], SamplingParams(num_completions=3, max_new_tokens=50, seed=1)))[0]
    assert not set(map(tuple, other)) & set(map(tuple, first + second))
    fewer = tokens_of(engine.generate([prompt], SamplingParams(max_new_tokens=4), requests=[2]))[0]
    assert fewer == [second[0][:4]]


def test_no_other_random_stream_is_drawn_from(tiny_model) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (the state that must not move)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    engine_of(tiny_model("llama"))  # its weights are drawn in the fixture
    torch.set_rng_state(state)
    engine = engine_of(tiny_model("gpt2"))
    torch.set_rng_state(state)
    engine.generate(draw(4), SamplingParams(max_new_tokens=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002


# --- how a completion ends


def test_a_stop_token_ends_a_completion_and_belongs_to_it(tiny_model) -> None:
    engine = engine_of(tiny_model("llama"))
    prompts = draw(4, 7)
    free = SamplingParams(num_completions=8, max_new_tokens=30)
    stopped = SamplingParams(num_completions=8, max_new_tokens=30, stop_tokens=(10, 11, 12, 13, 14, 15))
    ends = set()
    for long, short in zip(engine.generate(prompts, free), engine.generate(prompts, stopped), strict=True):
        for whole, part in zip(long.completions, short.completions, strict=True):
            hits = np.flatnonzero(np.isin(whole.tokens, stopped.stop_tokens))
            count = hits[0] + 1 if len(hits) else 30
            assert part.tokens.tolist() == whole.tokens[:count].tolist()
            assert part.stop_reason is (StopReason.END if len(hits) else StopReason.LENGTH)
            assert whole.stop_reason is StopReason.LENGTH
            assert part.sampler_logprobs is not None
            assert len(part.sampler_logprobs) == count
            ends.add(part.stop_reason)
    assert len(ends) == 2


def test_a_stop_string_may_lie_across_tokens(tiny_model) -> None:
    letters = "abcd"
    tokenizer = character_tokenizer(letters, max_length=64)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ways = {"num_completions": 40, "max_new_tokens": 8}
    (free,) = engine_of(model).generate([np.array([3, 4])], SamplingParams(**ways))
    strings = ("aba", "dd")
    (group,) = engine_of(model, tokenizer).generate(
        [np.array([3, 4])], SamplingParams(**ways, stop_strings=strings, stop_tokens=(2,))
    )
    reasons = []
    for whole, part in zip(free.completions, group.completions, strict=True):
        text = tokenizer.decode(part.tokens.tolist())
        before = tokenizer.decode(part.tokens[:-1].tolist())
        assert part.tokens.tolist() == whole.tokens[: len(part.tokens)].tolist()
        assert not any(string in before for string in strings)
        assert 2 not in part.tokens[:-1]
        assert (part.stop_reason is StopReason.STOP) == text.endswith(strings)
        assert (part.stop_reason is StopReason.END) == (part.tokens[-1] == 2)
        reasons.append(part.stop_reason)
    assert set(reasons) == set(StopReason)


def test_a_stop_string_of_characters_that_are_several_tokens(tiny_model) -> None:
    """One token per byte: a character of two bytes is none until both are there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "oh née é"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode()) > len(text)
    rule = torch_engine.StopRule(SamplingParams(stop_strings=("née",)), tokenizer)
    lines = torch_engine.Lines(len(tokens), 0)
    (line,) = lines.add([torch_engine.Order(0, 1, range(1), len(tokens))], [0])
    ended = []
    for count, token in enumerate(tokens, 1):
        lines.tokens[line, count - 1], lines.count[line] = token, count
        ended.append(int(rule.reasons(lines, np.array([line]))[0]))
    end = len("oh née".encode())
    assert torch_engine.REASONS[ended[end - 1]] is StopReason.STOP
    assert not any(ended[: end - 1])


def test_the_context_ends_a_completion(tiny_model) -> None:
    model = tiny_model("llama", max_position_embeddings=16)
    long, short = engine_of(model).generate(draw(12, 3), SamplingParams(num_completions=2, max_new_tokens=9))
    assert [len(completion.tokens) for completion in long.completions] == [4, 4]
    assert [len(completion.tokens) for completion in short.completions] == [9, 9]
    assert all(each.stop_reason is StopReason.LENGTH for group in (long, short) for each in group.completions)


# --- what is computed


def watched(engine: TorchEngine) -> list[int]:
    """The number of tokens that the model reads in each forward pass from now on."""
    passes: list[int] = []
    engine.model.get_input_embeddings().register_forward_hook(lambda module, args, out: passes.append(args[0].numel()))
    return passes


def test_a_prompt_is_read_once_and_ended_rows_are_not_read(tiny_model) -> None:
    engine = engine_of(tiny_model("llama"))
    prompts = draw(20, 16)
    passes = watched(engine)
    ways = SamplingParams(num_completions=16, max_new_tokens=30, stop_tokens=tuple(range(3, 20)))
    groups = engine.generate(prompts, ways)
    lengths = np.array([len(completion.tokens) for group in groups for completion in group.completions])
    running = [int((lengths > step).sum()) for step in range(1, lengths.max())]
    assert passes[0] == 36
    assert passes[1:] == [rows + -rows % 8 for rows in running]
    assert len(set(passes)) > 3


def test_prompts_join_as_soon_as_there_is_room(tiny_model, monkeypatch) -> None:
    """With room for two prompts of five the third starts when the first is over, while the second goes on."""
    engine = engine_of(tiny_model("llama"), max_batch_tokens=2 * (5 + 2 * 30))
    running: list[int] = []
    step = engine.decoder.step
    monkeypatch.setattr(
        engine.decoder, "step", lambda cohorts, tokens: (running.append(len(cohorts)), step(cohorts, tokens))[1]
    )
    ways = SamplingParams(num_completions=2, max_new_tokens=30, stop_tokens=tuple(range(3, 9)))
    groups = engine.generate(draw(5, 5, 5, 5, 5), ways)
    a, b, c, d, e = (max(len(completion.tokens) for completion in group.completions) for group in groups)
    assert max(running) == 2
    assert len(running) < max(a, b) + max(c, d) + e - 3  # pairs, one after the other


def test_memory_is_kept_to(tiny_model, monkeypatch) -> None:
    engine = engine_of(tiny_model("llama"), max_batch_tokens=150)
    held: list[int] = []
    step = engine.decoder.step

    def counting(cohorts: Any, tokens: Any) -> Any:
        states = step(cohorts, tokens)
        sizes = [(layer.prompt_keys, layer.keys) for cohort in cohorts for layer in cohort.layers[:1]]
        held.append(sum(each.shape[0] * each.shape[2] for pair in sizes for each in pair))
        return states

    monkeypatch.setattr(engine.decoder, "step", counting)
    engine.generate(draw(9, 30, 14, 6, 3, 20), SamplingParams(num_completions=6, max_new_tokens=20, stop_tokens=(5, 6)))
    assert 75 < max(held) <= 150


def test_progress_counts_tokens(tiny_model) -> None:
    told: list[int] = []
    ways = SamplingParams(num_completions=3, max_new_tokens=9, stop_tokens=(5, 6, 7, 8, 9, 10))
    groups = engine_of(tiny_model("gpt2")).generate(draw(4, 5), ways, progress=told.append)
    assert sum(told) == sum(len(completion.tokens) for group in groups for completion in group.completions)


# --- weights


def fresh_tokens(model: Any, **options) -> list[list[list[int]]]:
    return tokens_of(engine_of(model, **options).generate(draw(5, 8), SamplingParams(max_new_tokens=12)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_updated_weights_are_those_of_a_new_engine(tiny_model, family, dtype) -> None:
    model, other = tiny_model(family), tiny_model(family, seed=1)
    before = copy.deepcopy(other.state_dict())
    engine = engine_of(model, dtype=dtype)
    first = fresh_tokens(model, dtype=dtype)
    engine.update_weights(other)
    ways = SamplingParams(max_new_tokens=12)
    assert tokens_of(engine.generate(draw(5, 8), ways)) == fresh_tokens(other, dtype=dtype) != first
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    engine.update_weights(other)
    assert tokens_of(engine.generate(draw(5, 8), ways)) == fresh_tokens(other, dtype=dtype)
    assert fresh_tokens(model, dtype=dtype) == first  # the model that it was made of is as it was
    assert all(torch.equal(tensor, before[name] * 1.5) for name, tensor in other.state_dict().items())


def test_weights_of_the_same_type_are_shared(tiny_model) -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    pairs = list(zip(engine.model.parameters(), model.parameters(), strict=True))
    assert all(mine.data_ptr() == given.data_ptr() for mine, given in pairs)
    assert not any(mine.requires_grad for mine, _ in pairs)
    assert all(given.requires_grad for _, given in pairs)
    other = tiny_model("llama", seed=1)
    engine.update_weights(other)
    pairs = list(zip(engine.model.parameters(), other.parameters(), strict=True))
    assert all(mine.data_ptr() == given.data_ptr() for mine, given in pairs)
    assert engine_of(model, dtype="bfloat16").model.dtype == torch.bfloat16
    assert engine_of(copy.deepcopy(model).bfloat16(), dtype="same").model.dtype == torch.bfloat16


def test_tied_weights_stay_tied(tiny_model) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    engine = engine_of(model, dtype="bfloat16")
    other = tiny_model("llama", tie_word_embeddings=True, seed=1)
    engine.update_weights(other)
    assert engine.model.get_output_embeddings().weight is engine.model.get_input_embeddings().weight
    assert tokens_of(engine.generate(draw(5, 8), SamplingParams(max_new_tokens=12))) == fresh_tokens(
        other, dtype="bfloat16"
    )


def test_weights_of_another_shape_are_refused(tiny_model) -> None:
    engine = engine_of(tiny_model("llama"))
    with pytest.raises(ModelError, match="engine of the new model"):
        engine.update_weights(tiny_model("llama", intermediate_size=64))
    with pytest.raises(ModelError, match="engine of the new model"):
        engine.update_weights(tiny_model("llama", num_hidden_layers=1))


def test_adapters_are_merged_into_the_copy(tiny_model, tmp_path) -> None:
    model = add_lora(tiny_model("llama"), rank=4, dropout=0.5)
    model.train()
    base = copy.deepcopy(merged_state_dict(model))
    engine = engine_of(model)
    before = tokens_of(engine.generate(draw(5, 8), SamplingParams(max_new_tokens=12)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    engine.update_weights(model)
    after = tokens_of(engine.generate(draw(5, 8), SamplingParams(max_new_tokens=12)))
    assert after != before
    merge_and_save(model, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert after == fresh_tokens(merged)
    assert fresh_tokens(model) == after
    # The model is as it was: adapters beside frozen weights that were not merged.
    assert not any(hasattr(module, "lora_A") for module in engine.model.modules())
    for name, tensor in model.state_dict().items():
        if name.endswith("base_layer.weight"):
            assert torch.equal(tensor, base[name.replace(".base_layer", "")])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_dropout_is_off_and_the_model_stays_in_training(tiny_model) -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = fresh_tokens(model)
    implementation = model.config._attn_implementation
    model.train()
    model.transformer.h[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    assert fresh_tokens(model) == expected
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model(input_ids=torch.from_numpy(draw(5)[0])[None]).logits.sum().backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad is not None


def test_bfloat16_is_close_to_what_it_rounds(tiny_model) -> None:
    """With the packed layers, where the CPU has them: log-probs within what bfloat16 costs."""
    model = tiny_model("llama", fresh=True)
    ways = SamplingParams(num_completions=4, max_new_tokens=20)
    groups = engine_of(model, dtype="bfloat16").generate(draw(5, 8), ways)
    with torch.no_grad():
        scored = prepare_scorer(model)(tree_batch(groups)).logprobs
    recorded = np.concatenate([each.sampler_logprobs for group in groups for each in group.completions])
    np.testing.assert_allclose(recorded, scored, rtol=0, atol=0.05)


# --- bad input


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5, 6], []], "prompt 1: is not a row of one or more tokens"),
        ([[[5, 6]]], "prompt 0: is not a row of one or more tokens"),
        ([[5, 97]], "prompt 0: has tokens outside 0 … 96"),
        ([[-1]], "prompt 0: has tokens outside 0 … 96"),
        ([[5] * 64], "prompt 0: 64 tokens leave no room in the model's context of 64"),
    ],
)
def test_bad_prompts(tiny_model, prompts, message) -> None:
    with pytest.raises(DataError, match=message):
        engine_of(tiny_model("llama")).generate([np.array(prompt) for prompt in prompts], SamplingParams())


def test_bad_settings(tiny_model) -> None:
    model = tiny_model("llama")
    with pytest.raises(SettingsError, match="stop_strings: text can't be looked for without a tokenizer"):
        engine_of(model).generate(draw(3), SamplingParams(stop_strings=("a",)))
    with pytest.raises(SettingsError, match="an empty text ends everything"):
        engine_of(model, object()).generate(draw(3), SamplingParams(stop_strings=("",)))
    with pytest.raises(SettingsError, match="knows tokens from 0 to 96"):
        engine_of(model).generate(draw(3), SamplingParams(stop_tokens=(97,)))
    with pytest.raises(SettingsError, match="1 requests for 2 prompts"):
        engine_of(model).generate(draw(3, 4), SamplingParams(), requests=[1])
    with pytest.raises(SettingsError, match="max_batch_tokens: 0 is out of range"):
        engine_of(model, max_batch_tokens=0)
    with pytest.raises(SettingsError, match="12 tokens of prompt 1 and a completion of up to 9 don't fit into 20") as e:
        engine_of(model, max_batch_tokens=20).generate(draw(3, 12), SamplingParams(max_new_tokens=9))
    assert "21 or more" in str(e.value)


def test_no_prompts_give_no_groups(tiny_model) -> None:
    assert engine_of(tiny_model("llama")).generate([], SamplingParams()) == []


def test_logits_that_are_not_numbers_are_named(tiny_model) -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 0] = torch.nan
    for temperature in (0, 1):
        with pytest.raises(NonFiniteError, match="prompt 0, completion 0: the model's logits are not finite"):
            engine.generate(draw(3), SamplingParams(temperature=temperature))
