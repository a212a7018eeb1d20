"""The JSON schema of recipes, for editors: what `transfuse run` and `transfuse compare` accept."""

from __future__ import annotations

import re
import warnings
from typing import Any

from . import catalogue
from .catalogue import Method
from .compare.job import Recipe
from .core.errors import BadInput, NotApplicable
from .core.fields import parameters_of
from .core.schema import json_schema
from .explain import SUPPLIED
from .recipe import Common, required_inputs, supplied, transfer_of

__all__ = ["recipe_schema"]


def recipe_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of run recipes, and of comparisons where `carriers` stands.

    Imports every method; one of another package that cannot be imported is left out with a warning.
    """
    properties: dict[str, Any] = dict(json_schema(Common)["properties"])
    slugs, branches = [], []
    for method in catalogue.methods():
        try:
            branches.append(_branch(method, properties["model"]))
        except NotApplicable:
            continue
        except BadInput as error:
            if method.package == "transfuse":
                raise
            warnings.warn(f"{method.package}: method {method.slug!r} left out: {error}", stacklevel=2)
            continue
        slugs.append(method.slug)
    name = {"type": "string", "examples": slugs}
    node = {
        "type": "object",
        "properties": {"uses": name, "with": {"type": ["object", "null"]}},
        "required": ["uses"],
        "additionalProperties": False,
    }
    run_recipe = {
        "properties": {**properties, "method": {"anyOf": [name, node]}},
        "required": ["method"],
        "allOf": branches,
        "unevaluatedProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "transfuse recipe",
        "type": "object",
        "if": {"required": ["carriers"]},
        "then": json_schema(Recipe),
        "else": run_recipe,
    }


def _branch(method: Method, model: dict[str, Any]) -> dict[str, Any]:
    """What follows where a recipe names this method, in any of its spellings.

    Raises:
        NotApplicable: it has no single run.
    """
    transfer, target = transfer_of(method), catalogue.get(method.slug)
    inputs = json_schema(transfer, given=SUPPLIED)
    arguments = json_schema(target, given=supplied(target))
    if "required" not in arguments:
        arguments["type"] = ["object", "null"]
    slug = "[-_]".join(re.escape(part) for part in method.slug.split("-"))
    name = {"type": "string", "pattern": rf"^((transfuse\.)?{method.family}[./])?{slug}$"}
    node = {"type": "object", "properties": {"uses": name}, "required": ["uses"]}
    then: dict[str, Any] = {
        "properties": {**inputs["properties"], "method": {"properties": {"with": arguments}}},
        "required": [*inputs.get("required", []), *required_inputs(method)],
    }
    if "teacher" in parameters_of(transfer):  # beside a teacher the model may be called student
        then["properties"]["student"] = model
        then["oneOf"] = [{"required": ["model"]}, {"required": ["student"]}]
    else:
        then["required"].append("model")
    return {"if": {"properties": {"method": {"anyOf": [name, node]}}, "required": ["method"]}, "then": then}
