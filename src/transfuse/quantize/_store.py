"""Applying a bit plan to a model, and writing and reading models that carry one."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import models
from ..core.errors import BadInput
from ..core.files import atomic_dir, check_writable
from ..core.lineage import write_lineage
from ..core.packed import PACKED, Codes, read_packed, write_packed
from ..core.taps import decoder_layers
from ._base import PLAN_KEY, SizeReport, Slot, layer_slots, module_names, refuse_quantized
from ._costs import layer_bytes, matrices_of
from ._plan import BitPlan
from ._rounding import FULL, check_rounding, check_values, codes_of, hqq_codes, hqq_layer, rtn_codes

_STEPS = "transfuse_steps"  # attribute of a module: steps and offsets of its rounded matrices

__all__ = ["Storage", "apply_bit_plan", "load", "plan_of", "save"]

Storage = Literal["plain", "packed"]


def plan_of(model: Any) -> BitPlan:
    """The plan a model carries in its configuration.

    Raises:
        BadInput: it carries none.
    """
    found = getattr(model.config, PLAN_KEY, None)
    if found is None:
        raise BadInput("model", type(model).__name__, "carries no bit plan", "apply one: apply_bit_plan")
    return BitPlan.from_dict(found)


@torch.no_grad()
def apply_bit_plan(
    model: Any,
    plan: BitPlan,
    backend: str | None = None,
) -> SizeReport:
    """Round a model's layers in place, and write the plan into its configuration.

    "rtn" puts rounded values into the layers there are. "hqq" puts hqq's own layers, packed in memory, in the place of
    linear layers. Layers of 16 bits are left alone.

    Args:
        model: A transformers model.
        plan: From `allocate_bits`.
        backend: "rtn" or "hqq"; the plan's by default.

    Returns:
        The sizes, from the rounded matrices themselves.

    Raises:
        BadInput: a plan of another model, a model that is quantized already, groups that do not divide a row, a matrix
            that cannot be rounded. Nothing has changed then.
        NotApplicable: matrices that hqq cannot hold.
        MissingExtra: hqq is not installed.
    """
    refuse_quantized(model)
    names, layers = decoder_layers(model), layer_slots(model)
    modules = module_names(names, layers)
    backend = plan.backend if backend is None else backend
    group = plan.group_size
    check_rounding(layers, plan.bits, backend, group)
    sizes = tuple(sum(slot.parameter.numel() for slot in slots) for slots in layers)
    if set(plan.sizes) != {1} and plan.sizes != sizes:  # ones stand for unknown sizes
        raise BadInput("plan", plan.sizes, "has the sizes of another model", "make a plan for this one")
    check_values(layers, plan.bits, backend, group)
    matrices = matrices_of(layers)
    stored = tuple(layer_bytes(each, b, backend, group) for each, b in zip(matrices, plan.bits, strict=True))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    before = after = 0
    for slots, bits in zip(layers, plan.bits, strict=True):
        for slot in slots:
            size = slot.parameter.numel() * slot.parameter.element_size()
            before += size
            after += size if bits == FULL else _round(model, slot, bits, backend, group)
    kept = BitPlan(plan.bits, sizes, tuple(names), modules, group, backend, plan.scored, stored)
    setattr(model.config, PLAN_KEY, kept.to_dict())
    return SizeReport(kept.average_bits, 8 * after / sum(sizes), before, after, whole - before)


def _round(model: Any, slot: Slot, bits: int, backend: str, group: int | None) -> int:
    """Round one matrix in place; its bytes when packed."""
    if backend == "rtn":
        codes = codes_of(slot, bits, backend, group)
        slot.parameter.copy_(codes.values(slot.parameter.dtype))
        slot.module.__dict__.setdefault(_STEPS, {})[slot.attribute] = (codes.step, codes.offset)
        return codes.bytes
    assert isinstance(slot.module, nn.Linear)
    layer = hqq_layer(slot.module, bits, group)
    _swap(model, slot.owner, layer)
    return hqq_codes(layer).bytes


def _swap(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


# --- folders -----------------------------------------------------------------------------------------------


def save(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    storage: Storage = "plain",
    measurements: Mapping[str, Any] | None = None,
    slug: str = "layerwise-quant",
) -> Path:
    """Write a quantized model as a folder, in one rename, with its plan in config.json.

    Args:
        model: After `apply_bit_plan`.
        folder: Replaced.
        tokenizer: Saved beside the weights.
        storage: "plain": the rounded values as ordinary weights, of the model's usual size, which `from_pretrained`
            of transformers reads. "packed": without gaps, which `load` here and `transfuse.load` read.
        measurements: For the folder's record.
        slug: Of the method, for the record.

    Raises:
        BadInput: a model without a plan, an unknown storage, a folder that cannot be written.
    """
    plan = plan_of(model)
    if storage not in ("plain", "packed"):
        raise BadInput("storage", storage, "is not known", 'use "plain" or "packed"')
    target = check_writable(folder, "folder")
    rounded = {name: layer for name, layer in model.named_modules() if hasattr(layer, "W_q")}
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{owner}.") for owner in rounded)
    }
    kept |= {f"{name}.bias": layer.bias for name, layer in rounded.items() if layer.bias is not None}
    with atomic_dir(target) as work:
        if storage == "plain":
            values = {f"{name}.weight": layer.dequantize() for name, layer in rounded.items()}
            model.save_pretrained(work, state_dict={**kept, **values})
        else:
            _write_packed(work, model, plan, rounded, kept)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        own = storage == "packed" and plan.backend == "hqq"  # hqq's layers
        home = f"from transfuse{'.quantize.layerwise_quant' if own else ''} import load"
        write_lineage(
            work,
            method=slug,
            arguments={"storage": storage},
            measurements=measurements,
            summary=f"Layers rounded to {plan.average_bits:.3g} bits per weight on average ({plan.backend}, "
            f"groups of {plan.group_size}); the bits of each stand in config.json under `{PLAN_KEY}`.",
            usage=f'{home}\nmodel, tokenizer = load("this folder")',
        )
    return target


def _write_packed(
    work: Path, model: Any, plan: BitPlan, rounded: Mapping[str, Any], kept: dict[str, Tensor]
) -> None:
    """Codes of every rounded matrix, and the other tensors."""
    matrices: dict[str, Codes] = {f"{name}.weight": hqq_codes(layer) for name, layer in rounded.items()}
    if plan.backend == "rtn":
        for slots, bits in zip(layer_slots(model), plan.bits, strict=True):
            for slot in slots if bits != FULL else ():
                matrices[slot.name] = _codes_again(slot, bits, plan.group_size)
    others, places = {}, set()
    for name, tensor in kept.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if name not in matrices and place not in places:  # of tied tensors the first
            others[name] = tensor
            places.add(place)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(work)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(work)
    write_packed(work, matrices, others, {"plan": plan.to_dict()})


def _codes_again(slot: Slot, bits: int, group: int | None) -> Codes:
    """The codes of a matrix that was rounded to nearest, from its values and the steps that were kept.

    The code nearest to a value gives that value again, also where half precision had rounded it. Without steps, or if
    the values were changed since, they are rounded anew.
    """
    step, offset = slot.module.__dict__.get(_STEPS, {}).get(slot.attribute, (None, None))
    if step is not None:
        data = slot.parameter.detach()
        codes = rtn_codes(data, step.to(data.device), offset.to(data.device), bits, slot.axis)
        if torch.equal(codes.values(data.dtype), data):
            return codes
    return codes_of(slot, bits, "rtn", group)


def load(folder: str | os.PathLike[str], **options: Any) -> models.Loaded:
    """A model and its tokenizer from a folder that `save` wrote; of HQQ's packed folders with hqq's own layers.

    Args:
        folder: Of a quantized model.
        **options: As in `transfuse.load`.

    Raises:
        BadInput: the folder carries no plan.
        CorruptFile: it cannot be read.
    """
    loaded = models.load(folder, **options)
    plan = plan_of(loaded.model)
    if plan.backend == "hqq" and (Path(folder) / PACKED).is_file():
        for name, codes in read_packed(folder)[0].items():
            owner = name.rpartition(".")[0]
            plain = loaded.model.get_submodule(owner)
            layer = hqq_layer(codes, bias=plain.bias, device=plain.weight.device)
            _swap(loaded.model, owner, layer)
    return loaded
