"""Hidden states of any shape as vectors per place, and the encoders and decoders that exchange them as messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Messengers", "activation", "from_places", "keep_of", "places"]


def places(state: Tensor, *, pooled: bool = False, keep: Tensor | None = None) -> Tensor:
    """A hidden state as `[B, n, d]`: a vector has one place, a sequence `[B, T, d]` T, a map `[B, d, H, W]` H W.

    Args:
        state: As a module put it out.
        pooled: Take the mean over places: `[B, 1, d]`.
        keep: bool `[B, n]`: the places that count in the mean.
    """
    if state.dim() == 2:
        return state.unsqueeze(1)
    if state.dim() == 4:
        state = state.flatten(2).transpose(1, 2)
    if not pooled:
        return state
    weight = torch.ones_like(state[..., :1]) if keep is None else keep.unsqueeze(-1).to(state.dtype)
    return (state * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)


def from_places(vectors: Tensor, like: Tensor) -> Tensor:
    """The reverse of `places`, in shape and dtype of `like`; one vector is spread over all its places.

    The result has memory of its own: what follows may write into it. Values beyond a half precision's range are
    clamped to it.
    """
    limit = torch.finfo(like.dtype).max
    vectors = vectors.clamp(-limit, limit).to(like.dtype)
    if like.dim() == 2:
        return vectors.squeeze(1)
    if like.dim() == 3:
        return vectors.expand(-1, like.shape[1], -1).contiguous()
    spread = vectors.expand(-1, like.shape[2] * like.shape[3], -1)
    return spread.transpose(1, 2).unflatten(2, like.shape[2:]).contiguous()


def keep_of(state: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """The attention mask of a sequence's places, or None."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and state.dim() == 3 and mask.shape == state.shape[:2] else None


def activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The module itself, if it is an activation without weights."""
    plain = type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters())
    return module if plain else None


class Messengers(nn.Module):
    """The encoders and decoders of both models.

    Args:
        student: Widths of the student's low and high state.
        teacher: Of the teacher's.
        message: Width of a message.
        hidden: Width of the MLPs' hidden layer.
        rounds: More than one needs a decoder from the student's high state to its low one.
        activations: Applied to decoded states: of the student's low and high place, and the teacher's low place.
    """

    def __init__(
        self,
        student: tuple[int, int],
        teacher: tuple[int, int],
        message: int,
        hidden: int,
        rounds: int = 1,
        activations: tuple[Callable[[Tensor], Tensor] | None, ...] = (None, None, None),
    ):
        super().__init__()

        def mlp(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(a, hidden), nn.ReLU(), nn.Linear(hidden, b))

        self.student_encoders = nn.ModuleDict(
            {str(width): mlp(width, message) for width in sorted({*student})}
        )
        self.teacher_encoders = nn.ModuleDict(
            {str(width): mlp(width, message) for width in sorted({*teacher})}
        )
        self.student_decoder, self.teacher_decoder = mlp(message, student[1]), mlp(message, teacher[0])
        self.again = mlp(student[1], student[0]) if rounds > 1 else None
        self.activations: Any = tuple(each or (lambda x: x) for each in activations)

    @staticmethod
    def _exact(module: nn.Module, x: Tensor) -> Tensor:
        """In the weights' own precision, also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return module(x.to(next(module.parameters()).dtype))

    def student_says(self, state: Tensor) -> Tensor:
        """E_s: `[B, n, d]` to `[B, n, m]`."""
        return self._exact(self.student_encoders[str(state.shape[-1])], state)

    def teacher_says(self, state: Tensor) -> Tensor:
        """E_t."""
        return self._exact(self.teacher_encoders[str(state.shape[-1])], state)

    def student_hears(self, message: Tensor) -> Tensor:
        """D_s: `[B, n, m]` to the student's high state."""
        return self.activations[1](self._exact(self.student_decoder, message))

    def teacher_hears(self, message: Tensor) -> Tensor:
        """D_t: to the teacher's low state."""
        return self.activations[2](self._exact(self.teacher_decoder, message))

    def next_low(self, state: Tensor) -> Tensor:
        """What the student goes on from in the next round: its understood high state, at the low place."""
        assert self.again is not None
        return self.activations[0](self._exact(self.again, state))
