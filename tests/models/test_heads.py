"""Saved reward models score the same in plain transformers, and the score is read at the sequence's true last token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from trueup.errors import ModelError
from trueup.models.adapters import add_lora, merge_and_save
from trueup.models.heads import end_token_ids, load_reward_model, new_score_head, separate_padding
from trueup.models.load import LoadedModel, load_model

VOCAB, END = 97, 2
SEQUENCES = [[5, 6, 7, 8, END], [9, 10, END], [11, 12, 13], [14, END, 15, END], [16]]


def word_tokenizer(specials: tuple[str, ...] = ("<pad>", "<s>", "</s>"), size: int = VOCAB, **named: str):
    """One token per number, special tokens first."""
    tokens = [*specials, *(f"w{i}" for i in range(len(specials), size))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture
def causal(tiny_model):
    """``causal("llama", pad="</s>")``: a model whose padding token is what you say, with its tokenizer."""

    def make(
        family: str, specials: tuple[str, ...] = ("<|endoftext|>", "<s>", "</s>"), pad: str | None = "</s>", **more
    ):
        tokenizer = word_tokenizer(specials, bos_token="<s>", eos_token="</s>", **({"pad_token": pad} if pad else {}))
        model = tiny_model(family, pad_token_id=None if pad is None else specials.index(pad), **more)
        model.generation_config.eos_token_id = END
        return LoadedModel(model, tokenizer, f"tiny {family}")

    return make


def last_token_scores(model: nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """The definition: the head on the hidden state of each sequence's last token, one sequence at a time."""
    with torch.no_grad():
        hidden = [model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1] for tokens in sequences]
        return model.score(torch.stack(hidden)).squeeze(-1)


def batched_scores(model: nn.Module, sequences: list[list[int]], pad: int) -> torch.Tensor:
    """What anybody would do with the checkpoint: one right-padded batch through its forward pass."""
    width = max(map(len, sequences))
    ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens in sequences])
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    mask = torch.arange(width) < lengths[:, None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)


def save(loaded: LoadedModel, folder: Path) -> Path:
    merge_and_save(loaded.model, folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma3_text", "opt"])
def test_plain_transformers_gives_the_last_tokens_score(causal, tmp_path, family, lora):
    reward = load_reward_model(causal(family), seed=1)
    if lora:
        add_lora(reward.model, rank=2)
        with torch.no_grad():
            for name, parameter in reward.model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(
                        0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    )
    expected = last_token_scores(reward.model, SEQUENCES)
    folder = save(reward, tmp_path)

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    assert model.config.get_text_config().pad_token_id == pad != END
    torch.testing.assert_close(batched_scores(model, SEQUENCES, pad), expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-2, "scores that are all alike show nothing"

    again = load_reward_model(folder, dtype="float32", device="cpu")
    torch.testing.assert_close(last_token_scores(again.model, SEQUENCES), expected, atol=1e-5, rtol=1e-4)


def test_padding_with_the_end_token_would_have_gone_wrong(causal):
    """The trap that the separation is for: without it, sequences that end properly are read one token too early."""
    reward = load_reward_model(causal("llama")).model
    expected = last_token_scores(reward, SEQUENCES)
    reward.config.pad_token_id = END
    wrong = (batched_scores(reward, SEQUENCES, END) - expected).abs() > 1e-3
    assert wrong.tolist() == [tokens[-1] == END for tokens in SEQUENCES]


def test_the_trunk_is_copied_and_the_source_stays_as_it_is(causal):
    source = causal("llama")
    source.model.requires_grad_(False)
    reward = load_reward_model(source)
    for (name, ours), theirs in zip(
        reward.model.base_model.named_parameters(), source.model.base_model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.data_ptr() != theirs.data_ptr()
        assert ours.requires_grad
    assert source.model.config.pad_token_id == source.tokenizer.pad_token_id == END
    assert reward.tokenizer.pad_token == "<|endoftext|>"
    assert not any(parameter.is_meta for parameter in reward.model.parameters())


def test_a_folder_a_loaded_model_and_a_saved_reward_model_agree(causal, tmp_path):
    source = causal("qwen2", pad="<|endoftext|>")
    folder = save(source, tmp_path / "causal")
    of_folder = load_reward_model(folder, dtype="float32", device="cpu", seed=5)
    of_model = load_reward_model(load_model(folder, dtype="float32", device="cpu"), seed=5)
    of_saved = load_reward_model(save(of_folder, tmp_path / "reward"), dtype="float32", device="cpu", seed=6)
    expected = last_token_scores(of_folder.model, SEQUENCES)
    # Not to the bit: where a tensor lies in memory decides how some CPUs sum it up.
    torch.testing.assert_close(last_token_scores(of_model.model, SEQUENCES), expected)
    torch.testing.assert_close(last_token_scores(of_saved.model, SEQUENCES), expected)
    other = load_reward_model(folder, dtype="float32", device="cpu", seed=6)
    assert not torch.allclose(expected, last_token_scores(other.model, SEQUENCES))


def test_a_new_head_has_the_stated_spread_and_precision():
    head = new_score_head(nn.Linear(9_999, 1, bias=True), torch.device("cpu"), torch.bfloat16, seed=0)
    assert head.weight.dtype == torch.bfloat16
    assert head.weight.float().std().item() == pytest.approx(1 / math.sqrt(10_000), rel=0.03)
    assert head.weight.float().mean().abs() < 4 / math.sqrt(10_000 * 10_000)
    assert head.bias.item() == 0.0


def test_bfloat16_model_gets_a_bfloat16_head(causal):
    source = causal("llama")
    source.model.to(torch.bfloat16)
    reward = load_reward_model(source).model
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.bfloat16}
    assert reward(torch.tensor([SEQUENCES[0]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("specials", "template", "expected"),
    [
        (("<pad>", "<s>", "</s>"), None, "<pad>"),
        (("<|endoftext|>", "<s>", "</s>", "<|fim_pad|>"), None, "<|fim_pad|>"),
        (("<|endoftext|>", "<s>", "</s>"), None, "<|endoftext|>"),
        (("<unk>", "<s>", "</s>"), None, "<unk>"),
        (("<|endoftext|>", "<s>", "</s>", "<|reserved_1|>"), "{{ 'a<|endoftext|>' }}", "<|reserved_1|>"),
        (("<start>", "<s>", "</s>"), None, "<|pad|>"),
    ],
)
def test_which_token_pads(causal, specials, template, expected):
    """Never the end or begin token, nor one of the chat template's; the vocabulary grows only as the last resort."""
    loaded = causal("llama", specials=specials)
    loaded.tokenizer.chat_template = template
    reward = load_reward_model(loaded)
    assert reward.tokenizer.pad_token == expected
    grown = expected not in specials
    assert len(reward.tokenizer) == VOCAB + grown == reward.model.get_input_embeddings().weight.shape[0]
    assert reward.model.config.pad_token_id == (VOCAB if grown else specials.index(expected))


def test_an_unused_row_of_the_embedding_is_taken_before_it_grows(causal, tiny_model):
    model = tiny_model("llama", vocab_size=VOCAB + 8, pad_token_id=None)
    tokenizer = word_tokenizer(("<start>", "<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    reward = load_reward_model(LoadedModel(model, tokenizer, "tiny"))
    assert reward.model.config.pad_token_id == VOCAB
    assert reward.model.get_input_embeddings().weight.shape[0] == VOCAB + 8


def test_a_grown_embedding_is_saved_and_scores_the_same(causal, tmp_path):
    reward = load_reward_model(causal("gpt2", specials=("<start>", "<s>", "</s>"), pad=None))
    expected = last_token_scores(reward.model, SEQUENCES)
    model = AutoModelForSequenceClassification.from_pretrained(save(reward, tmp_path)).eval()
    torch.testing.assert_close(batched_scores(model, SEQUENCES, VOCAB), expected, atol=1e-5, rtol=1e-4)


def test_padding_that_is_no_end_token_stays(causal):
    loaded = causal("llama", specials=("<|endoftext|>", "<s>", "</s>", "<unk>"), pad="<unk>")
    assert load_reward_model(loaded).tokenizer.pad_token == "<unk>"


def test_every_end_token_counts(causal):
    """Chat models name several end tokens; none of them may pad."""
    loaded = causal("llama", specials=("<|endoftext|>", "<s>", "</s>", "<unk>"), pad="<|endoftext|>")
    loaded.model.generation_config.eos_token_id = [END, 0]
    assert end_token_ids(loaded.model, loaded.tokenizer) == {0, END}
    separate_padding(loaded.model, loaded.tokenizer)
    assert loaded.tokenizer.pad_token == "<unk>"


def test_a_foreign_reward_model_that_pads_with_its_end_token_is_mended_with_a_warning(causal, tmp_path):
    reward = load_reward_model(causal("llama"))
    reward.model.config.pad_token_id = END
    reward.tokenizer.pad_token = "</s>"
    expected = last_token_scores(reward.model, SEQUENCES)
    folder = save(reward, tmp_path / "foreign")
    with pytest.warns(UserWarning, match="pads with '<|endoftext|>'"):
        mended = load_reward_model(folder, dtype="float32", device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(save(mended, tmp_path / "mended")).eval()
    torch.testing.assert_close(batched_scores(model, SEQUENCES, 0), expected, atol=1e-5, rtol=1e-4)


def test_more_than_one_label_is_refused(tiny_model, tmp_path):
    tiny_model("llama", num_labels=2).save_pretrained(tmp_path)
    word_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 scores"):
        load_reward_model(tmp_path)


def test_an_architecture_without_the_layout_is_named(causal):
    with pytest.raises(ModelError, match=r"tiny granite: transformers has no"):
        load_reward_model(causal("granite"))


def test_an_adapter_has_to_be_merged_first(causal):
    loaded = causal("llama")
    add_lora(loaded.model, rank=2)
    with pytest.raises(ModelError, match="adapter"):
        load_reward_model(loaded)


@pytest.mark.parametrize(("trained", "asked"), [("step", "completion"), ("completion", "step")])
def test_a_head_that_judges_the_other_is_refused(causal, tmp_path, trained, asked):
    reward = load_reward_model(causal("llama"), scores_each=trained)
    folder = save(reward, tmp_path)
    assert load_reward_model(folder, scores_each=trained).model.config.scores_each == trained
    for name in (reward, folder):
        with pytest.raises(ModelError, match=f"scores each {trained}, not each {asked}"):
            load_reward_model(name, scores_each=asked)


def test_a_head_that_does_not_say_what_it_judges_is_taken(causal):
    reward = load_reward_model(causal("llama"))
    del reward.model.config.scores_each
    assert load_reward_model(reward, scores_each="step").model.config.scores_each == "step"
