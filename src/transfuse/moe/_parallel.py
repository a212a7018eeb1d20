"""Expert-parallel decoding of a small model over torch.distributed: both schedules for real, collectives counted.

It shows what `simulate_cluster` counts; it is no serving engine. Every process holds the attention of all layers and
the experts that the plan gives it (those of others are overwritten with NaN). Tokens are computed one at a time, so
that the order of sums does not depend on where a token is, and logits are the same bit for bit in both schedules.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import BadInput, NotApplicable
from ..core.files import read_tensors, write_tensors
from ._placement import PlacementPlan
from ._trace import expert_modules

__all__ = ["Decoded", "decode_on_processes"]

Schedule = Literal["vanilla", "coherent"]


@dataclass(frozen=True)
class Decoded:
    """What expert-parallel decoding gives.

    Attributes:
        logits: float32 `[steps, B, V]` at the generated positions.
        tokens: int64 `[B, T + steps]`, greedy.
        iterations: Forward passes of one token per sequence.
        collectives: How many of each kind: `all_to_all`, `all_gather` (of iterations), `prompts` (before them).
        sent: Token vectors that left their process, all processes together.
    """

    logits: Tensor
    tokens: Tensor
    iterations: int
    collectives: dict[str, int] = field(default_factory=dict)
    sent: int = 0


def decode_on_processes(
    model: Any,
    prompts: Sequence[Sequence[int]],
    plan: PlacementPlan,
    *,
    steps: int,
    schedule: Schedule = "coherent",
) -> Decoded:
    """Start one process per device of the plan (gloo, CPU) and decode greedily, prompts token by token.

    Args:
        model: A decoder with pre-norm blocks whose every layer has experts, one chosen per token (OLMoE, Qwen-MoE or
            Mixtral with `num_experts_per_tok=1`). It is left as it is.
        prompts: Rows of ids, of one length.
        plan: Where experts live; its devices are the processes.
        steps: Tokens to generate.
        schedule: As in `simulate_cluster`.

    Raises:
        BadInput: prompts of unequal lengths, no step.
        NotApplicable: another kind of model.
    """
    if steps < 1 or not prompts or len({len(p) for p in prompts}) != 1 or not prompts[0]:
        raise BadInput(
            "prompts", [len(p) for p in prompts], "are not rows of one length", "cut them, and ask for steps"
        )
    if schedule not in ("vanilla", "coherent"):
        raise BadInput("schedule", schedule, "is not known", 'use "vanilla" or "coherent"')
    layers = getattr(getattr(model, "model", None), "layers", None)
    experts = expert_modules(model)
    plan._check([int(m.num_experts) for m in experts.values()])  # type: ignore[arg-type]
    if layers is None or len(layers) != len(experts) or model.config.num_experts_per_tok != 1:
        problem = "is no decoder with one expert per token in every layer"
        raise NotApplicable("model", type(model).__name__, problem, "set num_experts_per_tok=1")
    import torch.multiprocessing as processes

    world = plan.topology.devices
    with tempfile.TemporaryDirectory(prefix="transfuse-") as folder:
        # Not the model itself: hooks that it may carry cannot travel.
        write_tensors(
            Path(folder) / "model.safetensors", {k: t.clone() for k, t in model.state_dict().items()}
        )
        build = (type(model), model.config, model.config._attn_implementation)
        given = (world, folder, build, [list(p) for p in prompts], plan, steps, schedule)
        processes.spawn(_worker, given, nprocs=world)
        found, facts = read_tensors(Path(folder) / "decoded.safetensors")
    return Decoded(found["logits"], found["tokens"], facts["iterations"], facts["collectives"], facts["sent"])


def _worker(rank: int, world: int, folder: str, build: tuple[Any, Any, str], *rest: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    kind, config, attention = build
    model = kind(config)
    model.load_state_dict(read_tensors(Path(folder) / "model.safetensors")[0])
    model.set_attn_implementation(attention)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        decoder = _Decoder(rank, world, model.float().eval(), *rest)
        decoder.run(Path(folder) / "decoded.safetensors")
    finally:
        dist.destroy_process_group()


class _Decoder:
    """One process."""

    def __init__(
        self, rank: int, world: int, model: Any, prompts: list[list[int]], plan: PlacementPlan, steps: int,
        schedule: str,
    ):  # fmt: skip
        import torch.distributed as dist
        from transformers import DynamicCache

        self.dist, self.rank, self.world, self.model, self.plan = dist, rank, world, model, plan
        self.prompts, self.steps, self.schedule = prompts, steps, schedule
        model.config._experts_implementation = "eager"
        self.count, self.width = len(prompts), model.config.hidden_size
        self.caches = [DynamicCache(config=model.config) for _ in prompts]
        self.collectives = {"all_to_all": 0, "all_gather": 0, "prompts": 0}
        self.sent = 0
        for module, devices in zip(expert_modules(model).values(), plan.devices, strict=True):
            away = torch.from_numpy(devices != rank)
            for parameter in module.parameters():
                parameter.data[away] = torch.nan

    def home(self, row: int) -> int:
        return row % self.world

    @torch.no_grad()
    def run(self, file: Path) -> None:
        """Decode, and let process 0 write the result."""
        length, coherent = len(self.prompts[0]), self.schedule == "coherent"
        tokens = torch.full((self.count, length + self.steps), -1)
        mine = [row for row in range(self.count) if self.home(row) == self.rank]
        for row in mine:  # a process knows its own prompts only
            tokens[row, :length] = torch.tensor(self.prompts[row])
        if coherent:
            tokens = self._joined(tokens)
            self.collectives["prompts"] += 1
        logits = torch.zeros(self.steps, self.count, self.model.config.vocab_size)
        last = length + self.steps - 1
        for position in range(last):
            held = {row: self.model.model.embed_tokens(tokens[row : row + 1, position][None]) for row in mine}
            made = self._coherent(held, position) if coherent else self._vanilla(held, position)
            chosen = torch.full((self.count,), -1)
            for row, state in made.items():
                out = self.model.lm_head(self.model.model.norm(state))[0, 0].float()
                known = position + 1 < length
                chosen[row] = tokens[row, position + 1] if known else int(out.argmax())
                if not known:
                    logits[position + 1 - length, row] = out
            if coherent:
                chosen = self._share(chosen, position)
            kept = chosen >= 0
            tokens[kept, position + 1] = chosen[kept]
        total = torch.tensor([float(self.sent)])
        self.dist.all_reduce(logits)  # the result only: each row comes from one process
        self.dist.all_reduce(total)
        tokens = tokens if coherent else self._joined(tokens)
        if self.rank == 0:
            facts = {"iterations": last, "collectives": self.collectives, "sent": int(total)}
            write_tensors(file, {"logits": logits, "tokens": tokens}, facts)

    def _joined(self, tokens: Tensor) -> Tensor:
        parts = [torch.empty_like(tokens) for _ in range(self.world)]
        self.dist.all_gather(parts, tokens)
        return torch.stack(parts).amax(0)

    # --- a layer -------------------------------------------------------------------------------------------

    def _attend(self, index: int, row: int, state: Tensor, position: int) -> Tensor:
        layer: Any = self.model.model.layers[index]
        places = torch.tensor([[position]])
        angles = self.model.model.rotary_emb(state, places)
        out, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(state), position_embeddings=angles, attention_mask=None,
            past_key_values=self.caches[row], position_ids=places, use_cache=True,
        )  # fmt: skip
        return state + out

    def _destination(self, index: int, state: Tensor) -> int:
        layer: Any = self.model.model.layers[index]
        block = layer.mlp
        router = getattr(block, "gate", None) or block.router
        chosen = router(layer.post_attention_layernorm(state).view(1, -1))[2]
        return int(self.plan.devices[index][int(chosen[0, 0])])

    def _expert(self, index: int, state: Tensor) -> Tensor:
        layer: Any = self.model.model.layers[index]
        return state + layer.mlp(layer.post_attention_layernorm(state))

    def _coherent(self, held: dict[int, Tensor], position: int) -> dict[int, Tensor]:
        """Tokens wander from expert to expert."""
        self.written: dict[tuple[int, int], None] = {}
        for index in range(len(self.plan.devices)):
            held = {row: self._attend(index, row, state, position) for row, state in held.items()}
            self.written.update(dict.fromkeys((row, index) for row in held))
            held = self._exchange({row: (self._destination(index, s), s) for row, s in held.items()})
            held = {row: self._expert(index, state) for row, state in held.items()}
        return held

    def _vanilla(self, held: dict[int, Tensor], position: int) -> dict[int, Tensor]:
        """Tokens go to their expert, results come home."""
        for index in range(len(self.plan.devices)):
            held = {row: self._attend(index, row, state, position) for row, state in held.items()}
            there = self._exchange({row: (self._destination(index, s), s) for row, s in held.items()})
            held = self._exchange({row: (self.home(row), self._expert(index, s)) for row, s in there.items()})
        return held

    # --- collectives ---------------------------------------------------------------------------------------

    def _exchange(self, leaving: dict[int, tuple[int, Tensor]]) -> dict[int, Tensor]:
        """One all-to-all: states of tokens by row, to the process each names. A slot per row: flag, then the state."""
        out = torch.zeros(self.world, self.count, 1 + self.width)
        for row, (target, state) in leaving.items():
            out[target, row, 0], out[target, row, 1:] = 1, state.view(-1)
            self.sent += target != self.rank
        arrived = torch.empty_like(out)
        self.dist.all_to_all_single(arrived, out)
        self.collectives["all_to_all"] += 1
        return {
            row: arrived[source, row, 1:].view(1, 1, -1).clone()
            for source in range(self.world)
            for row in range(self.count)
            if arrived[source, row, 0] == 1
        }

    def _share(self, chosen: Tensor, position: int) -> Tensor:
        """One all-gather: the new token of each row, and the keys and values its layers wrote, wherever that was."""
        depth = len(self.plan.devices)
        example = next(iter(self.model.model.layers)).self_attn
        heads, size = self.model.config.num_key_value_heads, example.head_dim
        own = torch.zeros(self.count, 1 + depth * (1 + 2 * heads * size))
        own[:, 0] = chosen.float()
        entries = own[:, 1:].view(self.count, depth, -1)
        for row, index in self.written:
            cached = self.caches[row].layers[index]
            entries[row, index, 0] = 1
            last = [t[:, :, -1].reshape(-1) for t in (cached.keys, cached.values)]
            entries[row, index, 1:] = torch.cat(last)
        parts = [torch.empty_like(own) for _ in range(self.world)]
        self.dist.all_gather(parts, own)
        self.collectives["all_gather"] += 1
        for source, part in enumerate(parts):
            if source == self.rank:
                continue
            theirs = part[:, 1:].view(self.count, depth, -1)
            for row, index in (theirs[..., 0] == 1).nonzero().tolist():
                keys, values = theirs[row, index, 1:].view(2, 1, heads, 1, size)
                self.caches[row].update(keys.clone(), values.clone(), index)
        return torch.stack([p[:, 0] for p in parts]).amax(0).long()
