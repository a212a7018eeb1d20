"""Round-to-nearest and HQQ: what a matrix becomes at a number of bits, and the layers that hold the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, NotApplicable
from ..core.extras import require
from ..core.packed import Codes
from ._base import Slot

__all__ = [
    "BACKENDS",
    "FULL",
    "Versions",
    "check_rounding",
    "check_values",
    "codes_of",
    "hqq_codes",
    "hqq_layer",
    "rtn",
    "rtn_codes",
]

BACKENDS = ("rtn", "hqq")
FULL = 16
"""The number of bits that means: leave the layer as it is."""


def rtn(
    weight: Tensor,
    bits: int,
    group_size: int | None = 32,
    *,
    axis: int = -1,
    step_dtype: torch.dtype | None = None,
) -> Codes:
    """Asymmetric round-to-nearest: w ~ q s + m with s = (max - min) / (2^b - 1), m = min, per group of a row.

    q = round((w - m) / s), clamped to [0, 2^b - 1]. Computed in float32 (float64 for float64 weights).

    Args:
        weight: Two axes or more, floating.
        bits: 1 to 8.
        group_size: Neighbours along `axis` that share s and m; None for whole rows.
        axis: The one that runs over inputs.
        step_dtype: Round s and m to this dtype before q is found, so that what is stored is what was measured.

    Raises:
        BadInput: bits out of range, groups that do not fill a row, values that are not finite.
    """
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise BadInput("bits", bits, "is not a whole number from 1 to 8", "give a bit width")
    if weight.dim() < 2 or not weight.is_floating_point():
        raise BadInput(
            "weight", f"{weight.dtype} {tuple(weight.shape)}", "is no matrix of numbers", "give one"
        )
    group = weight.shape[axis] if group_size is None else group_size
    _check_group(group, weight.shape[axis], "weight")
    return rtn_codes(weight, *_steps(weight, bits, group, axis, step_dtype, "weight"), bits, axis)


def _steps(
    weight: Tensor, bits: int, group: int, axis: int, dtype: torch.dtype | None, name: str
) -> tuple[Tensor, Tensor]:
    """Steps and offsets `[rows, groups]`."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).movedim(axis, -1)
    groups = wide.shape[-1] // group
    grouped = wide.reshape(-1, groups, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    step = (high - low) / (2**bits - 1)
    if dtype is not None:
        step, low = step.to(dtype), low.to(dtype)
    if not bool(torch.isfinite(step).all() and torch.isfinite(low).all()):
        raise BadInput(
            name, tuple(weight.shape), f"is not finite in {step.dtype}", "check the model's weights"
        )
    return step.view(-1, groups), low.view(-1, groups)


def rtn_codes(weight: Tensor, step: Tensor, offset: Tensor, bits: int, axis: int = -1) -> Codes:
    """The codes nearest to `weight` for given steps and offsets `[rows, groups]`."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).movedim(axis, -1)
    grouped = wide.reshape(*step.shape, -1)
    by, start = step.to(wide.dtype)[..., None], offset.to(wide.dtype)[..., None]
    codes = ((grouped - start) / torch.where(by > 0, by, 1.0)).round().clamp_(0, 2**bits - 1)
    return Codes(codes.to(torch.uint8).flatten(1), step, offset, bits, tuple(weight.shape), axis)


def _check_group(group: int, width: int, where: str) -> None:
    if not isinstance(group, int) or isinstance(group, bool) or group < 1 or width % group:
        fitting = [g for g in (128, 64, 32, 16, 8) if width % g == 0]
        raise BadInput(
            "group_size", group, f"does not divide the rows of {width} of {where}",
            f"use {' or '.join(map(str, fitting))}" if fitting else "use None for whole rows",
        )  # fmt: skip


def check_rounding(
    layers: Sequence[Sequence[Slot]], bits: Sequence[int], backend: str, group_size: int | None
) -> None:
    """Check, before anything changes, that every layer can be rounded to its bits.

    Raises:
        BadInput: unknown backend, bits out of range, groups that do not divide a row.
        NotApplicable: a matrix that HQQ cannot hold.
        MissingExtra: hqq is not installed.
    """
    if backend not in BACKENDS:
        raise BadInput("backend", backend, "is not known", f"use one of {', '.join(BACKENDS)}")
    if len(bits) != len(layers):
        raise BadInput(
            "plan", f"{len(bits)} layers", f"is not for a model of {len(layers)}", "make a plan for it"
        )
    allowed = (1, 2, 3, 4, 5, 6, 8, FULL) if backend == "hqq" else (*range(1, 9), FULL)
    if wrong := sorted(set(bits) - set(allowed)):
        raise BadInput("bits", wrong, f"cannot be held by {backend}", f"use {', '.join(map(str, allowed))}")
    if backend == "hqq" and set(bits) - {FULL}:
        require("hqq", extra="quantize")
    for slots, width in zip(layers, bits, strict=True):
        for slot in slots if width != FULL else ():
            group = slot.width if group_size is None else group_size
            _check_group(group, slot.width, slot.name)
            if backend == "hqq":
                _check_hqq(slot, width, group)


def _check_hqq(slot: Slot, bits: int, group: int) -> None:
    if not isinstance(slot.module, nn.Linear):
        raise NotApplicable(
            "backend", "hqq", f"holds linear layers only, not {slot.name}", 'use backend="rtn"'
        )
    groups = slot.parameter.numel() // group
    together = {1: 8, 2: 4, 4: 2}.get(bits, 1)  # groups that hqq packs into one byte; it would drop the rest
    if group % 8 or groups % together:
        problem = f"cannot pack {groups} groups of {group} at {bits} bits in {slot.name}"
        raise NotApplicable("backend", "hqq", problem, 'choose another group_size, or backend="rtn"')


@torch.no_grad()
def check_values(
    layers: Sequence[Sequence[Slot]], bits: Sequence[int], backend: str, group_size: int | None
) -> None:
    """Check, before anything changes, that the weights of every layer to be rounded are numbers that can be.

    Raises:
        BadInput: one is not finite, or a step or an offset exceeds float16.
    """
    for slots, width in zip(layers, bits, strict=True):
        for slot in slots if width != FULL else ():
            weight, group = slot.parameter, slot.width if group_size is None else group_size
            if backend == "rtn":
                _steps(weight, width, group, slot.axis, torch.float16, slot.name)
            elif not bool(torch.isfinite(weight).all()):
                raise BadInput(slot.name, tuple(weight.shape), "is not finite", "check the model's weights")


def codes_of(slot: Slot, bits: int, backend: str, group_size: int | None) -> Codes:
    """A slot's matrix at `bits`; steps and offsets of round-to-nearest in float16, of HQQ in the weight's dtype."""
    if backend == "rtn":
        return rtn(slot.parameter, bits, group_size, axis=slot.axis, step_dtype=torch.float16)
    assert isinstance(slot.module, nn.Linear)
    return hqq_codes(hqq_layer(slot.module, bits, group_size))


# --- HQQ ---------------------------------------------------------------------------------------------------


def _settings(bits: int, group_size: int | None) -> dict[str, Any]:
    from hqq.core.quantize import BaseQuantizeConfig

    settings: dict[str, Any] = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    return settings


@torch.no_grad()
def hqq_layer(source: nn.Linear | Codes, bits: int = 0, group_size: int | None = None, **options: Any) -> Any:
    """A layer of hqq's own, from a linear layer (its scales and zeros are searched for) or from codes found earlier.

    Args:
        source: A linear layer, which is left alone, or `Codes` that `hqq_codes` returned.
        bits: Of a linear layer.
        group_size: Of a linear layer.
        **options: With codes: `bias` and `device`.

    Raises:
        MissingExtra: hqq is not installed.
    """
    library = require("hqq.core.quantize", extra="quantize")
    if isinstance(source, nn.Linear):
        weight = source.weight
        layer: Any = library.HQQLinear(
            source,
            _settings(bits, group_size),
            compute_dtype=weight.dtype,
            device=str(weight.device),
            del_orig=False,
        )
        layer.linear_layer = None
        return layer
    device, bias = str(options.get("device", "cpu")), options.get("bias")
    group = source.codes.numel() // source.step.numel()
    settings = _settings(source.bits, group)
    made: Any = library.HQQLinear(
        None, settings, compute_dtype=source.step.dtype, device=device, initialize=False
    )
    packing = library.Quantizer.bit_to_packing[source.bits]
    made.W_q = library.Quantizer.pack[packing](source.codes.view(-1, group)).to(device)
    made.meta = {
        "nbits": source.bits, "group_size": group, "shape": torch.Size(source.shape), "axis": 1, "packing": packing,
        "scale": source.step.reshape(-1, 1).to(device), "zero": source.offset.reshape(-1, 1).to(device),
        "unpack_view_dtype": library.Quantizer.unpack_view_dtype[packing], "view_as_float": False,
        "quant_scale": False, "quant_zero": False, "compute_dtype": source.step.dtype,
    }  # fmt: skip
    made.bias = None if bias is None else bias.detach().clone().to(device, source.step.dtype)
    made.out_features, made.in_features = source.shape
    made.axis, made.channel_wise = 1, True
    made.cuda(device)  # its way of finishing, on any device
    made.ready = True
    return made


def hqq_codes(layer: Any) -> Codes:
    """The whole numbers, scales and zeros of hqq's layer: w = (q - zero) scale."""
    meta = layer.meta
    shape, group = tuple(meta["shape"]), meta["group_size"]
    rows = shape[0] * shape[1] // group
    codes = layer.unpack(dtype=torch.uint8)[:rows]  # three bits are packed ten at a time and filled up
    groups = shape[1] // group
    step, zero = (meta[key].reshape(shape[0], groups).detach().clone() for key in ("scale", "zero"))
    return Codes(codes.reshape(shape).contiguous(), step, zero, int(meta["nbits"]), shape, -1, centred=True)


# --- trying layers at several widths -----------------------------------------------------------------------


class Versions:
    """The layers of a model at several numbers of bits, found when first asked for; switching costs nothing.

    Args:
        layers: Slots per layer.
        backend: Of the rounding.
        group_size: Of the rounding.
        keep: Remember the rounded matrices: faster where a layer is tried often, and as much memory again per width.

    Inside of `with versions:` layers are switched by `set`; at the end every one is what it was, bit for bit.
    """

    def __init__(
        self, layers: Sequence[Sequence[Slot]], backend: str, group_size: int | None, *, keep: bool = True
    ):
        self.layers, self.backend, self.group_size, self.keep = layers, backend, group_size, keep
        self._found: dict[tuple[int, int], list[Tensor]] = {}
        self._original: list[list[Tensor]] = []

    def __enter__(self) -> Versions:
        self._original = [[slot.parameter.data for slot in slots] for slots in self.layers]
        return self

    def __exit__(self, *error: object) -> None:
        for index in range(len(self.layers)):
            self.set({index: FULL})
        self._found.clear()
        self._original = []

    def set(self, bits: Mapping[int, int]) -> None:
        """Give layers (by number) their bits; 16 is the original."""
        for index, width in bits.items():
            for slot, data in zip(self.layers[index], self._values(index, width), strict=True):
                slot.parameter.data = data

    @contextlib.contextmanager
    def only(self, bits: Mapping[int, int]) -> Iterator[None]:
        """Give some layers their bits for the length of a block, then the original."""
        self.set(bits)
        try:
            yield
        finally:
            self.set(dict.fromkeys(bits, FULL))

    def _values(self, index: int, width: int) -> list[Tensor]:
        if width == FULL:
            return self._original[index]
        if (index, width) in self._found:
            return self._found[index, width]
        found = []
        for slot, data in zip(self.layers[index], self._original[index], strict=True):
            slot.parameter.data = data
            found.append(
                codes_of(slot, width, self.backend, self.group_size).values(data.dtype).to(data.device)
            )
        if self.keep:
            self._found[index, width] = found
        return found
