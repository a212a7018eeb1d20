"""core.fields and core.schema: what is accepted, in which type, and what the refusals say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfuse.core.errors import BadInput
from transfuse.core.fields import Node, check_arguments, check_value, from_mapping, suggest
from transfuse.core.schema import json_schema

if TYPE_CHECKING:
    from somewhere import Unseen  # never importable: stands for a name only type checkers see


@dataclass(frozen=True)
class Limits:
    """Bounds.

    Attributes:
        latency_ms: Largest mean time per answer, milliseconds.
        reversible: Only methods that can be
            undone.
    """

    latency_ms: float | None = None
    reversible: bool = False


@dataclass(frozen=True)
class Job:
    model: str
    steps: int = 10
    rate: float = 1e-4
    mode: Literal["own", "combine"] = "own"
    layers: list[int] | None = None
    pair: tuple[str, int] = ("a", 1)
    names: tuple[str, ...] = ()
    extra: dict[str, float] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    folder: Path | None = None
    alpha: float | Literal["adaptive"] = 0.5


def refused(mapping, *, where="a.yaml:", cls=Job):
    with pytest.raises(BadInput) as caught:
        from_mapping(cls, mapping, where)
    assert "\n" not in str(caught.value)
    return caught.value


def test_every_kind_of_value_arrives_in_its_type():
    job = from_mapping(
        Job,
        {
            "model": "m", "steps": 3, "rate": 1, "mode": "combine", "layers": [1, 2], "pair": ["b", 2],
            "names": ["x", "y"], "extra": {"k": 1}, "limits": {"latency_ms": 5},
            "folder": "~/x", "alpha": "adaptive",
        },
    )  # fmt: skip
    assert job == Job(
        "m", 3, 1.0, "combine", [1, 2], ("b", 2), ("x", "y"), {"k": 1.0}, Limits(5.0),
        Path("~/x").expanduser(), "adaptive",
    )  # fmt: skip
    assert type(job.rate) is float and type(job.extra["k"]) is float and type(job.limits.latency_ms) is float


def test_defaults_stay():
    assert from_mapping(Job, {"model": "m"}) == Job("m")


@pytest.mark.parametrize(
    ("mapping", "where", "says"),
    [
        ({"model": "m", "stpes": 3}, "a.yaml: stpes", "did you mean 'steps'?"),
        ({"model": "m", "zzz": 3}, "a.yaml: zzz", "known here: model, steps"),
        ({}, "a.yaml: model", "is missing; add model: text"),
        ({"model": 3}, "a.yaml: model", "put it in quotes"),
        ({"model": True}, "a.yaml: model", "true/false, not text"),
        ({"model": None}, "a.yaml: model", "is empty, not text"),
        ({"model": "m", "steps": True}, "a.yaml: steps", "true/false, not a whole number"),
        ({"model": "m", "steps": 1.5}, "a.yaml: steps", "a number, not a whole number"),
        ({"model": "m", "steps": "3"}, "a.yaml: steps", "text, not a whole number"),
        ({"model": "m", "rate": True}, "a.yaml: rate", "true/false, not a number"),
        ({"model": "m", "rate": math.nan}, "a.yaml: rate", "not a number"),
        ({"model": "m", "mode": "combin"}, "a.yaml: mode", "did you mean 'combine'?"),
        ({"model": "m", "mode": 7}, "a.yaml: mode", "one of 'own', 'combine'"),
        ({"model": "m", "layers": "12"}, "a.yaml: layers", "a list of a whole number or null"),
        ({"model": "m", "layers": [1, "x"]}, "a.yaml: layers[1]", "text, not a whole number"),
        ({"model": "m", "pair": ["a"]}, "a.yaml: pair", "has 1 items, not 2"),
        ({"model": "m", "names": "xy"}, "a.yaml: names", "write it as [a, b]"),
        ({"model": "m", "extra": {"k": "v"}}, "a.yaml: extra.k", "text, not a number"),
        ({"model": "m", "extra": {1: 1.0}}, "a.yaml: extra (key)", "put it in quotes"),
        ({"model": "m", "limits": {"latency": 1}}, "a.yaml: limits.latency", "did you mean 'latency_ms'?"),
        ({"model": "m", "limits": 3}, "a.yaml: limits", "a mapping of latency_ms, reversible"),
        ({"model": "m", "alpha": "adaptiv"}, "a.yaml: alpha", "did you mean 'adaptive'?"),
        ({"model": "m", "folder": ""}, "a.yaml: folder", "a path or null"),
        ({"model": "m", "limits": {"uses": "x"}}, "a.yaml: limits", "cannot hold `uses`"),
        ([1], "a.yaml:", "a list, not a mapping"),
        ("text", "a.yaml:", "text, not a mapping"),
    ],
)
def test_refusals_name_place_and_remedy(mapping, where, says):
    error = refused(mapping)
    assert error.argument == where
    assert says in str(error)


def test_places_without_a_file():
    assert refused({"model": "m", "limits": {"x": 1}}, where="").argument == "limits.x"
    assert refused({"model": "m", "layers": ["x"]}, where="job").argument == "job.layers[0]"


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_unions_keep_exact_types_and_agree_with_isinstance(value):
    hint = Union[float, int, str, list[int]]  # noqa: UP007
    fits = isinstance(value, (float, int, str, list)) and not isinstance(value, bool) and value == value
    if fits:
        checked = check_value(value, hint, "x")
        assert checked == value and type(checked) is type(value)
    else:
        with pytest.raises(BadInput):
            check_value(value, hint, "x")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (None, Optional[int], None),  # noqa: UP045
        (2, Annotated[float, "unit"], 2.0),
        ([1, 2], Sequence[float], [1.0, 2.0]),
        ([[1], [2, 3]], tuple[tuple[int, ...], ...], ((1,), (2, 3))),
        ([1, 1], set[int], {1}),
        ({"a": [1]}, Mapping[str, list[int]], {"a": [1]}),
        ({"uses": 1}, dict[str, int], {"uses": 1}),  # an ordinary mapping may have such a key
        (["a", {"uses": "b"}], list[str | dict[str, Any]], ["a", {"uses": "b"}]),
        ([{"latency_ms": 1}], list[Limits], [Limits(1.0)]),
        (3, Any, 3),
        (Limits(2.0), Limits, Limits(2.0)),
    ],
)
def test_values(value, hint, expected):
    checked = check_value(value, hint, "x")
    assert checked == expected and type(checked) is type(expected)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_whole_numbers_that_no_float_holds(value):
    assert check_value(value, int, "x") == value
    with pytest.raises(BadInput, match="give a number"):
        check_value(value, float, "x")


def test_the_home_of_nobody_is_left_as_it_stands():
    assert check_value("~nobody-at-all/x", Path, "x") == Path("~nobody-at-all/x")


def test_literal_true_is_not_one():
    with pytest.raises(BadInput):
        check_value(True, Literal[1], "x")
    assert check_value(1, Literal[1, "all"], "x") == 1


class Objective:
    def __init__(self, *, weight: float = 1.0, inner: Objective | None = None):
        self.weight, self.inner = weight, inner


def trainer(
    model: Unseen, *, objective: Objective, hook: Callable[[], None] | None = None, seed: int = 0
) -> tuple:
    return model, objective, seed


def resolve(name, where):
    known = {"objective": Objective, "limits": Limits}
    if name not in known:
        raise BadInput(where, name, "is unknown", suggest(name, known, "no such thing"))
    return known[name]


def test_nested_nodes_are_checked_first_and_built_later():
    raw = {"objective": {"uses": "objective", "with": {"weight": 2, "inner": {"uses": "objective"}}}}
    checked = check_arguments(trainer, raw, "r.yaml:", given=["model"], resolve=resolve)
    node = checked["objective"]
    assert isinstance(node, Node) and isinstance(node.arguments["inner"], Node)
    model, objective, seed = Node(trainer, checked, "r.yaml:").build(model="M")
    assert (model, seed, objective.weight, objective.inner.weight) == ("M", 0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("raw", "where", "says"),
    [
        ({"objective": {"uses": "objectiv"}}, "objective.uses", "did you mean 'objective'?"),
        ({"objective": {"uses": "objective", "wiht": {}}}, "objective.wiht", "give only `uses` and `with`"),
        ({"objective": {"uses": "objective", "with": {"inner": {"uses": "objective", "with": {"wait": 1}}}}},
         "objective.with.inner.with.wait", "did you mean 'weight'?"),
        ({"objective": {"uses": "limits"}}, "objective.uses", "is a Limits"),
        ({"objective": 3}, "objective", "{uses: <Objective>}"),
        ({"objective": {"uses": "objective"}, "hook": 3}, "hook", "not"),
        ({"objective": {"uses": "objective"}, "model": "m"}, "model", "is not a known field"),
    ],
)  # fmt: skip
def test_nested_refusals(raw, where, says):
    with pytest.raises(BadInput) as caught:
        check_arguments(trainer, raw, "", given=["model"], resolve=resolve)
    assert caught.value.argument == where and says in str(caught.value)


def test_a_type_only_checkers_see_is_refused_not_guessed():
    with pytest.raises(BadInput, match="no recipe can hold"):
        check_arguments(trainer, {"model": 3, "objective": {"uses": "objective"}}, resolve=resolve)


def test_schema_matches_the_signature():
    schema = json_schema(Job)
    assert schema["required"] == ["model"] and schema["additionalProperties"] is False
    properties = schema["properties"]
    assert properties["steps"] == {"type": "integer", "default": 10}
    assert properties["mode"] == {"enum": ["own", "combine"], "default": "own"}
    assert properties["layers"]["anyOf"] == [
        {"type": "array", "items": {"type": "integer"}},
        {"type": "null"},
    ]
    assert properties["pair"]["prefixItems"] == [{"type": "string"}, {"type": "integer"}]
    assert properties["extra"]["additionalProperties"] == {"type": "number"}
    limits = properties["limits"]["properties"]
    assert limits["latency_ms"]["description"] == "Largest mean time per answer, milliseconds."
    assert limits["reversible"]["description"] == "Only methods that can be undone."
    assert "model" not in json_schema(trainer, given=["model"])["properties"]
    assert json_schema(trainer, given=["model"])["properties"]["objective"]["required"] == ["uses"]
