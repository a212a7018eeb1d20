"""Ragged rows on disk: what comes back, and what an interruption leaves."""

from __future__ import annotations

import json

import pytest
import torch

from transfuse.core.errors import BadInput, CorruptFile
from transfuse.core.rowstore import RowStore

COUNTS = [3, 0, 2, 5, 1, 0, 4]
FACTS = {"rows": len(COUNTS), "shard_rows": 3, "of": "numbers"}


def shard(first, last):
    """Entry j of row i is 10 i + j; `score` has one entry per row."""
    counts = COUNTS[first:last]
    entries = [[10 * i + j for j in range(n)] for i, n in enumerate(counts, first)]
    starts = torch.tensor([0, *counts]).cumsum(0)
    flat = torch.tensor([x for row in entries for x in row], dtype=torch.int32)
    return {"n": flat, "half": flat.half() / 2, "score": torch.arange(first, last), "starts": starts}


def opened(folder):
    return RowStore(folder, kind="number store", stem="part")


def test_rows_come_back(tmp_path):
    told = []
    RowStore.fill(tmp_path, FACTS, shard, stem="part", on_shard=lambda done, of: told.append((done, of)))
    store = opened(tmp_path)
    for i, count in enumerate(COUNTS):
        n, half = store.row(i, "n", "half")
        assert n.tolist() == [10 * i + j for j in range(count)]
        assert half.tolist() == [(10 * i + j) / 2 for j in range(count)]
    assert store.whole("score").tolist() == list(range(7))
    assert (store.rows, store.entries, store.facts) == (7, sum(COUNTS), FACTS)
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert store.nbytes == sum(path.stat().st_size for path in tmp_path.glob("part-*.safetensors"))


def test_an_interrupted_fill_goes_on(tmp_path):
    made = []

    def failing(first, last):
        if first == 3:
            raise KeyboardInterrupt
        made.append(first)
        return shard(first, last)

    with pytest.raises(KeyboardInterrupt):
        RowStore.fill(tmp_path, FACTS, failing, stem="part")
    with pytest.raises(CorruptFile, match=r"lacks part-00001.safetensors; run the capture again: it goes on"):
        opened(tmp_path)
    RowStore.fill(tmp_path, FACTS, lambda a, b: made.append(a) or shard(a, b), stem="part")
    assert made == [0, 3, 6]
    assert opened(tmp_path).row(6, "n")[0].tolist() == [60, 61, 62, 63]


def test_what_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no number store"):
        opened(tmp_path / "nothing")
    RowStore.fill(tmp_path / "s", FACTS, shard, stem="part")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir())
    with pytest.raises(BadInput, match="other data"):
        RowStore.fill(tmp_path / "s", {**FACTS, "of": "letters"}, shard, stem="part")
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir())
    for index in (-1, 7):
        with pytest.raises(BadInput, match="use 0 to 6"):
            opened(tmp_path / "s").row(index, "n")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="not a folder"):
        RowStore.fill(tmp_path / "file", FACTS, shard, stem="part")
    (tmp_path / "s" / "index.json").write_text(json.dumps(FACTS)[:-1])
    for attempt in (opened, lambda folder: RowStore.fill(folder, FACTS, shard, stem="part")):
        with pytest.raises(CorruptFile, match=r"unreadable index\.json; remove the folder and capture again"):
            attempt(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text("[]")
    for attempt in (opened, lambda folder: RowStore.fill(folder, FACTS, shard, stem="part")):
        with pytest.raises(CorruptFile, match=r"unreadable index\.json"):
            attempt(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text('{"documents": "of another kind of store"}')
    with pytest.raises(BadInput, match="holds no number store; capture one elsewhere"):
        opened(tmp_path / "s")


def test_a_damaged_shard_is_named_and_made_again(tmp_path):
    RowStore.fill(tmp_path, FACTS, shard, stem="part")
    path = tmp_path / "part-00001.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(
        CorruptFile, match=r"not readable .*; remove part-00001.safetensors and run the capture"
    ):
        opened(tmp_path)
    path.unlink()
    RowStore.fill(tmp_path, FACTS, shard, stem="part")
    assert opened(tmp_path).entries == sum(COUNTS)


def test_facts_are_compared_as_json_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = []
    for _ in range(2):
        facts = {**FACTS, "layers": (1, 2)}
        RowStore.fill("~/s", facts, lambda a, b: made.append(a) or shard(a, b), stem="part")
    assert made == [0, 3, 6] and opened("~/s").facts["layers"] == [1, 2]
