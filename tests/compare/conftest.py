"""A tiny model folder and tiny knowledge, so that whole comparisons run in seconds."""

from __future__ import annotations

import json

import pytest
import yaml
from comparison import FACTS


@pytest.fixture
def tiny_folder(tiny_lm, tiny_tokenizer, tmp_path_factory):
    """A tiny llama saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_lm("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """Write a recipe with its facts and return a function: recipe(**changes) -> path of the YAML file."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))

    def write(**changes):
        fields = {
            "model": str(tiny_folder),
            "knowledge": {"facts": "facts.jsonl", "train_paraphrases": 1},
            "carriers": ["none", "gold-context", "bm25-context"],
            "output": str(tmp_path / "out"),
        }
        fields.update(changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write
