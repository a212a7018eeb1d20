"""TRG: distil the relations between the tokens of all images of a batch.

:arxiv: 2306.12442
:moves: a vision teacher's token-to-token relations -> a student's weights
:access: logits, hidden, training data
:reversible: no
:context: no

The feature maps of teacher and student are cut into tokens, P per image. n of them are drawn per image, at the same
places for both networks, which gives M = B n nodes. Each network joins its own nodes to a graph,

    A_ij = exp(-|T_i - T_j|^2 / (2 sigma))   if i is one of the k nearest neighbours of j, else 0,

and the student is asked for the teacher's neighbourhoods, for the teacher's token at every place among all others,
and for the attention pattern inside every image:

    L_local  = mean_i KL(softmax_j A^S_i. || softmax_j A^T_i.)
    L_global = -mean_i log softmax_j(cos(g_s(T^S_i), g_t(T^T_j)) / tau_g)_i
    L_inner  = MSE(CS^T, CS^S),   CS = softmax of the rows of F F^T / sqrt(D) over all P tokens of an image
    L        = CE + lam tau^2 KL(p^T_tau || p^S_tau) + alpha P L_inner + beta L_local + gamma L_global

The softmax runs over all j, absent edges included, which count exp(0). g_s and g_t are linear, trained with the
student and left behind. tau_g falls from coarse to sharp along half a cosine. Neighbours are constants, only the
kernel carries a gradient; no node is its own neighbour.

No code was published, and the paper's numbers for k, sigma, n, the weights and tau_g could not be confirmed: the
defaults are ours. sigma is the mean squared distance to the k neighbours, of each network and batch by itself and
without gradient, because a fixed one makes the kernel 0 or 1 everywhere as soon as the features' scale moves (watch
the logged `edge`, the student's mean edge weight). Means stand for the paper's sums (`reduction="sum"` for those).
The factor P makes L_inner a mean over rows: entries near 1/P have tiny squares (`scale_inner=False` leaves it out).
`direction`, `masked` and `same_image` are the other readings.

    from transfuse.distill import Distiller
    from transfuse.distill.trg import TRG

    objective = TRG(student_layer="layer3", teacher_layer="layer3", tokens_per_image=8)
    trainer = Distiller(student=student, teacher=teacher, objective=objective, train_dataset=rows)
    trainer.train()
    trainer.save_model("student")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.divergence import forward_kl, kl_terms
from ..core.errors import BadInput, IncompatibleModels, NotApplicable
from ..core.runs import check_positive
from ..core.training import generator, seeded
from ._base import Objective, Signal, check_vocabulary
from ._maps import (
    exact,
    full_precision,
    knn_graph,
    same_grid,
    sample_positions,
    squared_distances,
    take,
    tokens_from_map,
)

__all__ = [
    "TRG",
    "contextual_loss",
    "cosine_temperature",
    "global_loss",
    "knn_graph",
    "local_loss",
    "logit_loss",
    "sample_positions",
    "squared_distances",
    "take",
    "tokens_from_map",
]

NODES = 512  # most nodes of a batch when their number is left to the objective


def local_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    edges: Tensor | None = None,
    direction: Literal["reverse", "forward"] = "reverse",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """How far the neighbourhoods of the student's graph are from the teacher's.

    Args:
        student: A^S `[M, M]`.
        teacher: A^T `[M, M]`.
        edges: Compare on these entries only (bool `[M, M]`, the teacher's edges); a row without any counts 0.
        direction: "reverse" is KL(student || teacher), "forward" KL(teacher || student).
        reduction: Over the M rows.
    """
    ours, theirs = exact(student), exact(teacher).detach()
    rows = len(ours)
    if edges is not None:
        some = edges.any(-1)
        ours, theirs = (x[some].masked_fill(~edges[some], -torch.inf) for x in (ours, theirs))
    log_q, log_p = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    terms = kl_terms(log_q, log_p) if direction == "reverse" else kl_terms(log_p, log_q)
    return terms.sum() / (rows if reduction == "mean" else 1)


def global_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    images: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """InfoNCE between projected nodes: the teacher's node at the same place against those at all other places.

    Args:
        student: `[M, W]`.
        teacher: `[M, W]`, row by row the same places.
        temperature: tau_g.
        images: The image of every node, int64 `[M]`: other nodes of the same image are then no negatives.
        reduction: Over the M nodes.

    Raises:
        BadInput: a single node; with `images`, a single image.
    """
    if len(student) < 2:
        raise BadInput(
            "tokens", len(student), "node has nothing to be told from", "use more images or tokens"
        )
    ours, theirs = (functional.normalize(exact(x), dim=-1) for x in (student, teacher))
    with full_precision(ours):
        similar = ours @ theirs.T / temperature
    own = torch.arange(len(ours), device=ours.device)
    if images is not None:
        near = (images[:, None] == images[None, :]) & (own[:, None] != own[None, :])
        if bool((images == images[0]).all()):
            remedy = "put more of them into a batch, or pass same_image=True"
            raise BadInput("images", 1, "image leaves no negatives", remedy)
        similar = similar.masked_fill(near, -torch.inf)
    return functional.cross_entropy(similar, own, reduction=reduction)


def contextual_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention patterns inside the images.

    Args:
        student: Tokens `[B, P, D_s]`.
        teacher: Tokens `[B, P, D_t]`; each pattern is scaled by the root of its own width.

    Returns:
        The mean over `[B, P, P]`.
    """
    patterns = []
    for tokens in (student, teacher.detach()):
        x = exact(tokens)
        with full_precision(x):
            patterns.append(torch.softmax(x @ x.transpose(1, 2) / math.sqrt(x.shape[-1]), -1))
    return functional.mse_loss(patterns[0], patterns[1])


def logit_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, lam: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """CE + lam tau^2 KL(p^T_tau || p^S_tau) of logits `[B, C]` and classes int64 `[B]`, means over the batch."""
    hard = functional.cross_entropy(exact(student), labels)
    return hard + lam * temperature**2 * forward_kl(student, teacher.detach(), temperature=temperature)


def cosine_temperature(progress: float, start: float = 0.5, end: float = 0.07) -> float:
    """tau_g at a share of the training: from `start` at 0 along half a cosine to `end` at 1."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class TRG(Objective):
    """Distillation by a token-level relationship graph.

    The projections are its parameters; the progress of tau_g and the number of draws are part of a checkpoint.

    Args:
        student_layer: Module of the student whose output is cut: a map `[B, C, h, w]` or tokens `[B, N, D]`, of the
            layer before the last. Of two grids the finer is averaged down to the other.
        teacher_layer: The same of the teacher.
        student_skip: Leading tokens that are no patches (CLS, registers), of a tokens output.
        teacher_skip: The same of the teacher.
        patch: Side of a token's square on the map.
        tokens_per_image: n; None takes as many as make at most 512 nodes per batch. All P if there are fewer.
        k: Neighbours of a node.
        sigma: Width of the kernel, in squared feature units, or "auto".
        lam: Weight of the tempered KL; 0 leaves the teacher's logits, and so its label space, aside.
        temperature: tau of that KL.
        alpha: Weight of L_inner.
        beta: Weight of L_local.
        gamma: Weight of L_global.
        scale_inner: Multiply L_inner by P.
        reduction: Of L_local and L_global over the nodes; the paper writes sums.
        direction: Of L_local: "reverse", KL(student || teacher), or "forward".
        masked: L_local on the teacher's edges only.
        width: Of the projections.
        tau_start: First tau_g.
        tau_end: Last tau_g; the same as the first for a fixed one.
        same_image: Whether other tokens of the same image are negatives of L_global.
        debug: Refuse a batch whose mean edge weight, of either network, is not within 0.05 and 0.95.
        seed: Of the projections and the drawn places.

    Raises:
        BadInput: an argument out of range.
    """

    progress: Tensor
    calls: Tensor

    def __init__(
        self,
        *,
        student_layer: str = "layer3",
        teacher_layer: str = "layer3",
        student_skip: int = 0,
        teacher_skip: int = 0,
        patch: int = 1,
        tokens_per_image: int | None = None,
        k: int = 8,
        sigma: float | Literal["auto"] = "auto",
        lam: float = 1.0,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.1,
        scale_inner: bool = True,
        reduction: Literal["mean", "sum"] = "mean",
        direction: Literal["reverse", "forward"] = "reverse",
        masked: bool = False,
        width: int = 128,
        tau_start: float = 0.5,
        tau_end: float = 0.07,
        same_image: bool = True,
        debug: bool = False,
        seed: int = 0,
    ):
        super().__init__(student_taps=[student_layer], teacher_taps=[teacher_layer])
        check_positive(patch=patch, k=k, width=width, tokens_per_image=tokens_per_image)
        for name, skip in (("student_skip", student_skip), ("teacher_skip", teacher_skip)):
            if isinstance(skip, bool) or not isinstance(skip, int):
                raise BadInput(name, skip, "is not a whole number", "give a number of tokens")
        if isinstance(sigma, str) and sigma != "auto":
            raise BadInput("sigma", sigma, "is not known", 'give a number above 0, or "auto"')
        scale = 1.0 if sigma == "auto" else sigma
        least = {"student_skip": student_skip, "teacher_skip": teacher_skip, "lam": lam, "alpha": alpha}
        above = {"sigma": scale, "temperature": temperature, "tau_start": tau_start, "tau_end": tau_end}
        for name, value in {**least, "beta": beta, "gamma": gamma, **above}.items():
            if not (value > 0.0 if name in above else value >= 0.0) or value == math.inf:
                low = "above 0" if name in above else "from 0 up"
                raise BadInput(name, value, "is out of range", f"give a number {low}")
        for name, choice, known in (
            ("reduction", reduction, ("mean", "sum")), ("direction", direction, ("reverse", "forward")),
        ):  # fmt: skip
            if choice not in known:
                raise BadInput(name, choice, "is not known", f"use one of {', '.join(known)}")
        self.skips, self.patch, self.tokens_per_image = (student_skip, teacher_skip), patch, tokens_per_image
        self.k, self.sigma, self.lam, self.temperature = k, sigma, lam, temperature
        self.alpha, self.beta, self.gamma, self.scale_inner = alpha, beta, gamma, scale_inner
        self.reduction, self.direction, self.masked, self.width = reduction, direction, masked, width
        self.tau_start, self.tau_end, self.seed = tau_start, tau_end, seed
        self.same_image, self.debug = same_image, debug
        self.student_projection: nn.Linear | None = None
        self.teacher_projection: nn.Linear | None = None
        self.register_buffer("progress", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))

    def setup(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> None:
        """Build the projections.

        Raises:
            NotApplicable: not one class per image.
            IncompatibleModels: grids that cannot be matched, or label spaces that differ.
        """
        assert teacher is not None
        logits = student.whole()
        if logits.dim() != 2:
            raise NotApplicable("student", tuple(logits.shape), "are no classifier's logits", "use one")
        if self.lam:
            check_vocabulary(logits, teacher.whole())
        ours, theirs = self.tokens(student, teacher)
        if self.gamma:
            with seeded(self.seed):
                self.student_projection = nn.Linear(ours.shape[-1], self.width)
                self.teacher_projection = nn.Linear(theirs.shape[-1], self.width)

    def tokens(self, student: Signal, teacher: Signal) -> tuple[Tensor, Tensor]:
        """All tokens of both networks, `[B, P, D_s]` and `[B, P, D_t]`, in float32 at least.

        Raises:
            BadInput: no token is left.
            IncompatibleModels: a layer that names several modules; grids that cannot be matched.
        """
        found = []
        for signal, skip, side in zip((student, teacher), self.skips, ("student", "teacher"), strict=True):
            if len(signal.taps) != 1:
                names = list(signal.taps)
                raise IncompatibleModels(f"{side}_layer", names, "is not one module", "name one of one model")
            (value,) = signal.taps.values()
            if value.dim() == 3 and skip >= value.shape[1]:
                problem = f"leaves none of {value.shape[1]} tokens"
                raise BadInput(f"{side}_skip", skip, problem, "leave out those that are no patches")
            found.append(exact(value[:, skip:] if value.dim() == 3 else value))
        ours, theirs = (tokens_from_map(x, self.patch) for x in same_grid(found))
        return ours, theirs.detach()

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        assert teacher is not None
        ours, theirs = self.tokens(student, teacher)
        images, places = ours.shape[:2]
        found = {"ce": functional.cross_entropy(exact(student.whole()), batch["labels"])}
        weights = {"ce": 1.0, "kd": self.lam, "local": self.beta, "global": self.gamma}
        weights["inner"] = self.alpha * (places if self.scale_inner else 1)
        if self.lam:
            kl = forward_kl(student.whole(), teacher.whole().detach(), temperature=self.temperature)
            found["kd"] = self.temperature**2 * kl
        if self.alpha:
            found["inner"] = contextual_loss(ours, theirs)
        nodes, their_nodes, count = self._nodes(ours, theirs)
        if self.beta:
            graph, edges = knn_graph(nodes, k=self.k, sigma=self.sigma)
            target, their_edges = knn_graph(their_nodes, k=self.k, sigma=self.sigma)
            found["local"] = local_loss(
                graph, target, edges=their_edges if self.masked else None, direction=self.direction,
                reduction=self.reduction,
            )  # fmt: skip
            found["edge"] = graph.detach()[edges].mean()
            if self.debug:
                self._check_edges(float(found["edge"]), float(target[their_edges].mean()))
        if self.gamma:
            image = torch.arange(images, device=ours.device).repeat_interleave(count)
            found["global"] = global_loss(
                _projected(nodes, self.student_projection), _projected(their_nodes, self.teacher_projection),
                cosine_temperature(float(self.progress), self.tau_start, self.tau_end),
                images=None if self.same_image else image, reduction=self.reduction,
            )  # fmt: skip
        loss = sum(weights[name] * value for name, value in found.items() if name in weights)
        assert isinstance(loss, Tensor)
        return {"loss": loss, **found}

    def _nodes(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, int]:
        """The drawn tokens of both, and their number per image."""
        images, places = ours.shape[:2]
        wanted = self.tokens_per_image or max(1, NODES // images)
        if wanted >= places:
            return ours.flatten(0, 1), theirs.flatten(0, 1), places
        positions = sample_positions(images, places, wanted, generator(self.seed + int(self.calls)))
        self.calls += 1
        return take(ours, positions), take(theirs, positions), wanted

    def _check_edges(self, *means: float) -> None:
        if not all(0.05 <= mean <= 0.95 for mean in means):
            problem = "gives mean edge weights of {:.3g} (student) and {:.3g}".format(*means)
            raise BadInput("sigma", self.sigma, problem, 'use "auto", or fit it to the features')

    def on_step(self, figures: Mapping[str, float], step: int, total: int) -> None:
        """Move tau_g.

        Raises:
            BadInput: the number of updates is not known.
        """
        if not total > 0:
            raise BadInput("total", total, "updates: tau_g needs their number", "set max_steps or epochs")
        self.progress.fill_(step / total)


def _projected(nodes: Tensor, projection: nn.Linear | None) -> Tensor:
    assert projection is not None, "setup comes first"
    with full_precision(nodes):
        return functional.linear(nodes, projection.weight.to(nodes.dtype), projection.bias.to(nodes.dtype))
