"""Reading YAML strictly: safe, no key twice, numbers as one writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import BadInput, CorruptFile

__all__ = ["load"]

_EXPONENT = re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error, and `1e-4` is a number as in YAML 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, (str, int, float)):
                if key in seen:
                    problem = f"was given in line {seen[key]} already"
                    raise BadInput(f"line {line}: {key}", key, problem, "keep one of the two")
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Read a recipe file; a mapping is returned as a plain dict.

    Raises:
        BadInput: there is no such file, or it does not hold a mapping, or holds a key twice.
        CorruptFile: it is not YAML.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise BadInput("recipe", str(path), "does not exist", "give the path of a YAML file")
    try:
        found = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except BadInput as error:
        raise BadInput(f"{path.name}: {error.argument}", error.value, error.problem, error.remedy) from None
    except (yaml.YAMLError, ValueError) as error:
        raise CorruptFile("recipe", str(path), f"is not YAML ({_brief(error)})", "mend the file") from error
    if not isinstance(found, Mapping):
        raise BadInput("recipe", str(path), "does not hold a mapping", "write `name: value` lines")
    return dict(found)


def _brief(error: Exception) -> str:
    mark, text = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return " ".join((f"line {mark.line + 1}: {text}" if mark else text).split())
