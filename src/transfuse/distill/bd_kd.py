"""BD-KD: two networks learn together, and each sample decides which direction of the divergence weighs more.

:arxiv: 2212.12965
:moves: the predictions of networks in training -> a compact network in training beside them
:access: logits, weights, training data
:reversible: no
:context: no

Online distillation: a compact network s and a larger one t start from scratch, see the same batches and learn from
the labels and from each other; each takes the other's probabilities as constants. With p = softmax(z / T) and the
entropy H(p) = -sum_c p_c log p_c, both at the one temperature T, the compact one minimises

    L_s = CE(z_s, y) + lambda T^2 mean_i [w_f KL(p_t || p_s) + w_r KL(p_s || p_t)]

    H(p_s) <  H(p_t):  w_f = nu, w_r = 1     surer than its peer: spread it (forward KL covers mass)
    H(p_s) >= H(p_t):  w_f = 1,  w_r = nu    less sure than it: sharpen it (reverse KL seeks modes)

with weights that take no gradient, and the larger one L_t = CE(z_t, y) + lambda T^2 mean_i KL(p_s || p_t). Both
forward passes come from the parameters at the start of the step; one optimizer then moves both networks by the
gradient of L_s + L_t. The aim is a small network that is right and knows how sure to be: measure it with
`core.calibration`. It alone is kept; nothing is added to it.

With K networks the compact one takes the mean of its bracket over the K - 1 others, and each other network the mean
of KL(p_j || p_k) over all networks j but itself, as deep mutual learning does; for K = 2 that is the pair above. A
causal language model learns per token, where its labels are not masked.

There is no code by the authors. That both directions are summed, that the entropy gap decides per sample and that
the larger network takes the reverse direction is the paper's; nu = 3, T = 3, lambda = 1, the weight 1 of the term
that is not stressed, and which side of the gap stresses which term are this library's reading: the one that tempers
a student that is too sure. `rule="flip"` exchanges the two cases; nu = 1 is the plain sum of both divergences.

    from transfuse.distill.bd_kd import BDKD

    method = BDKD(student, teacher, nu=3.0, temperature=3.0)
    method.fit(dataloader, epochs=200, optimizer=torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9))
    student.save_pretrained("student")
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.divergence import kl_terms
from ..core.errors import BadInput, IncompatibleModels
from ..core.runs import History
from ..core.training import loop
from ._base import Objective, Reader, Signal, settings_of
from ._standard import Divergence, ForwardKL

__all__ = [
    "BDKD",
    "BalancedDivergence",
    "MutualDistiller",
    "balanced_terms",
    "direction_weights",
    "mutual_losses",
]

Rule = Literal["temper", "flip"]


def entropy_terms(log_p: Tensor) -> Tensor:
    """H(p) in nats over the last axis, from log-probabilities `[..., C]`; 0 log 0 = 0."""
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def direction_weights(
    log_q: Tensor, log_p: Tensor, nu: float, rule: Rule = "temper"
) -> tuple[Tensor, Tensor]:
    """The weights of forward and reverse KL, from the entropy gap, without gradient.

    Args:
        log_q: The student's log-probabilities `[..., C]`, at the temperature of the divergences.
        log_p: Its peer's.
        nu: Weight of the stressed direction; the other one weighs 1.
        rule: "temper" stresses the forward KL where the student has the lower entropy; "flip", elsewhere.

    Returns:
        (w_f, w_r), each `[...]`, in the dtype of `log_q`.
    """
    with torch.no_grad():
        forward = entropy_terms(log_q) < entropy_terms(log_p)
        if rule == "flip":
            forward = ~forward
        one = torch.ones((), dtype=log_q.dtype, device=log_q.device)
        return torch.where(forward, nu * one, one), torch.where(forward, one, nu * one)


def balanced_terms(log_q: Tensor, log_p: Tensor, nu: float = 3.0, rule: Rule = "temper") -> Tensor:
    """w_f KL(p || q) + w_r KL(q || p) of each sample, q the student's; without the squared temperature.

    Args:
        log_q: The student's log-probabilities `[..., C]`.
        log_p: Its peer's; detach them.
        nu: See `direction_weights`.
        rule: See `direction_weights`.

    Returns:
        `[...]`, in nats.
    """
    forward, reverse = direction_weights(log_q, log_p, nu, rule)
    return forward * kl_terms(log_p, log_q) + reverse * kl_terms(log_q, log_p)


def mutual_losses(
    signals: Sequence[Signal],
    batch: Mapping[str, Any],
    objective: Objective,
    peer_objective: Objective,
) -> list[Tensor]:
    """The loss of each network, with all others as constants.

    Args:
        signals: Of the compact network first, then of its peers, with gradients and whole logits.
        batch: The batch that they come from, with `labels`.
        objective: Between the compact network (the learner) and one peer.
        peer_objective: Between a peer (the learner) and one other network.

    Returns:
        Scalars, one per network: the mean of its objective over the other networks.
    """
    still = [Signal(logits=signal.whole().detach()) for signal in signals]
    losses = []
    for k, signal in enumerate(signals):
        own = objective if k == 0 else peer_objective
        each = [own(signal, other, batch)["loss"] for j, other in enumerate(still) if j != k]
        losses.append(torch.stack(each).mean())
    return losses


class BalancedDivergence(Divergence):
    """The compact network's loss: cross-entropy, and both divergences weighted per sample by the entropy gap.

    An objective like any other: with `Distiller` and a frozen teacher it distils offline.

    Args:
        nu: Weight of the stressed direction; 1 for the plain sum.
        temperature: Divides all logits, for divergences and entropies; the terms are times its square.
        rule: "temper" stresses forward KL where the student is surer than the teacher; "flip", where it is not.
        kd_weight: lambda.
        ce_weight: Weight of the cross-entropy with the labels, at temperature 1.
        rest: For a stored teacher, see `TokenObjective`.
        compile: Use `torch.compile`.

    Raises:
        BadInput: an argument out of range.
    """

    def __init__(
        self,
        *,
        nu: float = 3.0,
        temperature: float = 3.0,
        rule: Rule = "temper",
        kd_weight: float = 1.0,
        ce_weight: float = 1.0,
        rest: Literal["bucket", "zero"] = "bucket",
        compile: bool = False,
    ):
        super().__init__(
            temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight, rest=rest, compile=compile
        )
        if not 0 < nu < float("inf"):
            raise BadInput(
                "nu", nu, "is not positive", "give 1 for no stress, more for the stressed direction"
            )
        if rule not in ("temper", "flip"):
            raise BadInput("rule", rule, "is not known", 'use "temper" or "flip"')
        self.nu, self.rule = nu, rule

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return balanced_terms(log_q, log_p, self.nu, self.rule)


class MutualDistiller:
    """Train a compact network and its peers at once, each on the labels and on what the others say.

    `BDKD` is one choice of objectives; with forward KL both ways it is deep mutual learning (arXiv 1706.00384).
    What the objectives train beside the networks is trained too, and stays in them.

    Args:
        student: The compact network: a classifier, causal language model, or any module that returns logits.
        peers: One network or several, trained as well.
        objective: Of the student with one peer.
        peer_objective: Of a peer with one other network.

    Raises:
        BadInput: no peer; two networks that are one object or share parameters.
        IncompatibleModels: causal language models beside networks that are none.
    """

    def __init__(
        self,
        student: nn.Module,
        peers: nn.Module | Sequence[nn.Module],
        *,
        objective: Objective,
        peer_objective: Objective,
    ):
        others = [peers] if isinstance(peers, nn.Module) else list(peers)
        if not others:
            raise BadInput("peers", others, "is empty", "give at least one network to learn with")
        for a, b in itertools.combinations([student, *others], 2):
            if {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()}:
                raise BadInput(
                    "peers", type(b).__name__, "shares parameters with another", "give separate networks"
                )
        self.student, self.peers = student, others
        self.objective, self.peer_objective = objective, peer_objective
        self.networks = nn.ModuleDict(
            {
                "student": student, "peers": nn.ModuleList(others),
                "objectives": nn.ModuleList([objective, peer_objective]),
            }
        )  # fmt: skip
        self.readers = [Reader(network, fuse=False) for network in (student, *others)]
        if len({reader.causal for reader in self.readers}) > 1:
            kinds = [type(network).__name__ for network in (student, *others)]
            raise IncompatibleModels(
                "peers", kinds, "are not all language models", "use networks of one kind"
            )
        self.losses: dict[str, float] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: the networks' parameters that take a gradient, and the objectives'."""
        return (p for p in self.networks.parameters() if p.requires_grad)

    def step(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """All networks on one batch, from their present parameters.

        Args:
            batch: The networks' inputs, and `labels`.

        Returns:
            `"loss"`, the sum over networks, and each network's own: `"student"`, `"peer0"`, ...

        Raises:
            IncompatibleModels: the networks have different numbers of classes.
        """
        signals = [reader(batch, grad=True) for reader in self.readers]
        losses = mutual_losses(signals, batch, self.objective, self.peer_objective)
        names = ["student", *(f"peer{i}" for i in range(len(self.peers)))]
        found = dict(zip(names, losses, strict=True))
        self.losses = {name: float(value.detach()) for name, value in found.items()}
        return {"loss": torch.stack(losses).sum(), **found}

    def fit(
        self,
        batches: Iterable[Any] | Callable[[int], Iterable[Any]],
        *,
        epochs: int = 1,
        lr: float = 2e-3,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        accumulation: int = 1,
        clip: float | None = None,
        seed: int = 0,
        output_dir: str | os.PathLike[str] | None = None,
        save_every: int | None = None,
        resume: bool = True,
        on_step: Callable[[int, float], None] | None = None,
    ) -> History:
        """Train all networks in place; each keeps its mode. Arguments and errors as in `core.training.loop`.

        Args:
            batches: Dicts of the networks' inputs and `labels`.
            epochs: Passes over them.
            lr: Learning rate of Adam, where no `optimizer` is given.
            optimizer: Made over `parameters()`, or over groups of them.
            scheduler: Stepped after each update.
            accumulation: Batches per update.
            clip: Largest norm of the whole gradient, over all networks.
            seed: Of the run.
            output_dir: Folder of the checkpoints; they hold all networks.
            save_every: Updates between checkpoints.
            resume: Go on from a checkpoint.
            on_step: Called after each update with its number and the sum of the losses; `self.losses` has the parts.

        Returns:
            The sum of the losses at each update.

        Raises:
            BadInput: an optimizer that leaves out a network.
        """
        rule = optimizer or torch.optim.Adam(self.parameters(), lr=lr)
        held = {id(p) for group in rule.param_groups for p in group["params"]}
        for network in (self.student, *self.peers):
            if any(p.requires_grad and id(p) not in held for p in network.parameters()):
                remedy = "make it over the method's parameters()"
                raise BadInput(
                    "optimizer", type(rule).__name__, f"leaves out {type(network).__name__}", remedy
                )
        return loop(
            self.networks, batches, self.step, optimizer=rule, scheduler=scheduler, epochs=epochs,
            accumulation=accumulation, clip=clip, seed=seed, output_dir=output_dir, save_every=save_every,
            resume=resume, on_step=on_step,
            identity={"mutual": [settings_of(each) for each in (self.objective, self.peer_objective)]},
        )  # fmt: skip


class BDKD(MutualDistiller):
    """Balanced divergences for online distillation.

    Args:
        student: The compact network, the one that is kept.
        peers: The larger network, or several.
        nu: Weight of the stressed direction; 1 for the plain sum.
        temperature: T of divergences and entropies.
        kd_weight: lambda, of all networks.
        rule: "temper" spreads a student that is surer than its peer; "flip" sharpens it.

    Raises:
        BadInput: an argument out of range, or networks that cannot be used; see `MutualDistiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        peers: nn.Module | Sequence[nn.Module],
        *,
        nu: float = 3.0,
        temperature: float = 3.0,
        kd_weight: float = 1.0,
        rule: Rule = "temper",
    ):
        own = BalancedDivergence(nu=nu, temperature=temperature, rule=rule, kd_weight=kd_weight)
        # KL(p_s || p_t) with t as the learner is the forward KL of what it learns from
        theirs = ForwardKL(temperature=temperature, kd_weight=kd_weight, ce_weight=1.0)
        super().__init__(student, peers, objective=own, peer_objective=theirs)
