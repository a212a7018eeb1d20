"""KaSA: drop a weight's smallest singular components, then adapt it in SVD form.

:arxiv: 2412.06071
:moves: training data -> an adapter beside the weights
:access: weights, training data
:reversible: yes
:context: no

Each target layer `W = U S V^T` first loses its r smallest singular components, taken to be noise or knowledge
that does not help. The update is then learnt in the form of an SVD with a diagonal d that can switch each
direction on or off:

    W_world = sum over the k - r largest of s_i u_i v_i^T,   k = min(in, out)
    y       = W_world x + bias + (alpha / r) B (d * (A x))
    loss    = task + beta * mean |d|^2 + gamma * mean (|B^T B - I|_F + |A A^T - I|_F),  means over layers

A starts as LoRA's does, d standard normal, B zero: the first forward pass is that of the truncated base.

The layer arithmetic is PEFT's (a `LoraConfig` with `KasaConfig`), and adapters saved here load there, unless
`truncate_rank` is not r: PEFT always drops r. Around it:

* The regulariser reaches any training loop: in training mode the model adds it to the loss it returns, as
  PEFT's AdaLoRA does, so a plain `Trainer` includes it. PEFT leaves it to a private method. With gradient
  accumulation each batch adds its share, together once per update.
* The regulariser is averaged over layers, as in the authors' training script, so that beta and gamma mean the
  same at every depth (`reduction="sum"` is PEFT's). Its Gram matrices are the paper's r x r ones; the
  authors' code uses the large ones, which no rank below the width can drive to zero.
* k - r components are kept whatever the layer's shape. The authors' code keeps `in - r`, which truncates
  nothing where `in >= out + r`. The rank cut away may differ from the adapter's (`truncate_rank`).
* Truncation can be undone: `restore` returns the base model bit for bit. The dropped factors alone could not,
  since W_world was rounded; so the weights themselves are kept, on the CPU.
* An adapter records a hash of the weights it was trained on: `load` truncates the same base again, leaves one
  that is truncated already, and refuses any other.
* Unmerging returns the exact weights from before the merge, in bfloat16 too.

Where a weight's tail is signal, truncation costs accuracy, and spectra do not always show it: inputs can be
large along directions whose singular values are small. Dropping 8 components of the query projections leaves
the perplexity of SmolLM2-135M at 18.7; of its narrow value projections, a common target, it makes it 1046 (of
`up_proj` 38). Measure the model right after `kasa`, before training; `truncate_rank=0` drops nothing.

    model, tokenizer = transfuse.load("smollm2-135m")
    adapted = kasa(model, r=8, target_modules=["q_proj", "o_proj"])
    fit(adapted, encode_examples(tokenizer, pairs), lr=4e-4, epochs=5)
    save(adapted, "adapter")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from transfuse.adapt._arguments import check_number
from transfuse.adapt._base import (
    LayerSpectrum,
    Targets,
    check_modules,
    fill_adapter,
    layer_spectrum,
    linear_targets,
    read_adapter,
    refuse_adapted,
    target_names,
    task_type,
    weights_hash,
    write_adapter,
)
from transfuse.adapt._kasa_layers import (
    KasaLinear,
    KasaModel,
    Record,
    Settings,
    base_before,
    kasa_delta,
    kasa_penalty,
    kasa_regularizer,
    read_config,
)
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.runs import check_positive
from transfuse.core.training import seeded

__all__ = [
    "LayerSpectrum",
    "Truncated",
    "kasa",
    "kasa_delta",
    "kasa_penalty",
    "kasa_regularizer",
    "load",
    "restore",
    "save",
    "spectral_report",
    "truncate",
]


class Truncated(NamedTuple):
    """What `truncate` returns.

    Attributes:
        world: `[n, m]` in the weight's dtype: the weight without its smallest components.
        left: `[n, rank]` float32 (float64 for a float64 weight): U_d S_d of the components dropped.
        right: `[rank, m]`: V_d^T. `world + left @ right` is the weight up to rounding.
        singular_values: `[k]`, all of them, largest first.
    """

    world: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    singular_values: torch.Tensor


def truncate(weight: torch.Tensor, rank: int) -> Truncated:
    """Remove the `rank` smallest singular components of a weight (KaSA, section 3.2).

    The SVD runs in float32 at least, since half precision has none on the CPU.

    Args:
        weight: `[n, m]`, any floating dtype; not changed.
        rank: Components to drop, from 0 to min(n, m) - 1.

    Raises:
        BadInput: `rank` is out of range, or the weight is not a finite matrix.
    """
    if weight.dim() != 2 or not bool(torch.isfinite(weight).all()):
        raise BadInput("weight", tuple(weight.shape), "is not a finite matrix", "check the model's weights")
    smaller = min(weight.shape)
    if not 0 <= rank < smaller:
        raise BadInput("rank", rank, f"is not below min(n, m) = {smaller}", "keep at least one component")
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    left, right = u[:, smaller - rank :] * s[smaller - rank :], v[smaller - rank :]
    return Truncated((exact - left @ right).to(weight.dtype), left, right, s)


def kasa(
    model: PreTrainedModel | nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    target_modules: Targets = None,
    beta: float = 1e-4,
    gamma: float = 1e-3,
    reduction: Literal["mean", "sum"] = "mean",
    truncate_rank: int | None = None,
    keep_base: Literal["copy", "none"] = "copy",
    dropout: float = 0.0,
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Truncate a model's weights in place and put KaSA adapters on them.

    Args:
        model: A transformers model, or any module with linear layers (name them in `target_modules`). Its
            target weights change; `restore` brings them back.
        r: Rank of the update.
        alpha: The update is scaled by alpha / r.
        target_modules: Names or endings of linear layers, a regular expression, or "all-linear"; None takes
            PEFT's default for the architecture (query and value projections, for most).
        beta: Weight of the diagonal's norm; 1e-4 is the paper's for CoLA and SST-2 (0.1 for MRPC).
        gamma: Weight of orthogonality.
        reduction: Whether the regulariser is averaged or summed over layers.
        truncate_rank: Singular components to drop; None drops r, as the paper does, and 0 none.
        keep_base: "copy" keeps the target weights in CPU memory for `restore`; "none" does not.
        dropout: On the adapter's input.
        modules_to_save: Further modules to train whole. The new head of a sequence classifier always is.
        seed: Of the adapter's initial values.

    Returns:
        A PEFT model: save it with `save`, merge it with `merge_and_unload`, undo it with `restore`.

    Raises:
        BadInput: a rank that is not below a target's smaller side, a negative weight, no target by that name.
        NotApplicable: a target that is no plain linear layer, quantised, tied, or on the meta device.
    """
    check_number("alpha", alpha)
    check_number("beta", beta, zero=True)
    check_number("gamma", gamma, zero=True)
    if reduction not in ("mean", "sum"):
        raise BadInput("reduction", reduction, "is not known", 'use "mean" or "sum"')
    if keep_base not in ("copy", "none"):
        raise BadInput("keep_base", keep_base, "is not known", 'use "copy" or "none"')
    check_positive(r=r)
    if truncate_rank is not None and not isinstance(truncate_rank, int):
        raise BadInput("truncate_rank", truncate_rank, "is not a whole number", "give 0 or more")
    check_number("dropout", dropout, zero=True)
    if dropout >= 1:
        raise BadInput("dropout", dropout, "is not in [0, 1)", "give a probability")
    rank = r if truncate_rank is None else truncate_rank
    settings = Settings(beta=beta, gamma=gamma, truncate_rank=rank, reduction=reduction)
    refuse_adapted(model)
    config = LoraConfig(
        task_type=task_type(model),
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_names(model, target_modules),
        modules_to_save=check_modules(model, modules_to_save),
        kasa_config=settings,
    )
    return _attach(model, config, settings, keep_base=keep_base, seed=seed)


def _attach(
    model: nn.Module,
    config: LoraConfig,
    settings: Settings,
    *,
    keep_base: str,
    seed: int,
    truncated: bool = False,
) -> PeftModel:
    """Truncate the targets, unless they are, and wrap the model. Checks come before the first change."""
    layers = linear_targets(model, config.target_modules, config.modules_to_save)
    for name, layer in layers.items():
        smaller = min(layer.weight.shape)
        for argument, rank in (("r", config.r), ("truncate_rank", settings.truncate_rank)):
            if not 0 <= rank < smaller:
                problem = f"is not in [0, {smaller}), {smaller} being the smaller side of {name}"
                raise BadInput(argument, rank, problem, "give a smaller rank or other target_modules")
    records: dict[str, Record] = {}
    worlds: dict[str, torch.Tensor] = {}
    if not truncated:
        dtype = next(iter(layers.values())).weight.dtype
        settings.base_dtype = str(dtype).removeprefix("torch.")
        settings.base_hash = weights_hash(layers, dtype)
        for name, layer in layers.items():
            try:
                worlds[name], _, _, values = truncate(layer.weight, settings.truncate_rank)
            except BadInput as error:
                raise BadInput("model", name, error.problem, error.remedy) from error
            original = layer.weight.detach().to("cpu", copy=True) if keep_base == "copy" else None
            records[name] = Record(original, values.cpu())
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    config._register_custom_module({nn.Linear: KasaLinear})
    with seeded(seed):
        adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, world in worlds.items():
            layers[name].weight.copy_(world)
    if worlds:
        settings.world_hash = weights_hash(layers, dtype)
    # LoraModel is what PEFT builds for this configuration. The subclass adds nothing but its forward, which the
    # regulariser needs to reach loops that know nothing of it.
    adapted.base_model.__class__ = KasaModel
    adapted.base_model.trainable_before = wanted
    for name, record in records.items():
        adapted.base_model.model.get_submodule(name).record = record
    return adapted


def restore(model: PeftModel) -> Any:
    """Take the adapters off and put the weights from before truncation back, bit for bit.

    Works on merged models too. Modules trained whole (`modules_to_save`) go back as well, and parameters
    require gradients again where they did.

    Returns:
        The base model.

    Raises:
        BadInput: the original weights were not kept, or the model has no KaSA layer.
    """
    layers = [m for m in _tuner(model).modules() if isinstance(m, KasaLinear)]
    if any(layer.record is None or layer.record.original is None for layer in layers):
        remedy = 'load the base model again, or adapt with keep_base="copy"'
        raise BadInput("model", type(model).__name__, "kept no copy of the weights", remedy)
    return base_before(model)


def _tuner(model: Any) -> KasaModel:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, KasaModel):
        problem = "has no KaSA layer made here"
        raise BadInput("model", type(model).__name__, problem, "pass what kasa() returned")
    return tuner


def save(model: PeftModel, folder: str | os.PathLike[str]) -> Path:
    """Write the adapter: PEFT's files, which PEFT loads too, with the hash of the base they belong to.

    Raises:
        BadInput: the folder cannot be written, or the model has no KaSA layer.
    """
    _tuner(model)
    config = model.peft_config[model.active_adapter]
    dropped = config.kasa_config.truncate_rank
    summary = "A KaSA adapter. Loading it truncates the base model's target weights."
    if dropped != config.r:
        summary += f" PEFT alone would drop {config.r} of their components, where {dropped} were dropped."
    return write_adapter(
        model,
        folder,
        method="kasa",
        arguments=asdict(config.kasa_config),
        summary=summary,
        usage='model = transfuse.adapt.kasa.load(base_model, "this folder")',
    )


def load(
    model: PreTrainedModel | nn.Module,
    folder: str | os.PathLike[str],
    *,
    keep_base: Literal["copy", "none"] = "copy",
    trainable: bool = False,
) -> PeftModel:
    """Put a saved adapter on its base model, truncating the base as it was for training.

    A base that is truncated already (the model that was adapted, with its adapter taken off) is left as it
    is.

    Args:
        model: The base; its target weights change.
        folder: Written by `save`, or by PEFT.
        keep_base: As in `kasa`.
        trainable: Whether training is to go on.

    Raises:
        BadInput: no adapter there, or not a KaSA adapter.
        NotApplicable: one of PEFT's with options that `kasa` does not have (ranks per layer, say).
        CorruptFile: it cannot be read.
        IncompatibleModels: the model's weights are not those the adapter was trained on, or its tensors do not
            fit. The model is left as it was.
    """
    refuse_adapted(model)
    stored, tensors = read_adapter(folder)
    config, settings = read_config(stored, folder)
    layers, truncated = linear_targets(model, config.target_modules, config.modules_to_save), False
    if settings.base_hash:
        seen = weights_hash(layers, getattr(torch, settings.base_dtype))
        truncated = seen == settings.world_hash != settings.base_hash
        if seen != settings.base_hash and not truncated:
            problem = "was trained on other weights than this model's"
            raise IncompatibleModels("folder", str(folder), problem, "load the base model it was trained on")
    adapted = _attach(model, config, settings, keep_base="copy", seed=0, truncated=truncated)
    try:
        fill_adapter(adapted, tensors, folder, "lora_")
    except IncompatibleModels:
        base_before(adapted)
        raise
    for layer in adapted.modules():
        if keep_base == "none" and isinstance(layer, KasaLinear) and layer.record is not None:
            layer.record.original = None
    adapted.base_model.requires_grad_(False)
    adapted.set_adapter(adapted.active_adapter, inference_mode=not trainable)
    return adapted.eval()


def spectral_report(
    model: PreTrainedModel | nn.Module, *, rank: int | None = None, target_modules: Targets = None
) -> list[LayerSpectrum]:
    """What truncation drops, layer by layer: on a model that `kasa` adapted, or on one before it is.

    Args:
        model: An adapted model (its recorded spectra are used), or a base model.
        rank: Components to drop; None takes the adapter's, or 8.
        target_modules: For a base model: as in `kasa`.

    Raises:
        BadInput: `rank` is not below a layer's smaller side; the adapted model was not truncated here.
    """
    inner: Any = _tuner(model).model if isinstance(model, PeftModel) else model
    spectra = {
        name: layer.record.singular_values
        for name, layer in inner.named_modules()
        if isinstance(layer, KasaLinear) and layer.record is not None
    }
    cut = 8
    if isinstance(model, PeftModel):
        cut = model.peft_config[model.active_adapter].kasa_config.truncate_rank
        if not spectra or (cut == 0 and rank is None):
            raise BadInput("model", type(model).__name__, "dropped nothing here", "give the base, or a rank")
    else:
        layers = linear_targets(model, target_names(model, target_modules))
        spectra = {
            name: torch.linalg.svdvals(layer.weight.detach().float()) for name, layer in layers.items()
        }
    cut = cut if rank is None else rank
    return [
        layer_spectrum(name, inner.get_submodule(name).weight, values, cut)
        for name, values in spectra.items()
    ]
