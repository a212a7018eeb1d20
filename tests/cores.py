"""The contract's checks of a numeric core, for objectives that are no method of their own."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from unittest import mock


def checks():
    """Those tests of `contract/test_distill.py` that take a case (and a dtype), by name."""
    path = Path(__file__).parent / "contract" / "test_distill.py"
    spec = importlib.util.spec_from_file_location("contract_of_cores", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch("transfuse.catalogue.methods", return_value=[]):  # the methods are not wanted here
        spec.loader.exec_module(module)
    found = {name: f for name, f in vars(module).items() if name.startswith("test_")}
    wanted = {name: f for name, f in found.items() if "case" in inspect.signature(f).parameters}
    assert len(wanted) >= 8
    return wanted


def run_all(case):
    """Hold `case` to every check."""
    import torch

    for f in checks().values():
        if "dtype" in inspect.signature(f).parameters:
            for dtype in (torch.float32, torch.bfloat16):
                f(case, dtype)
        else:
            f(case)
