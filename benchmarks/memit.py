"""Seconds per fact of a MEMIT edit with its statistics cached, split into value search, key collection and solve.

The split is taken inside of one edit of all facts, repeated on the same untouched model; what is left over
(preparing rows, applying and removing the updates) is `rest`. Prints medians; `--json FILE` writes them too.

    python benchmarks/memit.py [--model smollm2-135m] [--facts 10] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transfuse.bench.knowedit import read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.lineage import hardware, versions
from transfuse.core.models import load
from transfuse.edit import memit

PARTS = {
    "value search": (memit, "search"),
    "key collection": (memit._Walk, "step"),
    "solve": (memit, "memit_update"),
}


@contextlib.contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds spent in each part."""

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    originals = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, clocked(part, originals[part]))
    try:
        yield
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    facts = read_records(dataset_path("counterfact/edit.json"))[: options.facts]
    editor = memit.MEMIT()
    editor.fit(model, tokenizer, facts[:1])  # statistics and prefixes, and what first calls allocate
    rounds = []
    for _ in range(options.repeats):
        spent = dict.fromkeys(PARTS, 0.0)
        start = time.perf_counter()
        with timed(spent):
            editor.fit(model, tokenizer, facts)
        whole = time.perf_counter() - start
        rounds.append({**spent, "rest": whole - sum(spent.values()), "all": whole})
    medians = {part: statistics.median(r[part] for r in rounds) / len(facts) for part in rounds[0]}
    print(
        f"MEMIT, {options.model} ({model.dtype}), {len(facts)} facts at once; median of {len(rounds)}, per fact"
    )
    for part, seconds in medians.items():
        print(f"{part:<16} {seconds:>8.3f} s {seconds / medians['all']:>7.1%}")
    if options.json:
        record = {
            "model": options.model, "dtype": str(model.dtype), "facts": len(facts), "versions": versions(),
            "hardware": hardware(), "seconds_per_fact": medians, "rounds": rounds,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
