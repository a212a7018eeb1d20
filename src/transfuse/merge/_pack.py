"""A skill pack: what a tuned model has beyond its base, compressed, plugged into the base and taken out again.

A pack is a folder of two files.

- `packed.safetensors`, the payload (see `core.packed`). Of a decomposed tensor `name`: `name/S`, the singular values in
  16 bits; and for group g of singular columns `name/g/U` `[m, c]` and `name/g/V` `[c, n]`, whole numbers of b bits
  without gaps under `...|codes`, with `...|step` (float16) and `...|offset` (zero points, uint8) `[rows, groups]`, or
  ordinary tensors at 16 bits. Where GPTQ put columns in an order of its own, `.../owner` says which group each belongs
  to, in as few bits as the count of groups takes; the codes then lie group by group. Of a pruned tensor: `name/where`
  (places, or one bit per entry) and `name/entries`. Of one kept whole: `name/delta`.
- `skill.json`, the header: `format`, the pack's `name`, the base's `fingerprint`, `dtype` and number of `parameters`,
  the policy, whether inputs were given (`calibrated`), per tensor its operator, shape and groups, and the SHA-256 of
  the payload. Its own SHA-256 is its last entry, and it is written in one canonical form: a changed byte is noticed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, CorruptFile, IncompatibleModels
from ..core.files import atomic_dir, atomic_write, check_writable, hash_state, sha256_file, sha256_json
from ..core.lineage import jsonable, write_lineage
from ..core.models import fingerprint, load
from ..core.packed import PACKED, pack_bits, read_packed, write_packed
from ._pack_calibrate import calibration_batches, compress
from ._pack_pieces import ModulePolicy, Piece, read_piece
from ._plan import plan_merge
from ._static import check_half, task_vectors

__all__ = ["HEADER", "SkillPack", "plug", "plugged", "read_header", "unplug", "write_header"]

HEADER = "skill.json"
_FORMAT = 1
_GRAFTS = "transfuse_grafts"  # attribute of a model


@dataclasses.dataclass
class _Grafts:
    """What a model with packs remembers: its base's hash, the base's own tensors, the packs."""

    base: str
    kept: dict[str, Tensor]
    packs: list[SkillPack]


class SkillPack:
    """The compressed difference between a tuned model and its base.

    `from_models` makes one, `from_pretrained` reads one.

    Args:
        name: Of the skill.
        pieces: What is held, by name of the base's tensor.
        facts: `base` (the base's fingerprint), `dtype`, `parameters`, `policy` and `calibrated`.
    """

    def __init__(self, name: str, pieces: Mapping[str, Piece], facts: Mapping[str, Any]):
        self.name, self.pieces, self.facts = name, dict(pieces), dict(facts)
        self._unpacked: dict[str, Tensor] = {}

    @classmethod
    def from_models(
        cls,
        tuned: Any,
        base: nn.Module | str | os.PathLike[str],
        *,
        name: str = "skill",
        policy: ModulePolicy | None = None,
        calibration: Any = None,
    ) -> SkillPack:
        """Compress what a tuned model has beyond its base. Neither is changed.

        Args:
            tuned: A fine-tune of the base: a model, state dict, folder, name, or LoRA adapter.
            base: A model, or its folder or name.
            name: Of the skill.
            policy: Operators per tensor; the paper's ranks and bits by default.
            calibration: Inputs like those that the skill will see: a tensor (the model's first argument), tensors by
                name, or a list or loader of either. Without any, factors are rounded to nearest.

        Raises:
            IncompatibleModels: a tensor that one of the two lacks, or of another shape; names it.
            BadInput: a policy out of range, inputs of another form, NaN or infinity; a base with packs plugged in.
        """
        chosen = ModulePolicy() if policy is None else policy
        if not isinstance(chosen, ModulePolicy):
            raise BadInput("policy", chosen, "is no ModulePolicy", "write ModulePolicy(share=0.1)")
        chosen.check()
        if isinstance(base, nn.Module) and plugged(base):
            here = ", ".join(pack.name for pack in plugged(base))
            raise BadInput("base", type(base).__name__, f"has packs plugged in: {here}", "remove them first")
        if not name or "+" in name:
            raise BadInput("name", name, "is empty or has a plus in it", "give a word")
        model = base if isinstance(base, nn.Module) else load(base).model
        plan = plan_merge(models=[tuned], base=model, method="task_arithmetic")
        batches = None if calibration is None else calibration_batches(model, calibration)
        own, other = plan.base, plan.models[0]
        assert own is not None

        def delta(tensor: str) -> Tensor:
            (found,) = task_vectors(own.tensor(tensor), [other.tensor(tensor)])
            found = found.float()
            if not bool(torch.isfinite(found).all()):
                raise BadInput(
                    f"tuned[{tensor!r}]", "NaN or infinity", "has no difference", "check the model"
                )
            return found

        names = [tensor for tensor in plan.infos if tensor not in plan.kept]
        pieces = compress(model, ((tensor, delta(tensor)) for tensor in names), chosen, batches)
        facts = {
            "base": fingerprint(model),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "parameters": sum(own.tensor(tensor).numel() for tensor in names),
            "policy": jsonable(chosen),
            "calibrated": batches is not None,
        }
        return cls(name, pieces, facts)

    # --- what it holds -------------------------------------------------------------------------------------

    def _stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        codes: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, piece in self.pieces.items():
            more, others = piece.stored(name)
            codes |= more
            tensors |= others
        return codes, tensors

    @property
    def nbytes(self) -> int:
        """Bytes of the payload's tensors: codes, steps, zero points, singular values, places, entries."""
        codes, tensors = self._stored()
        return sum(each.bytes for each in codes.values()) + sum(t.nbytes for t in tensors.values())

    @property
    def ratio(self) -> float:
        """`nbytes` relative to the base's parameters at 16 bits each."""
        return self.nbytes / (2 * int(self.facts["parameters"]))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over its base and all that it holds; packs of one content are one pack."""
        codes, tensors = self._stored()
        state = dict(tensors)
        for name, each in codes.items():
            state |= {
                f"{name}|codes": pack_bits(each.codes, each.bits),
                f"{name}|step": each.step,
                f"{name}|offset": each.offset,
            }
        return sha256_json([self.facts["base"], hash_state(state)])

    def delta(self, name: str) -> Tensor:
        """The change of a tensor, float32, on the CPU.

        Raises:
            BadInput: the pack does not change it.
        """
        if name not in self.pieces:
            raise BadInput("name", name, f"is not changed by the pack {self.name}", "use one of `pieces`")
        found = self._unpacked.get(name)
        return self.pieces[name].delta() if found is None else found

    def unpack(self, keep: bool = True) -> SkillPack:
        """Hold the changes unpacked from now on (4 bytes per changed number), so that plugging in takes no time.

        Args:
            keep: False forgets them again.

        Returns:
            Itself.
        """
        self._unpacked = {name: piece.delta() for name, piece in self.pieces.items()} if keep else {}
        return self

    # --- in and out ----------------------------------------------------------------------------------------

    def apply(self, model: nn.Module) -> None:
        """Add it to a model's weights, in place; the model's own are kept beside them.

        Packs add up: the weights are the base's plus the sum of all changes, whatever the order of the calls. A model
        with packs plugged in must not be trained: its weights are set anew by the next call.

        Args:
            model: The pack's base, or that base with other packs.

        Raises:
            IncompatibleModels: another model; names the tensor where names or shapes differ. Nothing was changed.
            BadInput: it is applied already.
        """
        here = plugged(model)
        if any(pack.digest == self.digest for pack in here):
            raise BadInput("pack", self.name, "is applied to this model already", "remove it first")
        plug(model, [*here, self])

    def remove(self, model: nn.Module) -> None:
        """Take it out again. Without packs the model is the base, bit for bit.

        Raises:
            BadInput: it is not applied to this model.
        """
        here = plugged(model)
        left = [pack for pack in here if pack.digest != self.digest]
        if len(left) == len(here):
            raise BadInput("pack", self.name, "is not applied to this model", "apply it first")
        plug(model, left)
        if not left:
            unplug(model)

    # --- to disk and back ----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the pack's folder, replaced at once; see the module's text for the format."""
        target = check_writable(folder, "folder")
        with atomic_dir(target) as work:
            self.write(work)
            write_lineage(
                work,
                method="graftllm",
                arguments=self.facts["policy"],
                measurements={"bytes": self.nbytes, "ratio": self.ratio},
                summary=f"A skill pack, {self.name}: the compressed change of {len(self.pieces)} tensors.",
                usage="from transfuse.merge.graftllm import SkillPack\n\n"
                f'SkillPack.from_pretrained("{target}").apply(base)',
            )
        return target

    def write(self, folder: Path) -> None:
        """Write the two files into a folder that exists."""
        codes, tensors = self._stored()
        path = write_packed(folder, codes, tensors, {"format": _FORMAT})
        body = {
            "format": _FORMAT, "name": self.name, **self.facts,
            "tensors": {name: piece.facts() for name, piece in self.pieces.items()},
            "payload_sha256": sha256_file(path),
        }  # fmt: skip
        write_header(folder / HEADER, body)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SkillPack:
        """Read a pack.

        Raises:
            BadInput: the folder holds none.
            CorruptFile: a byte of one of its files is not as it was written, or the format is another.
        """
        path = Path(folder)
        body = read_header(path / HEADER, "holds no skill pack")
        if body.get("format") != _FORMAT:
            raise CorruptFile(
                "folder", str(path), f"is of format {body.get('format')}", "make the pack again"
            )
        payload = path / PACKED
        if not payload.is_file() or sha256_file(payload) != body.get("payload_sha256"):
            raise CorruptFile("folder", str(payload), "is not as it was written", "copy the pack again")
        codes, tensors, _ = read_packed(path)
        try:
            pieces = {n: read_piece(n, facts, codes, tensors) for n, facts in body["tensors"].items()}
            facts = {key: body[key] for key in ("base", "dtype", "parameters", "policy", "calibrated")}
            return cls(body["name"], pieces, facts)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CorruptFile("folder", str(path), f"is not whole ({error!r})", "copy it again") from error

    load = from_pretrained


# --- plugging ----------------------------------------------------------------------------------------------


def plugged(model: nn.Module) -> list[SkillPack]:
    """The packs that are applied to a model."""
    grafts = model.__dict__.get(_GRAFTS)
    return [] if grafts is None else list(grafts.packs)


@torch.no_grad()
def plug(model: nn.Module, packs: Sequence[SkillPack]) -> None:
    """Set a model's weights to its base's plus the changes of these packs and no others.

    Raises:
        IncompatibleModels: a pack of another model. Nothing was changed.
        BadInput: a sum that float16 does not hold. The model is the base again.
    """
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    grafts = model.__dict__.get(_GRAFTS)
    here = [] if grafts is None else grafts.packs
    new = [pack for pack in packs if not any(pack is old for old in here)]
    for pack in new:
        for name, piece in pack.pieces.items():
            if name not in own or tuple(own[name].shape) != piece.shape:
                found = "is missing" if name not in own else f"is {list(own[name].shape)} in the model"
                problem = f"{found}, {list(piece.shape)} in the pack {pack.name}"
                raise IncompatibleModels("model", name, problem, "apply the pack to its own base")
    if new:
        base = fingerprint(model) if grafts is None else grafts.base
        for pack in new:
            if pack.facts["base"] != base:
                problem = f"is not the base of the pack {pack.name} ({pack.facts['base'][:12]}...)"
                remedy = f"apply it to its own base, in {pack.facts['dtype']}"
                raise IncompatibleModels("model", f"{base[:12]}...", problem, remedy)
        if grafts is None:
            grafts = model.__dict__[_GRAFTS] = _Grafts(base, {}, [])
    if grafts is None:
        return
    order = sorted(packs, key=lambda pack: pack.digest)  # sums do not depend on the order of the calls
    now, then = _touching(order), _touching(grafts.packs)
    changed = [name for name in {**then, **now} if now.get(name, []) != then.get(name, [])]
    for name in changed:
        if name not in grafts.kept:
            grafts.kept[name] = own[name].detach().clone()
    try:
        for name in changed:
            value = grafts.kept[name].to(own[name].device)
            if name in now:
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                for pack in now[name]:
                    value = value + pack.delta(name).to(value.device)
            own[name].data.copy_(value)
            check_half(name, value, own[name].data, 'load the base with dtype="bfloat16"')
    except BaseException:
        for name, value in grafts.kept.items():
            own[name].data.copy_(value)
        grafts.packs = []
        raise
    grafts.packs = order


def _touching(packs: Sequence[SkillPack]) -> dict[str, list[SkillPack]]:
    found: dict[str, list[SkillPack]] = {}
    for pack in packs:
        for name in pack.pieces:
            found.setdefault(name, []).append(pack)
    return found


def unplug(model: nn.Module) -> None:
    """Give a model its base's weights back, bit for bit, and forget all packs."""
    plug(model, [])
    model.__dict__.pop(_GRAFTS, None)


# --- headers -----------------------------------------------------------------------------------------------


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps({**body, "sha256": sha256_json(body)}, indent=1, ensure_ascii=True) + "\n"


def write_header(path: Path, body: Mapping[str, Any]) -> None:
    """Write a JSON object with its own SHA-256 as the last entry."""
    atomic_write(path, _canonical(body))


def read_header(path: Path, otherwise: str) -> dict[str, Any]:
    """What `write_header` wrote.

    Args:
        path: The file.
        otherwise: What is wrong with a folder that lacks it.

    Raises:
        BadInput: there is no such file.
        CorruptFile: a byte of it is not as it was written.
    """
    if not path.is_file():
        raise BadInput("folder", str(path.parent), otherwise, f"give a folder with {path.name}")
    try:
        text = path.read_bytes().decode("ascii")
        body = json.loads(text)
        body.pop("sha256")
        whole = text == _canonical(body)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptFile("folder", str(path), f"is no header ({error})", "copy it again") from error
    if not whole:
        raise CorruptFile("folder", str(path), "is not as it was written", "copy it again")
    return dict(body)
