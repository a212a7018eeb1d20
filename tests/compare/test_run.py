"""Whole comparisons on a tiny model: records, resuming, failures, kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparison import FACTS

from transfuse.compare import compare
from transfuse.compare.workers import run_tasks
from transfuse.core.files import read_tensors

KILLS = int(os.environ.get("TRANSFUSE_KILLS", "2"))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_a_comparison_from_start_to_report(recipe, tmp_path):
    adapter = {"uses": "lora", "with": {"epochs": 1, "rehearsal": 0.0, "batch_size": 2}}
    broken = {"uses": "lora", "name": "broken", "with": {"target_modules": ["nothing"]}}
    path = recipe(carriers=["bm25-context", adapter, broken, "ft-m"])
    records = {r["carrier"]: r for r in compare(path, quiet=True)}
    out = tmp_path / "out"
    assert list(records) == ["none", "gold-context", "bm25-context", "lora", "broken", "ft-m"]
    assert [r["carrier"] for r in lines(out)] == list(records)
    assert records["broken"]["status"] == "failed" and "nothing" in records["broken"]["reason"]
    done = {name: r for name, r in records.items() if r["status"] == "done"}
    assert set(done) == set(records) - {"broken"}
    base = done["none"]
    assert base["locality"]["all"]["mean"] == 1.0 and base["perplexity_ratio"] == 1.0
    assert done["gold-context"]["locality"]["all"]["mean"] == 1.0  # neighbours are asked without context
    assert done["gold-context"]["tokens_read"] > base["tokens_read"]
    for name, r in done.items():
        folder = out / r["folder"]
        assert (folder / "transfuse.json").is_file() and (folder / "README.md").is_file(), name
        assert r["recall"]["paraphrase"]["n"] == 2 and r["locality"]["neighbours"]["n"] == 3
        assert r["dtype"] == "float32"
        assert r["latency_seconds"]["mean"] > 0 and r["install_peak_bytes"] > 1e7
    assert list((out / "carriers" / "lora" / "adapter").glob("*.safetensors"))
    assert list((out / "carriers" / "ft-m" / "edit").glob("*.safetensors"))
    assert base["stored_bytes"] == 0 and done["lora"]["stored_bytes"] > 0
    page = (out / "report.html").read_text()
    assert "broken" in page and "failed" in page

    before = (out / "carriers" / "lora" / "record.json").stat().st_mtime_ns
    started = time.perf_counter()
    again = {r["carrier"]: r for r in compare(recipe(carriers=["bm25-context", adapter, "ft-m"]), quiet=True)}
    assert (out / "carriers" / "lora" / "record.json").stat().st_mtime_ns == before
    assert again["lora"]["recall"] == records["lora"]["recall"]
    assert time.perf_counter() - started < 15
    assert not list(out.rglob("*.tmp"))


def test_other_arguments_are_another_run(recipe, tmp_path):
    compare(recipe(carriers=["bm25-context"]), quiet=True)
    record = tmp_path / "out" / "carriers" / "bm25-context" / "record.json"
    before = record.stat().st_mtime_ns
    compare(recipe(carriers=[{"uses": "bm25-context", "with": {"k": 2}}]), quiet=True)
    assert record.stat().st_mtime_ns > before


COMMAND = [
    sys.executable,
    "-c",
    "import sys; from transfuse.cli import main; raise SystemExit(main(sys.argv[1:]))",
]


def start(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "compare", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_at_random_moments(recipe, tmp_path):
    adapter = {"uses": "lora", "with": {"epochs": 4, "rehearsal": 1.0, "batch_size": 2}}
    path = recipe(carriers=["bm25-context", adapter, "grace"])
    rng = random.Random(7)
    for _ in range(KILLS):
        process = start(path)
        time.sleep(rng.uniform(1.0, 14.0))
        process.kill()
        process.communicate()
        for file in (tmp_path / "out").rglob("*.safetensors"):
            if ".tmp" not in str(file):
                read_tensors(file)
        if (tmp_path / "out" / "records.jsonl").exists():
            lines(tmp_path / "out")
    process = start(path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert {r["carrier"]: r["status"] for r in lines(tmp_path / "out")} == dict.fromkeys(
        ["none", "gold-context", "bm25-context", "lora", "grace"], "done"
    )
    assert "report:" in out


def test_interrupt_keeps_what_is_done(recipe, tmp_path):
    path = recipe(carriers=["bm25-context", "lora"])
    process = start(path)
    seen = set()
    for line in process.stdout:
        seen.add(line.split(" ")[0])
        if {"none", "gold-context"} <= seen:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [r["carrier"] for r in lines(tmp_path / "out")][:2] == ["none", "gold-context"]
    assert not list((tmp_path / "out" / "carriers").glob(".*"))  # nothing half-written


def test_what_is_measured_stays_while_the_base_answers_are_there(recipe, tmp_path):
    path = recipe(carriers=["bm25-context"])
    records = compare(path, quiet=True)
    shutil.rmtree(tmp_path / "out" / "carriers" / "none")  # as if interrupted after the others had ended
    kept = (tmp_path / "out" / "carriers" / "bm25-context" / "record.json").stat().st_mtime_ns
    again = compare(path, quiet=True)
    assert [r["carrier"] for r in again] == [r["carrier"] for r in records]
    assert (tmp_path / "out" / "carriers" / "bm25-context" / "record.json").stat().st_mtime_ns == kept
    (answers,) = (tmp_path / "out" / "work").glob("base-*.json")
    answers.unlink()
    compare(path, quiet=True)
    assert (tmp_path / "out" / "carriers" / "bm25-context" / "record.json").stat().st_mtime_ns > kept


def begun(path, monkeypatch) -> list[str]:
    """The carriers that a comparison would run now."""
    found: list[str] = []

    class Enough(Exception):
        pass

    def note(tasks, *rest, **options):
        found.extend(task.label for task in tasks)
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr("transfuse.compare.run.run_tasks", note)
        with pytest.raises(Enough):
            compare(path, quiet=True)
    return sorted(found)


def test_whatever_decides_the_figures_makes_another_run(recipe, tiny_folder, tiny_lm, tmp_path, monkeypatch):
    small = tmp_path / "small"
    shutil.copytree(tiny_folder, small)
    carriers = [{"uses": "proxy-tuning", "with": {"small": "small", "epochs": 1, "rehearsal": 0.0}},
                {"uses": "none", "name": "base"}]  # fmt: skip
    shutil.copytree(tiny_folder, tmp_path / "model")
    path = recipe(model="model", carriers=carriers)  # both beside the recipe
    (tmp_path / "out" / "carriers" / ".lora.x.tmp").mkdir(parents=True)  # of a carrier that was killed
    records = compare(path, quiet=True)
    names = ["base", "gold-context", "proxy-tuning"]
    assert [r["carrier"] for r in records] == names and {r["status"] for r in records} == {"done"}
    assert not list((tmp_path / "out" / "carriers").glob(".*"))
    assert begun(path, monkeypatch) == []
    for foreign in ("[1]", "\udcff"):  # no record of ours
        file = tmp_path / "out" / "carriers" / "gold-context" / "record.json"
        kept = file.read_bytes()
        file.write_bytes(foreign.encode("utf-8", "surrogateescape"))
        assert begun(path, monkeypatch) == ["gold-context"]
        file.write_bytes(kept)
    tiny_lm("llama", seed=3).save_pretrained(small)
    assert begun(path, monkeypatch) == ["proxy-tuning"]
    shutil.rmtree(small)
    shutil.copytree(tiny_folder, small)
    assert begun(recipe(model="model", carriers=carriers, jobs=1), monkeypatch) == names
    assert begun(recipe(model="model", carriers=carriers), monkeypatch) == []
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert begun(path, monkeypatch) == names


def test_inputs_that_change_meanwhile_are_not_mixed(recipe, tmp_path, monkeypatch):
    from transfuse.core.errors import Unavailable

    path = recipe()

    def change(tasks, request, *rest, **options):
        (tmp_path / "facts.jsonl").write_text(json.dumps(FACTS[0]) + "\n")
        return run_tasks(tasks, request, *rest, **options)

    monkeypatch.setattr("transfuse.compare.run.run_tasks", change)
    with pytest.raises(Unavailable, match="changed while the comparison ran"):
        compare(path, quiet=True)
    assert not (tmp_path / "out" / "carriers" / "none").exists()


def test_model_cards_load_what_was_stored(recipe, tmp_path, monkeypatch):
    """The lines in each card, run in its folder, give the answers that were recorded."""
    from transfuse.core.generate import generate_texts

    brief = {"epochs": 2, "rehearsal": 0.0, "batch_size": 2}
    carriers = [{"uses": name, "with": brief} for name in ("lora", "kasa")]
    carriers += [{"uses": "parametric-rag", "with": {"epochs": 2}}, "ft-m"]
    for record in compare(recipe(carriers=carriers), quiet=True)[2:]:
        folder = tmp_path / "out" / record["folder"]
        monkeypatch.chdir(folder)
        sample = record["samples"][0]
        names = {"question": sample["prompt"]}
        exec((folder / "README.md").read_text().split("```")[1].removeprefix("python"), names)
        text = generate_texts(names["model"], names["tokenizer"], [sample["prompt"]], max_new_tokens=20)[0]
        answer = text.strip().partition("\n")[0]
        assert answer.startswith(sample["after"]) or sample["after"].startswith(answer), record["carrier"]
        assert answer


def test_two_comparisons_in_one_folder_are_refused(recipe, tmp_path):
    import fcntl

    from transfuse.core.errors import BadInput

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="in use"):
            compare(recipe(), quiet=True)
