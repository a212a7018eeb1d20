"""The Makefile's environment: made once, by one installer, whole after an interruption and in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """What the set-up reads, in a folder with a space in its name."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder: Path, *words: str, pip: str) -> str:
    """Run targets with another installer; their own commands fail, as nothing is installed."""
    command = ["make", "-s", f"PYTHON={sys.executable}", f"PIP={pip}", *words]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


ASK = ".venv/bin/python -m pip --version --"  # pip says where it is, whatever follows


def test_a_killed_set_up_starts_again(checkout):
    """The interpreter is there before pip is."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (checkout / ".venv" / "mine").touch()
    assert str(checkout / ".venv" / "lib") in make(checkout, "demo", pip=ASK)
    assert (checkout / ".venv" / "mine").exists()


def test_a_moved_folder_gets_its_own_environment(checkout):
    """Commands in an environment name the interpreter by its path."""
    make(checkout, "demo", pip=ASK)
    moved = checkout.rename(checkout.with_name("moved"))
    assert str(moved / ".venv" / "lib") in make(moved, "demo", pip=ASK)
    subprocess.run([moved / ".venv" / "bin" / "pip", "--version"], check=True, capture_output=True)
    assert "pip" not in make(moved, "demo", pip=ASK)  # once is enough


def test_one_installer_at_a_time(checkout):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    pip = checkout / "pip.sh"
    pip.write_text("echo start >> log; sleep 0.2; echo end >> log\n")
    make(checkout, "-j2", "-k", "demo", "docs", pip="bash pip.sh")
    lines = (checkout / "log").read_text().split()
    assert lines == ["start", "end"] * (len(lines) // 2) and len(lines) >= 6
