"""Adapters of documents on disk: one safetensors file each, all for one base model and one initialisation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..core.data import Document
from ..core.errors import BadInput, CorruptFile, IncompatibleModels
from ..core.files import (
    atomic_write,
    check_writable,
    disk_guard,
    locked,
    read_tensors,
    write_tensors,
)
from ._base import Injector
from ._lora import AdapterHandle, Factors, check_base, merge_adapters, pack, unpack

__all__ = ["AdapterStore", "factors_hash"]

_FORMAT = 1


def factors_hash(factors: Factors) -> str:
    """SHA-256 over the factors' names and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pack(factors).items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _with_hash(shared: Mapping[str, Any], init: Factors) -> dict[str, Any]:
    return {**json.loads(json.dumps(shared)), "init": factors_hash(init)}


class AdapterStore(Injector):
    """A folder of adapters, keyed by document, base model and initialisation.

    `manifest.json` says what all adapters share: the base model's fingerprint, the hash of the common
    initialisation, the adapters' shape and how they were trained. `init.safetensors` is that initialisation,
    and each document has one file under `adapters/`, named by the first half of its hash. Each file is written
    atomically and names the hashes it belongs to: a store survives a kill, and a foreign file is noticed.

    Args:
        folder: Where it is, or will be; to read from it, it need not be writable.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser()

    @property
    def manifest(self) -> dict[str, Any]:
        """What all adapters share; empty before anything was encoded.

        Raises:
            CorruptFile: it cannot be read.
        """
        path = self.folder / "manifest.json"
        if not path.exists():
            return {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["format"] != _FORMAT or not {"base", "init", "lora", "recipe", "skipped"} <= kept.keys():
                raise ValueError("unknown format")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(
                "store", str(path), f"is not the manifest of an adapter store ({error})",
                "restore it, or encode into another folder",
            ) from error  # fmt: skip
        return kept

    def compare(self, shared: Mapping[str, Any], init: Factors) -> None:
        """Check that these adapters may join the store; an empty store takes any.

        Args:
            shared: `base` (fingerprint), `lora` (rank, alpha, targets), `recipe` (how documents are trained).
            init: The common initialisation, known by its hash.

        Raises:
            IncompatibleModels: the store belongs to another base model or initialisation.
            BadInput: its adapters were trained in another way, the message naming the difference; or its folder
                cannot be written.
        """
        check_writable(self.folder, "store")
        kept, wanted = self.manifest, _with_hash(shared, init)
        if not kept:
            return
        old, new = {**kept["lora"], **kept["recipe"]}, {**wanted["lora"], **wanted["recipe"]}
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if kept["base"] == wanted["base"] and changed:
            shown = ", ".join(f"{key} {old.get(key)} (now {new.get(key)})" for key in changed)
            raise BadInput(
                "store", str(self.folder), f"was encoded with {shown}", "encode into another folder"
            )
        for name, kind in (("base", "base model"), ("init", "initialisation")):
            if kept[name] != wanted[name]:
                raise IncompatibleModels(
                    "store", str(self.folder), f"holds adapters of another {kind} ({kept[name][:12]}, not "
                    f"{wanted[name][:12]})", "encode into another folder",
                )  # fmt: skip

    def bind(self, shared: Mapping[str, Any], init: Factors) -> None:
        """Make the store for these adapters, or check that it already is; arguments and errors of `compare`."""
        with locked(self.folder / ".lock"):
            self.compare(shared, init)
            if not self.manifest:
                wanted = _with_hash(shared, init)
                write_tensors(self.folder / "init.safetensors", pack(init), {"init": wanted["init"]})
                self._write({"format": _FORMAT, **wanted, "skipped": {}})

    def _write(self, manifest: Mapping[str, Any]) -> None:
        atomic_write(self.folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))

    def initial(self) -> Factors | None:
        """The common initialisation, from which more documents can be encoded; None in a new store."""
        path = self.folder / "init.safetensors"
        if not self.manifest:
            return None
        tensors, _ = read_tensors(path)
        return unpack(tensors, str(path))

    def path(self, document: Document) -> Path:
        """Where the document's adapter lies, whether or not it exists."""
        return self.folder / "adapters" / f"{document.hash[:32]}.safetensors"

    def __contains__(self, document: Document) -> bool:
        return self.path(document).is_file()

    def __len__(self) -> int:
        return sum(1 for _ in (self.folder / "adapters").glob("*.safetensors"))

    @property
    def bytes(self) -> int:
        """Size of all adapters on disk."""
        return sum(path.stat().st_size for path in (self.folder / "adapters").glob("*.safetensors"))

    @property
    def skipped(self) -> dict[str, str]:
        """Hash -> title or beginning of the documents that no questions could be made for."""
        return dict(self.manifest.get("skipped", {}))

    def skip(self, document: Document) -> None:
        """Note that a document cannot be encoded, so that retrieval passes it over; what other material made goes."""
        with disk_guard(self.folder):
            self.path(document).unlink(missing_ok=True)
        with locked(self.folder / ".lock"):
            kept = self.manifest
            kept["skipped"][document.hash] = document.title or document.text[:60]
            self._write(kept)

    def put(self, document: Document, factors: Factors, header: Mapping[str, Any]) -> None:
        """Keep a document's adapter; `header` is JSON-able and comes back from `read`."""
        kept = self.manifest
        known = {
            "id": document.id,
            "title": document.title,
            "hash": document.hash,
            "base": kept["base"],
            "init": kept["init"],
        }
        with disk_guard(self.folder):
            self.path(document).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path(document), pack(factors), {**header, **known})
        if document.hash in kept["skipped"]:
            with locked(self.folder / ".lock"):
                kept = self.manifest
                kept["skipped"].pop(document.hash, None)
                self._write(kept)

    def get(self, document: Document) -> Factors:
        """A document's adapter; see `read` for the errors."""
        return self.read(document)[0]

    def read(self, document: Document) -> tuple[Factors, dict[str, Any]]:
        """A document's adapter and the header it was kept with.

        Raises:
            BadInput: the document was never encoded.
            CorruptFile: its file is damaged.
            IncompatibleModels: its file belongs to another base model, initialisation or document.
        """
        path = self.path(document)
        if not path.is_file():
            raise BadInput(
                "document", document.title or document.id or document.text[:40],
                f"is not in the store {self.folder}", "encode it first",
            )  # fmt: skip
        tensors, header = read_tensors(path)
        kept = self.manifest
        for name, wanted in (("base", kept.get("base")), ("init", kept.get("init")), ("hash", document.hash)):
            if header.get(name) != wanted:
                raise IncompatibleModels(
                    "adapter", str(path), f"belongs to another {name}", "delete the file and encode again"
                )
        return unpack(tensors, str(path)), header

    def merged(
        self, documents: Sequence[Document], *, weights: Sequence[float] | None = None, scale: float = 1.0
    ) -> Factors:
        """The documents' adapters as one of scale 1 (see `merge_adapters`).

        Args:
            documents: Which, in any order.
            weights: One per document; 1 each by default.
            scale: A further weight of the whole sum.
        """
        lora = self.manifest.get("lora")
        if not documents or lora is None:
            raise BadInput("documents", len(documents), "have no adapters here", "encode documents first")
        return merge_adapters(
            [self.get(document) for document in documents],
            scale=scale * lora["alpha"] / lora["rank"],
            weights=weights,
        )

    def check(self, model: PreTrainedModel) -> str:
        """The model's fingerprint, if the adapters were made for it.

        Raises:
            IncompatibleModels: they were not.
            BadInput: the store is empty.
        """
        base = self.manifest.get("base")
        if base is None:
            raise BadInput("store", str(self.folder), "is empty", "encode documents first")
        return check_base(model, base, str(self.folder))

    def apply(
        self,
        model: PreTrainedModel,
        request: Sequence[Document],
        *,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> AdapterHandle:
        """Attach the sum of the documents' adapters to `model`.

        Args:
            model: The base model the store was made for.
            request: The documents.
            weights: One per document; 1 each by default.
            scale: A further weight of the whole sum.

        Raises:
            IncompatibleModels: another base model.
            BadInput: a document is not in the store.
            CorruptFile: an adapter file is damaged.
        """
        base = self.check(model)
        factors = self.merged(request, weights=weights, scale=scale)
        inputs = {"documents": [document.hash for document in request], "weights": weights, "scale": scale}
        return AdapterHandle(model, factors, base=base, method="parametric-rag", inputs=inputs)
