"""The tuner of LoRAMoE: experts and router of a linear layer, task types, and the balance they are trained with."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from transfuse.adapt._base import Tuner, batch_share, linear_targets, new_kind, register
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.runs import check_number, check_positive

__all__ = [
    "FEED_FORWARD",
    "LoraMoeConfig",
    "LoraMoeLinear",
    "LoraMoeModel",
    "expert_mixture",
    "localized_balancing_loss",
    "route",
    "route_mass",
    "task_types",
    "typed",
    "watched",
]

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def route(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """The experts' weights, `softmax(R x)` over all experts, with the softmax in float32 at least.

    Args:
        x: `[..., m]`, the linear layer's input.
        router: `[N, m]`.

    Returns:
        `[..., N]`.
    """
    scores = x.to(router.dtype) @ router.mT
    return torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)


def expert_mixture(
    x: torch.Tensor, weights: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """What the experts add, `scaling * sum_i w_i B_i A_i x`, as two products whatever the number of experts.

    Args:
        x: `[..., m]`.
        weights: `[..., N]`, from `route`.
        a: `[N, r, m]`.
        b: `[N, n, r]`.
        scaling: alpha / r.

    Returns:
        `[..., n]` in the dtype of `a`.
    """
    inner = (x.to(a.dtype) @ a.flatten(0, 1).mT).unflatten(-1, a.shape[:2])  # [..., N, r]
    weighted = (inner * weights.to(a.dtype).unsqueeze(-1)).flatten(-2)
    return scaling * weighted @ b.transpose(0, 1).flatten(1).mT


def route_mass(weights: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Each sample's mass per expert, `q[s, i] = sum over positions of w[s, t, i]`.

    Args:
        weights: `[B, T, N]`, or `[B, N]` for layers that see one position per sample.
        mask: `[B, T]`, 0 at padding; None counts every position.

    Returns:
        `[B, N]`.
    """
    if weights.dim() == 2:
        return weights
    if mask is not None:
        weights = weights * mask[:, -weights.shape[1] :].to(weights.dtype).unsqueeze(-1)
    return weights.flatten(1, -2).sum(1)


def check_types(types: Any, batch: int | None = None) -> torch.Tensor:
    """`types` as int64 `[B]`.

    Raises:
        BadInput: another value than 0 and 1, or another number than `batch`.
    """
    problem = "are not a list of zeros and ones"
    remedy = "give 1 (world knowledge) or 0 (another task) for each sample"
    try:
        found = torch.as_tensor(types)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput("task_types", types, problem, remedy) from error
    if found.dim() != 1 or not bool(((found == 0) | (found == 1)).all()):
        raise BadInput("task_types", found.tolist(), problem, remedy)
    if batch is not None and len(found) != batch:
        problem = f"types do not match a batch of {batch}"
        raise BadInput("task_types", len(found), problem, "give one per sample")
    return found.long()


def localized_balancing_loss(
    route_mass: torch.Tensor, types: torch.Tensor | Sequence[int], delta: float
) -> torch.Tensor:
    """The localized balancing constraint of one layer: the squared coefficient of variation of weighted masses.

        I[s, i] = 1 + delta  where type 1 meets the first half of the experts, or type 0 the second; else 1 - delta
        Z       = I * q;     loss = Var(Z) / (Mean(Z)^2 + 1e-10),   Var unbiased over all B N entries

    It is smallest where q is proportional to 1 / I, so a sample's mass goes to the half with the *smaller*
    coefficient: knowledge to the second half, other tasks to the first. With `delta = 0` it balances all experts.

    Args:
        route_mass: `[B, N]`, q.
        types: `[B]`, 1 for world knowledge, 0 for other tasks.
        delta: Strength of the separation, in [0, 1).

    Returns:
        A scalar, float32 at least.

    Raises:
        BadInput: types of other values or number; an odd number of experts with `delta` other than 0; a single entry.
    """
    mass = route_mass.to(torch.promote_types(route_mass.dtype, torch.float32))
    batch, experts = mass.shape
    check_experts(experts, delta)
    kinds = check_types(types, batch).to(mass.device)
    second = torch.arange(experts, device=mass.device) >= experts // 2
    importance = 1 + delta * (1 - 2 * (kinds.bool()[:, None] == second).to(mass.dtype))
    z = importance * mass
    return z.var() / (z.mean().square() + 1e-10)


def check_experts(experts: int, delta: float) -> None:
    """Raises BadInput unless there are two or more experts, in halves where `delta`, in [0, 1), is not 0."""
    if experts < 2:
        raise BadInput("num_experts", experts, "is below 2", "give 2 or more")
    if not 0 <= delta < 1:
        raise BadInput("delta", delta, "is not in [0, 1)", "give a smaller number, such as 0.1")
    if delta and experts % 2:
        raise BadInput(
            "num_experts", experts, "is odd and cannot be halved", "give an even number, or delta=0"
        )


@dataclass
class _Record:
    """What a forward pass is to leave behind: the mass of each layer and adapter, `[B, N]`."""

    mask: torch.Tensor | None
    masses: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


_TYPES: ContextVar[Any] = ContextVar("types", default=None)
_RECORD: ContextVar[_Record | None] = ContextVar("record", default=None)


@contextlib.contextmanager
def task_types(types: Any) -> Iterator[None]:
    """Say what the samples of the batches inside are: 1 for world knowledge, 0 for other tasks.

    A batch's own `task_types` come first. Only training with `beta > 0` reads them; inference needs none.

    Args:
        types: `[B]`, a tensor or list.

    Raises:
        BadInput: other values than 0 and 1.
    """
    token = _TYPES.set(check_types(types))
    try:
        yield
    finally:
        _TYPES.reset(token)


@contextlib.contextmanager
def watched(mask: torch.Tensor | None) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """Record what the routers do in the forward passes inside: (id of the layer, adapter) -> mass, `[B, N]`."""
    record = _Record(mask)
    token = _RECORD.set(record)
    try:
        yield record.masses
    finally:
        _RECORD.reset(token)


@dataclass
class LoraMoeConfig(PeftConfig):
    """What `get_peft_model` takes; `loramoe` makes one.

    Attributes:
        r: Rank of each expert.
        lora_alpha: The experts' sum is scaled by lora_alpha / r.
        num_experts: Experts per layer.
        lora_dropout: On the experts' input, not on the router's.
        target_modules: Names or endings of linear layers, or a regular expression; None takes the feed-forward
            projections of llama-type models.
        blc_alpha: delta of the localized balancing constraint.
        blc_weight: beta, its weight beside the task's loss.
        count_padding: Let padding count in the constraint, as the authors' code does.
        modules_to_save: Further modules to train whole.
    """

    r: int = 4
    lora_alpha: float = 32
    num_experts: int = 8
    lora_dropout: float = 0.05
    target_modules: list[str] | str | None = None
    blc_alpha: float = 0.1
    blc_weight: float = 0.1
    count_padding: bool = False
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = new_kind("loramoe")
        check_positive(r=self.r, num_experts=self.num_experts)
        check_experts(self.num_experts, self.blc_alpha)
        check_number("alpha", self.lora_alpha)
        check_number("beta", self.blc_weight, zero=True)
        if not 0 <= self.lora_dropout < 1:
            raise BadInput("dropout", self.lora_dropout, "is not in [0, 1)", "give a probability")


class LoraMoeLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer with experts and a router per adapter: `[N, r, m]`, `[N, n, r]` and `[N, m]`."""

    adapter_layer_names = ("loramoe_A", "loramoe_B", "loramoe_router")
    other_param_names = ("loramoe_dropout", "scaling")
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _active_adapter: str | list[str]

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.loramoe_A, self.loramoe_B = nn.ParameterDict(), nn.ParameterDict()
        self.loramoe_router, self.loramoe_dropout = nn.ParameterDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)  # no dropout in a model that is in evaluation mode

    def update_layer(self, name: str, config: LoraMoeConfig) -> None:
        """Add the adapter `name`: A and the router drawn as LoRA's A is, B zero."""
        like = self.base_layer.weight
        make: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        bound = 1 / math.sqrt(self.in_features)  # Kaiming-uniform with a = sqrt(5), each expert by itself
        a = torch.empty((config.num_experts, config.r, self.in_features), **make).uniform_(-bound, bound)
        router = torch.empty((config.num_experts, self.in_features), **make).uniform_(-bound, bound)
        b = torch.zeros((config.num_experts, self.out_features, config.r), **make)
        self.loramoe_A[name], self.loramoe_B[name] = nn.Parameter(a), nn.Parameter(b)
        self.loramoe_router[name] = nn.Parameter(router)
        self.loramoe_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.scaling[name] = config.lora_alpha / config.r
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the mixture of each active adapter."""
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        record = _RECORD.get()
        for name in self.active_adapters:
            if name not in self.loramoe_A:
                continue
            weights = route(x, self.loramoe_router[name])
            if record is not None:
                record.masses[id(self), name] = route_mass(weights, record.mask)
            a, b = self.loramoe_A[name], self.loramoe_B[name]
            added = expert_mixture(self.loramoe_dropout[name](x), weights, a, b, self.scaling[name])
            out = out + added.to(out.dtype)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotApplicable."""
        _no_merge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: the experts' weights depend on the input."""
        return False


def _no_merge() -> NoReturn:
    problem = "cannot be merged: how the experts are mixed depends on the input, and a weight does not"
    raise NotApplicable("merge", "LoRAMoE", problem, "keep the adapter, or take it off with restore")


class LoraMoeModel(Tuner):
    """The tuner: puts experts on the targets, and in training adds the balance to the loss the model returns."""

    prefix = "loramoe_"
    tuner_layer_cls = LoraMoeLinear
    balance: torch.Tensor | None = None
    _warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the latest balance, whose graph belongs to its pass: no copy can be made of it."""
        return {**self.__dict__, "balance": None}

    def _prepare_adapter_config(
        self, peft_config: LoraMoeConfig, model_config: dict[str, Any]
    ) -> LoraMoeConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = list(FEED_FORWARD)
        return peft_config

    def _prepare_model(self, peft_config: LoraMoeConfig, model: nn.Module) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            return  # a further adapter, on layers that were checked
        if peft_config.target_modules != "all-linear":
            check_targets(model, peft_config)

    def _create_and_replace(
        self, peft_config: LoraMoeConfig, adapter_name: str, target: nn.Module, target_name: str,
        parent: nn.Module, current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(target, LoraMoeLinear):
            if not isinstance(target, nn.Linear):
                remedy = "target the layers that the first adapter sits on"
                raise NotApplicable("target_modules", current_key, "is no linear layer", remedy)
            layer = LoraMoeLinear(target)
            layer._active_adapter = list(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, peft_config)

    def forward(self, *args: Any, task_types: Any = None, **kwargs: Any) -> Any:
        """The model's output. With types known, in training, its loss holds the balance, which `balance` keeps."""
        active = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        modules = list(self.model.modules())
        disabled = any(m.disable_adapters for m in modules if isinstance(m, LoraMoeLinear))
        if not self.model.training or disabled or not any(config.blc_weight > 0 for config in active):
            return super().forward(*args, **kwargs)
        types = _TYPES.get() if task_types is None else task_types
        self.balance = None
        if types is None:
            if not self._warned:
                self._warned = True
                warnings.warn("no task_types were given: experts are trained without balance", stacklevel=2)
            return super().forward(*args, **kwargs)
        if any(getattr(module, "gradient_checkpointing", False) for module in modules):
            problem = "recomputes layers when their routers' balance is needed no more"
            raise NotApplicable("gradient_checkpointing", True, problem, "turn it off, or train with beta=0")
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, torch.Tensor) and mask.dim() == 2
        counted = any(config.count_padding for config in active)
        with watched(mask if padded and not counted else None) as masses:
            output = super().forward(*args, **kwargs)
        total = next(self.parameters()).new_zeros((), dtype=torch.float32)
        for (_, name), mass in masses.items():
            config = self.peft_config[name]
            kinds = check_types(types, mass.shape[0])
            balance = localized_balancing_loss(mass, kinds, config.blc_alpha)
            total = total.to(balance.device) + config.blc_weight * balance
        self.balance = total
        if kwargs.get("labels") is None:
            return output
        total = total * batch_share(self.model, kwargs)
        if isinstance(output, tuple):
            return (output[0] + total, *output[1:])
        output["loss"] = output["loss"] + total
        return output

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotApplicable."""
        _no_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotApplicable."""
        _no_merge()


def check_targets(model: nn.Module, config: LoraMoeConfig) -> None:
    """Raises BadInput or NotApplicable unless the targets are plain linear layers wider than the rank."""
    targets = config.target_modules or FEED_FORWARD
    for name, layer in linear_targets(model, targets, config.modules_to_save).items():
        smaller = min(layer.weight.shape)
        if config.r >= smaller:
            problem = f"is not below {smaller}, the smaller side of {name}"
            raise BadInput("r", config.r, problem, "give a smaller rank or other target_modules")


def typed(rows: Sequence[Mapping[str, Any]], default: int) -> torch.Tensor:
    """The rows' `task_type`s, int64 `[B]`, `default` for those without one."""
    return check_types([row.get("task_type", default) for row in rows])


register("loramoe", LoraMoeConfig, LoraMoeModel)
