"""Models from scratch load in plain transformers with the same ids and logits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.cli.model import NewSettings, new
from trueup.errors import ModelError, SettingsError
from trueup.models.load import load_model
from trueup.models.scratch import FAMILIES, character_tokenizer, make_model

CHARACTERS = "ab 1+=\né"
TEMPLATE = "{% for m in messages %}{{ m.content }}={% endfor %}"
SMALL = {"characters": CHARACTERS, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_reloads_in_plain_transformers_with_the_same_ids_and_logits(tmp_path, family):
    folder = make_model(tmp_path / "model", family=family, chat_template=TEMPLATE, intermediate_size=24, **SMALL)
    ours = load_model(folder, dtype="float32", device="cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    text = "1+1=\n a  é"
    ids = tokenizer(text).input_ids
    assert ids == character_tokenizer(CHARACTERS, max_length=32)(text).input_ids == ours.tokenizer(text).input_ids
    assert ids == [3 + CHARACTERS.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits
        assert torch.equal(logits, ours.model(torch.tensor([ids])).logits)
    assert logits.shape == (1, len(text), len(CHARACTERS) + 3)
    messages = [{"role": "user", "content": "1+1"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "1+1="

    config = model.config
    assert any(24 in p.shape or 48 in p.shape for p in model.parameters()), "the feed-forward width is another one"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 1, 2)
    assert config.max_position_embeddings == tokenizer.model_max_length == 32
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_special_tokens_and_unknown_characters():
    tokenizer = character_tokenizer("ab", max_length=8)
    assert tokenizer("az<end>b").input_ids == [3, 1, 2, 4]
    assert tokenizer("zz").input_ids == [1, 1], "every unknown character is one token"
    assert tokenizer.decode([3, 2, 4], skip_special_tokens=True) == "ab"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_the_seed_fixes_the_weights_and_the_global_stream_is_left_alone(tmp_path):
    def digest(folder):
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = digest(make_model(tmp_path / "a", seed=3, **SMALL))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert digest(make_model(tmp_path / "b", seed=3, **SMALL)) == first
    assert digest(make_model(tmp_path / "c", seed=4, **SMALL)) != first


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"family": "bert"}, "family"),
        ({"characters": ""}, "characters"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_heads": 3}, "hidden_size"),
        ({"hidden_size": 6}, "hidden_size"),
    ],
)
def test_what_makes_no_model_is_named(tmp_path, changed, named):
    with pytest.raises(SettingsError) as error:
        make_model(tmp_path / "model", **(SMALL | changed))
    assert error.value.where == named
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="in use"):
        make_model(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        make_model(tmp_path / "model", **SMALL)
    assert not list(tmp_path.iterdir())


def test_command_writes_a_model_and_says_what_it_is(tmp_path, capsys):
    text, template = tmp_path / "text.txt", tmp_path / "template.jinja"
    text.write_text("2+2=4\n")
    template.write_text(TEMPLATE)
    folder = tmp_path / "model"
    new(
        NewSettings(
            output=str(folder),
            characters_from=(str(text),),
            chat_template=str(template),
            hidden_size=16,
            num_layers=1,
            num_heads=2,
        )
    )
    assert f"{folder}: llama" in capsys.readouterr().out
    loaded = load_model(folder, device="cpu")
    assert len(loaded.tokenizer) == 3 + len(set("2+2=4\n"))
    assert loaded.tokenizer.chat_template == TEMPLATE


def test_command_names_the_file_that_it_cannot_read(tmp_path):
    with pytest.raises(SettingsError) as error:
        new(NewSettings(output=str(tmp_path / "model"), characters_from=(str(tmp_path / "absent.txt"),)))
    assert "absent.txt" in str(error.value)


def test_settings_of_the_command_come_without_torch():
    code = "import sys, trueup.cli.model; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_families_of_the_command_are_those_of_the_library():
    assert get_args(get_type_hints(NewSettings)["family"]) == FAMILIES
