"""Routers that remember the layer below: cells over depth, the state between layers, and other routers beside them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import seeded
from transfuse.moe._base import Latest, Routing
from transfuse.moe._experts import choose

__all__ = ["Cell", "RecurrentRouter", "RouterState", "check_graph", "cosine_logits", "gru_step"]

RouterKind = Literal["gru", "rnn", "lstm", "linear", "mlp", "cosine", "xmoe", "random"]
CELLS = {"gru": 3, "rnn": 1, "lstm": 4}  # how many matrices a cell stacks
XMOE_WIDTH = 16


def gru_step(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """One step of a gated recurrent unit, as `torch.nn.GRUCell` makes it.

    Args:
        x: `[T, p]`.
        h: `[T, p]`, the state before.
        w_ih: `[3 p, p]`, rows of r, u and n.
        w_hh: `[3 p, p]`, in the same order.
        b_ih: `[3 p]`.
        b_hh: `[3 p]`.

    Returns:
        `[T, p]`: `(1 - u) n + u h` with `n = tanh(W_in x + b_in + r (W_hn h + b_hn))`.
    """
    return torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)


class Cell(nn.Module):
    """The cell that all layers share; it computes in float32, whatever the model's dtype.

    Args:
        kind: "gru", "rnn" or "lstm".
        size: p, the length of the state.
    """

    def __init__(self, kind: str, size: int):
        super().__init__()
        self.kind, self.size, rows = kind, size, CELLS[kind] * size
        self.weight_ih = nn.Parameter(torch.empty(rows, size))
        self.weight_hh = nn.Parameter(torch.empty(rows, size))
        self.bias_ih = nn.Parameter(torch.zeros(rows))
        self.bias_hh = nn.Parameter(torch.zeros(rows))

    def draw(self) -> None:
        """Uniform matrices within 1/sqrt(p), as torch's cells have them; biases zero."""
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -1 / math.sqrt(self.size), 1 / math.sqrt(self.size))
        for bias in (self.bias_ih, self.bias_hh):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state, whose first part is what the layer reads. LSTM states have two parts."""
        w_ih, w_hh, b_ih, b_hh = (
            t.float() for t in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        )
        if self.kind == "gru":
            return (gru_step(x, state[0], w_ih, w_hh, b_ih, b_hh),)
        if self.kind == "rnn":
            return (torch.rnn_tanh_cell(x, state[0], w_ih, w_hh, b_ih, b_hh),)
        return torch.lstm_cell(x, state, w_ih, w_hh, b_ih, b_hh)

    def zeros(self, like: Tensor) -> tuple[Tensor, ...]:
        """The state before the first layer."""
        return tuple(torch.zeros_like(like) for _ in range(2 if self.kind == "lstm" else 1))


class RouterState:
    """What each layer's router leaves for the next one, in one pass of the model.

    One entry per layer rather than one for all: when activations are computed again for the backward pass, each
    layer still finds what the layer below it left.
    """

    def __init__(self, layers: int):
        self.cells: list[tuple[Tensor, ...] | None] = [None] * layers
        self.logits: list[Tensor | None] = [None] * layers

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterState:
        return RouterState(len(self.cells))


def cosine_logits(x: Tensor, centres: Tensor, temperature: Tensor | float) -> Tensor:
    """Cosines between tokens `[T, d]` and experts' vectors `[N, d]`, over a temperature: `[T, N]`."""
    cosines = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(centres, dim=-1).T
    return cosines / temperature


def check_graph(tensor: Tensor, what: str) -> None:
    """Refuse to go on without a graph that gradients need.

    Raises:
        NotApplicable: `tensor` has none.
    """
    if not tensor.requires_grad:
        remedy = (
            'use gradient_checkpointing_kwargs={"use_reentrant": False}, or no torch.no_grad() in training'
        )
        raise NotApplicable(
            "model", what, "was computed without a graph, so gradients would be wrong", remedy
        )


class RecurrentRouter(nn.Module):
    """A router of one layer; called like those of transformers' expert blocks.

    Layers meet in `state`, so each pass in training mode needs its own backward pass before the next one where
    activations are computed again (gradient checkpointing), and that must be of the kind `use_reentrant=False`.

    Args:
        hidden_size: d, the length of a token's vector.
        num_experts: N.
        top_k: Experts per token.
        layer_idx: Number of the layer among those that route, from 0.
        router: Its kind: with a cell ("gru", "rnn", "lstm"), or one that the recurrent ones are compared with.
        state_size: p.
        cell: The shared cell, for the kinds that have one.
        projector: The shared projection d -> p; None gives the layer one of its own.
        state: Where states are left; None for a router used alone.
        pass_state: Whether the layer reads the state below it (else zeros).
        detach_state: Read it without its gradient.
        logit_residual: Share of the layer below's logits added to the layer's own.
        head: How the state becomes logits: "linear", or "xmoe", cosines in 16 dimensions.
        normalise: Divide the weights of the chosen experts by their sum.
        scale: What the weights are multiplied by.

    Raises:
        BadInput: more experts per token than there are, or a state without length.
        NotApplicable: on a forward pass in training, the state of the layer below carries no graph.
    """

    per_expert = ("weight",)  # what a change of the experts' order moves

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        layer_idx: int = 0,
        *,
        router: RouterKind = "gru",
        state_size: int = 128,
        cell: Cell | None = None,
        projector: nn.Linear | None = None,
        state: RouterState | None = None,
        pass_state: bool = True,
        detach_state: bool = False,
        logit_residual: float = 0.0,
        head: Literal["linear", "xmoe"] = "linear",
        normalise: bool = True,
        scale: float = 1.0,
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise BadInput("top_k", top_k, f"does not fit {num_experts} experts", "choose 1 up to that many")
        if state_size < 1:
            raise BadInput("state_size", state_size, "is no length", "give 1 or more; the paper takes 128")
        self.hidden_size, self.num_experts, self.top_k, self.layer_idx = (
            hidden_size,
            num_experts,
            top_k,
            layer_idx,
        )
        self.router, self.pass_state, self.detach_state = router, pass_state, detach_state
        self.logit_residual, self.normalise, self.scale = logit_residual, normalise, scale
        self.state = state if state is not None else RouterState(layer_idx + 1)
        self.latest = Latest()
        self.owned = {"projector"} if projector is None else set()  # what other layers do not bring along
        self.owned |= {"cell"} if cell is None else set()
        width, last = hidden_size, "linear"
        if router in CELLS:
            self.projector = projector or nn.Linear(hidden_size, state_size, bias=False)
            self.cell = cell or Cell(router, state_size)
            width, last = state_size, head
        elif router == "mlp":
            self.projector = nn.Linear(hidden_size, state_size, bias=False)
            width = state_size
        elif router in ("cosine", "xmoe"):
            last = router
        self.last = last
        if last == "xmoe":
            self.reduce = nn.Linear(width, XMOE_WIDTH, bias=False)
            width = XMOE_WIDTH
        if last != "linear":
            self.temperature = nn.Parameter(torch.empty(()))
        self.weight = nn.Parameter(torch.empty(num_experts, width), requires_grad=router != "random")

    def draw(self, seed: int) -> None:
        """Draw this layer's parameters, and those of cell and projector where it was given none."""
        with seeded(seed), torch.no_grad():
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            if self.last != "linear":
                self.temperature.fill_(0.07)
            for name, module in self.named_children():
                if isinstance(module, Cell) and name in self.owned:
                    module.draw()
                elif isinstance(module, nn.Linear) and name in {"reduce", *self.owned}:
                    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def route(
        self, x: Tensor, before: tuple[Tensor, ...] | None = None, below: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Logits of tokens and the layer's state, in float32.

        Args:
            x: `[T, d]`.
            before: State of the layer below; None for the first layer.
            below: Logits of the layer below, for `logit_residual`.

        Returns:
            `[T, N]`, and the state (None without a cell).

        Raises:
            BadInput: the state belongs to another number of tokens.
        """
        z, state = x.float(), None
        if self.router in CELLS:
            z = nn.functional.linear(z, self.projector.weight.float())
            if before is None or not self.pass_state:
                before = self.cell.zeros(z)
            elif len(before[0]) != len(z):
                problem = f"is not the {len(z)} tokens of layer {self.layer_idx}"
                raise BadInput("state", len(before[0]), problem, "run the layers on one batch, in order")
            if self.detach_state:
                before = tuple(part.detach() for part in before)
            state = self.cell(z, before)
            z = state[0]
        elif self.router == "mlp":
            z = nn.functional.gelu(nn.functional.linear(z, self.projector.weight.float()))
        if self.last == "xmoe":
            z = nn.functional.linear(z, self.reduce.weight.float())
        if self.last == "linear":
            logits = nn.functional.linear(z, self.weight.float())
        else:
            logits = cosine_logits(z, self.weight.float(), self.temperature.float().clamp_min(1e-2))
        if self.logit_residual and below is not None:
            logits = logits + self.logit_residual * below
        return logits, state

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_size)
        i = self.layer_idx
        with torch.autocast(x.device.type, enabled=False):
            before = self.state.cells[i - 1] if i else None
            if before is not None and self._learns_below():
                check_graph(before[0], "state of the layer below")
            logits, state = self.route(x, before, self.state.logits[i - 1] if i else None)
            weights, indices = choose(logits, self.top_k, normalise=self.normalise, scale=self.scale)
        self.state.cells[i], self.state.logits[i] = state, logits
        weights = weights.to(x.dtype)
        self.latest[:] = [Routing(logits, indices, weights)]
        return logits, weights, indices

    def _learns_below(self) -> bool:
        """Whether gradients are to go on to the layer below."""
        if not (self.training and torch.is_grad_enabled() and self.pass_state and not self.detach_state):
            return False
        return self.router in CELLS and self.cell.weight_ih.requires_grad
