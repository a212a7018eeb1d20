"""Training through a quantizer: rounded weights and activations that keep full-precision weights underneath.

A quantized weight is a torch parametrization: the latent weight stays under `parametrizations.<name>.original` and is
what an optimizer sees, the layer computes with its rounded value, and gradients pass the rounding straight (and stop
outside the range of the code). `bake` puts the rounded values in the latent ones' place and leaves the bare model.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..core import taps
from ..core.errors import BadInput
from ._base import Objective
from ._distiller import Distiller

__all__ = [
    "FakeQuant",
    "bake",
    "distil_qat",
    "fake_quant",
    "float_table",
    "matrices",
    "quantize",
]

FORMATS = {2: "e1m0", 3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e3m2", 8: "e4m3"}
"""The floating-point format of a number of bits, where none is named."""

_WEIGHTS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, r"weight"),
    (Conv1D, r"weight"),
    (nn.Embedding, r"weight"),
    (nn.modules.conv._ConvNd, r"weight"),
    (nn.RNNBase, r"weight_(ih|hh|hr)_l\d+(_reverse)?"),
    (nn.RNNCellBase, r"weight_(ih|hh)"),
)


@functools.cache
def float_table(fmt: str) -> tuple[float, ...]:
    """Values from 0 up of a format `ExMy`: a sign, x bits of exponent, y of mantissa, subnormals, no infinities.

    `float_table("e2m1")` is 0, 0.5, 1, 1.5, 2, 3, 4, 6; `float_table("e3m0")` 0, 0.25, 0.5, 1, 2, 4, 8, 16.

    Raises:
        BadInput: not of that form.
    """
    match = re.fullmatch(r"e([1-5])m(\d)", fmt.lower())
    if match is None:
        raise BadInput("fmt", fmt, "is not a format", 'name one like "e2m1"')
    exponents, mantissa = int(match[1]), int(match[2])
    bias = 2 ** (exponents - 1) - 1
    steps = 2**mantissa
    values = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    for e in range(1, 2**exponents):
        values += [(1 + m / steps) * 2.0 ** (e - bias) for m in range(steps)]
    return tuple(values)


def quantize(
    x: Tensor, *, bits: int, scheme: str = "int_sym_channel", fmt: str | None = None, axis: int = 0,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The nearest values of a code with one scale per slice along `axis`; gradients pass straight.

    "int_sym_channel": s = max|x| / (2^(bits - 1) - 1), s clamp(round(x / s)); with one bit, sign(x) mean|x|.
    "fp": s = max|x| / (largest value of the format), s times the nearest value of +-`float_table`; of two as near,
    the smaller. The gradient is 1 within the code's range and 0 outside, where only a given `scale` lets x be.

    Args:
        x: Any shape; computed in float32 at least.
        bits: 1 to 16.
        scheme: "int_sym_channel" or "fp".
        fmt: Format of "fp", by default that of `FORMATS`.
        axis: Slices along it have a scale of their own: 0, output channels of a weight; -1 with activations means all
            leading axes (one scale per token).
        scale: s, broadcastable to x, in place of the one found.

    Returns:
        Shape and dtype of x.
    """
    _check(bits, scheme, fmt)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    across = (-1,) if axis == -1 else tuple(i for i in range(x.dim()) if i != axis % x.dim())
    with torch.no_grad():
        largest = wide.abs().amax(across, keepdim=True) if across else wide.abs()
        if scheme == "int_sym_channel" and bits == 1:
            size = wide.abs().mean(across, keepdim=True) if scale is None else scale
            rounded = size * torch.where(wide < 0, -1.0, 1.0)
            inside = torch.ones_like(wide, dtype=torch.bool)
        else:
            table = None
            if scheme == "fp":
                table = torch.tensor(float_table(fmt or FORMATS[bits]), dtype=wide.dtype, device=wide.device)
                top, last = float(table[-1]), float(table[-1] - table[-2]) / 2
            else:
                top, last = float(2 ** (bits - 1) - 1), 0.5
            size = largest / top if scale is None else scale
            code = wide / torch.where(size > 0, size, 1.0)
            inside = code.abs() <= top + last
            if table is None:
                rounded = size * code.round().clamp(-top, top)
            else:
                middle = (table[1:] + table[:-1]) / 2
                rounded = size * code.sign() * table[torch.bucketize(code.abs(), middle)]
    return _Straight.apply(wide, rounded, inside).to(x.dtype)


class _Straight(torch.autograd.Function):
    """The rounded value, with the gradient of the unrounded one inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return slopes[0] * ctx.saved_tensors[0], None, None


def _check(bits: int, scheme: str, fmt: str | None) -> None:
    if scheme not in ("int_sym_channel", "fp"):
        raise BadInput("scheme", scheme, "is not known", 'use "int_sym_channel" or "fp"')
    if not isinstance(bits, int) or not 1 <= bits <= 16:
        raise BadInput("bits", bits, "is not a whole number from 1 to 16", "give a bit width")
    if scheme == "fp":
        if fmt is None and bits not in FORMATS:
            raise BadInput(
                "bits", bits, f"has no format of its own ({sorted(FORMATS)} have)", "name one: fmt=..."
            )
        if fmt is not None and len(float_table(fmt)) != 2 ** (bits - 1):
            raise BadInput("fmt", fmt, f"is not a format of {bits} bits", "sign, exponent and mantissa count")
    elif fmt is not None:
        raise BadInput("fmt", fmt, "belongs to the scheme fp", 'pass scheme="fp"')


class FakeQuant(nn.Module):
    """The parametrization of a weight, see `quantize`; one scale per output channel, or entry of a table.

    Args:
        bits: As for `quantize`, like scheme and fmt.
        scheme: See there.
        fmt: See there.
        transposed: 0 where output channels are the weight's first axis. Otherwise they are its second, within each of
            this many groups of its first (transposed convolutions; GPT-2's linear layers, with 1).
    """

    def __init__(
        self, bits: int, scheme: str = "int_sym_channel", fmt: str | None = None, transposed: int = 0
    ):
        super().__init__()
        _check(bits, scheme, fmt)
        self.bits, self.scheme, self.fmt, self.transposed = bits, scheme, fmt, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        rounded = quantize(self._turned(weight), bits=self.bits, scheme=self.scheme, fmt=self.fmt)
        return self._turned(rounded)

    def _turned(self, weight: Tensor) -> Tensor:
        """Output channels first; a second time, as they were."""
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.transposed, -1)).transpose(1, 2).flatten(0, 1)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"bits={self.bits}, scheme={self.scheme}"


def fake_quant(
    model: nn.Module, *, bits: int, scheme: str = "int_sym_channel", fmt: str | None = None,
    activations: int | None = None, skip: Sequence[str] = (),
) -> nn.Module:  # fmt: skip
    """Put a quantizer before the weights of a model, in place; the untrained result is round-to-nearest quantization.

    Quantized are the matrices of linear, embedding, convolution and recurrent layers; biases and norms are not.

    Args:
        model: Any module.
        bits: Of the weights.
        scheme: "int_sym_channel" or "fp", see `quantize`.
        fmt: Format of "fp".
        activations: Bits of the inputs of linear, convolution and recurrent layers: symmetric integers, a scale per
            token (per place of an image) found as it comes. None leaves them alone.
        skip: Module names or wildcards to leave alone, say the output head, whose rounding costs most. What is inside
            them is left alone too, and so is every matrix that is the same parameter: of tied embeddings both ends.

    Returns:
        The model.

    Raises:
        BadInput: nothing to quantize, a model that is quantized already, unknown settings.
    """
    _check(bits, scheme, fmt)
    if activations is not None:
        _check(activations, "int_sym_channel", None)
    left = [model.get_submodule(name) for pattern in skip for name in taps.match(model, pattern)]
    alone = {id(parameter) for module in left for parameter in module.parameters()}
    found = [(m, name) for _, m, name in matrices(model) if id(m._parameters.get(name)) not in alone]
    if not found:
        raise BadInput("model", type(model).__name__, "has no matrix to quantize", "skip less of it")
    if any(parametrize.is_parametrized(module, name) for module, name in found):
        raise BadInput("model", type(model).__name__, "is quantized already", "start from the original")
    for module, name in found:
        rounding = FakeQuant(bits, scheme, fmt, _transposed(module))
        parametrize.register_parametrization(module, name, rounding)
    if activations is not None:
        for module in {id(module): module for module, _ in found}.values():
            if not isinstance(module, nn.Embedding):
                module.forward = functools.partial(_rounded_input, module, activations)
    return model


def _transposed(module: nn.Module) -> int:
    """Groups of a layer whose weight has output channels second, see `FakeQuant`; 0 for one that has them first."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.groups
    return int(isinstance(module, Conv1D))


def _rounded_input(module: nn.Module, bits: int, x: Tensor, *rest: Any, **options: Any) -> Any:
    """The layer's own `forward` on a rounded input. A function of the module, so that copies of it copy this too."""
    if isinstance(module, nn.modules.conv._ConvNd):  # channels are not the last axis
        width = len(module.kernel_size)
        axis = x.dim() - width - 1
        x = quantize(x.movedim(axis, -1), bits=bits, axis=-1).movedim(-1, axis)
    else:
        x = quantize(x, bits=bits, axis=-1)
    return type(module).forward(module, x, *rest, **options)


def matrices(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """What can be quantized: (module's name, module, name of the tensor) of each matrix."""
    found = []
    for path, module in model.named_modules():
        for kind, pattern in _WEIGHTS:
            if isinstance(module, kind):
                names = set(module._parameters) | set(getattr(module, "parametrizations", {}))
                found += [(path, module, name) for name in sorted(names) if re.fullmatch(pattern, name)]
    return found


def bake(model: nn.Module) -> nn.Module:
    """Put the rounded weights in the latent ones' place, in place: names and shapes are the bare model's again.

    Rounded activations, which are not weights, stay as they are.
    """
    for _, module, name in matrices(model):
        if parametrize.is_parametrized(module, name):
            rounded = getattr(module, name).detach().clone()
            original = module.parametrizations[name].original  # type: ignore[index,union-attr]
            wanted = original.requires_grad
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            with torch.no_grad():
                getattr(module, name).copy_(rounded)
            getattr(module, name).requires_grad_(wanted)
    return model


def distil_qat(
    *, teacher: nn.Module, objective: Objective, train_dataset: Any, bits: int, scheme: str = "int_sym_channel",
    fmt: str | None = None, activations: int | None = None, skip: Sequence[str] = (), args: Any = None,
    resume_from_checkpoint: str | None = None, **options: Any,
) -> tuple[nn.Module, list[float]]:  # fmt: skip
    """Quantization-aware self-distillation: a quantized copy of a model learns to say what the model says.

    Args:
        teacher: The full-precision original; it is not changed.
        objective: Such as `TopKLD`.
        train_dataset: Rows as `Distiller` takes them.
        bits: As in `fake_quant`, like scheme, fmt, activations and skip.
        scheme: See there.
        fmt: See there.
        activations: See there.
        skip: See there.
        args: `TrainingArguments`.
        resume_from_checkpoint: Folder of a checkpoint to go on from.
        **options: Further arguments of `Distiller`.

    Returns:
        The baked student, in evaluation mode, and the loss of each update.

    Raises:
        BadInput: a teacher that is quantized itself.
    """
    if any(parametrize.is_parametrized(module) for module in teacher.modules()):
        raise BadInput("teacher", type(teacher).__name__, "is quantized itself", "give the original model")
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    fake_quant(student, bits=bits, scheme=scheme, fmt=fmt, activations=activations, skip=skip)
    # A head fused with the loss is read once; a quantized one changes with every update, so logits are made whole.
    kept = objective.needs_logits
    objective.needs_logits = True  # type: ignore[misc]
    try:
        trainer = Distiller(
            student=student, teacher=teacher, objective=objective, train_dataset=train_dataset, args=args, **options
        )  # fmt: skip
    finally:
        objective.needs_logits = kept  # type: ignore[misc]
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return bake(student).eval(), trainer.losses
