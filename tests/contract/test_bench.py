"""What every study and benchmark holds. Each is found in the catalogue; its own test file says how to run one.

`tests/bench/test_<name>.py` defines `make(**changes)` -> arguments of the study's function, and `FACTS`, its records,
for tiny models.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from transfuse import catalogue
from transfuse.bench._base import Evaluation
from transfuse.core.models import fingerprint

METHODS = catalogue.methods(family="bench")
TESTS = Path(__file__).resolve().parents[1] / "bench"


def test_the_family_is_found():
    assert "knowedit" in {m.slug for m in METHODS}


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def case(request):
    path = TESTS / f"test_{request.param.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return catalogue.get(request.param.slug), module


def test_figures_are_repeatable_and_the_model_is_left_alone(case, tiny_lm, tiny_tokenizer):
    study, module = case
    model = tiny_lm("llama")
    before = fingerprint(model)
    first, second = (study(model, tiny_tokenizer, module.FACTS, **module.make()) for _ in range(2))
    assert fingerprint(model) == before
    assert isinstance(first, Evaluation) and len(first.records) == len(module.FACTS)
    assert first.means.keys() == second.means.keys()
    for name, interval in first.summary.items():
        assert interval.low <= interval.mean <= interval.high and 1 <= interval.size <= len(module.FACTS)
        assert name == "seconds" or interval == second.summary[name]
    assert json.loads(json.dumps(first.to_dict()))["summary"].keys() == first.summary.keys()
