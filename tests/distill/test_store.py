"""The offline teacher: what it keeps, against the teacher itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_tiny
from distilling import arguments, rows

from transfuse.core.errors import BadInput, CorruptFile, NotApplicable
from transfuse.distill import Distiller, LogitStore, Policy, Signal
from transfuse.distill.survey_kd_llm import get

TEACHER = {"seed": 1, "layers": 2}


def data():
    found = rows(10)
    found[3]["labels"] = [-100] * 10  # a row with nothing to predict
    found[4] = {name: values[:5] for name, values in found[4].items()}
    return found


@pytest.fixture
def store(tmp_path):
    return LogitStore.capture(
        make_tiny("llama", **TEACHER), data(), tmp_path / "s", k=16, batch_size=3, shard_rows=4
    )


def test_it_holds_the_largest(store):
    teacher = make_tiny("llama", **TEACHER)
    for i, row in enumerate(data()):
        with torch.no_grad():
            log_p = torch.log_softmax(teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0], -1)
        predicted = [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]
        ids, values = store.row(i)
        assert ids.shape == (len(predicted), 16) and ids.dtype == torch.int64
        for n, t in enumerate(predicted):
            best = log_p[t].sort(descending=True).values[:16]
            assert torch.allclose(values[n], best, atol=2e-2)  # float16
            assert torch.allclose(log_p[t][ids[n]], best, atol=1e-4)
    assert store.tokens == sum(sum(label != -100 for label in r["labels"][1:]) for r in data())
    assert len(list(store.folder.glob("top-*.safetensors"))) == 3
    assert json.loads((store.folder / "index.json").read_text())["k"] == 16


def test_with_all_but_one_token_it_is_the_teacher(tmp_path):
    """k = V - 1 and the bucket: every divergence is the dense one, to float16's rounding."""
    student, teacher = make_tiny("llama", seed=2, layers=1), make_tiny("llama", **TEACHER)
    whole = LogitStore.capture(teacher, data(), tmp_path / "whole", k=399)
    for name in ("forward-kl", "reverse-kl", "jsd", "skew-kl", "total-variation"):
        values = []
        for source in (whole, teacher):
            made = Distiller(student=student, teacher=source, objective=get(name, ce_weight=0.3),
                             train_dataset=data(), args=arguments(tmp_path))  # fmt: skip
            batch = made.data_collator([made.train_dataset[i] for i in range(10)])
            values.append(float(made.model(batch)["loss"].detach()))
        assert values[0] == pytest.approx(values[1], rel=5e-3), name


def test_bucket_and_zero_by_hand():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    stored = (torch.tensor([[[0, 1]] * 2]), p[:2].log().expand(1, 2, 2))
    batch = {"labels": torch.tensor([[3, 1]])}
    signals = Signal(logits=q.log().expand(1, 2, 4)), Signal(sparse=stored)
    bucket = 0.5 * torch.log(torch.tensor(0.5 / 0.1)) + 0.3 * torch.log(torch.tensor(0.3 / 0.2))
    bucket = bucket + 0.2 * torch.log(torch.tensor(0.2 / 0.7))
    assert float(get("forward-kl")(*signals, batch)["loss"]) == pytest.approx(float(bucket), rel=1e-6)
    zero = 0.625 * torch.log(torch.tensor(0.625 / (1 / 3))) + 0.375 * torch.log(torch.tensor(0.375 / (2 / 3)))
    assert float(get("forward-kl", rest="zero")(*signals, batch)["loss"]) == pytest.approx(
        float(zero), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_by_hand(dtype):
    """The student is tempered over its whole vocabulary, then its others are summed; of the teacher k are known."""
    p, q, heat = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], 2.0
    stored = (torch.tensor([[[0, 1]] * 2]), torch.tensor(p[:2], dtype=dtype).log().expand(1, 2, 2))
    signals = Signal(logits=torch.tensor(q, dtype=dtype).log().expand(1, 2, 4)), Signal(sparse=stored)
    batch = {"labels": torch.tensor([[3, 1]])}
    roots = [x ** (1 / heat) for x in q]
    ours = [roots[0] / sum(roots), roots[1] / sum(roots), (roots[2] + roots[3]) / sum(roots)]
    theirs = [x ** (1 / heat) for x in (0.5, 0.3, 0.2)]
    theirs = [x / sum(theirs) for x in theirs]
    parts = {"forward-kl": (theirs, ours), "reverse-kl": (ours, theirs)}
    for name, (a, b) in parts.items():
        expected = heat**2 * sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
        found = get(name, temperature=heat)(*signals, batch)["loss"]
        assert float(found) == pytest.approx(expected, rel=1e-5), name
    ours, theirs = ([x / sum(pair) for x in pair] for pair in (roots[:2], theirs[:2]))
    expected = heat**2 * sum(x * math.log(x / y) for x, y in zip(theirs, ours, strict=True))
    found = get("forward-kl", temperature=heat, rest="zero")(*signals, batch)["loss"]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_target_that_is_not_stored_is_the_rest():
    """DKD with the bucket; without it such a target has no class."""
    p, q = [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]
    stored = (torch.tensor([[[0, 1]] * 2]), torch.tensor(p[:2], dtype=torch.float64).log().expand(1, 2, 2))
    student = Signal(logits=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().expand(1, 2, 4))
    found = get("dkd")(student, Signal(sparse=stored), {"labels": torch.tensor([[0, 3]])})["loss"]
    pairs = [(p[2], q[2]), (1 - p[2], 1 - q[2]), *((p[i] / 0.8, q[i] / 0.3) for i in (0, 1))]
    assert float(found) == pytest.approx(sum(x * math.log(x / y) for x, y in pairs))
    with pytest.raises(BadInput, match="rest"):
        get("dkd", rest="zero")


def test_an_interrupted_capture_goes_on(tmp_path):
    teacher = make_tiny("llama", **TEACHER)
    seen = []

    def stop(done, total):
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LogitStore.capture(teacher, data(), tmp_path / "s", k=16, shard_rows=4, on_shard=stop)
    with pytest.raises(CorruptFile, match="top-00001"):
        LogitStore(tmp_path / "s")
    first = tmp_path / "s" / "top-00000.safetensors"
    before = first.stat().st_mtime_ns
    whole = LogitStore.capture(teacher, data(), tmp_path / "s", k=16, shard_rows=4)
    assert first.stat().st_mtime_ns == before and whole.rows == 10


def test_training_from_it(tmp_path, store):
    student = make_tiny("llama", seed=2, layers=1)
    made = Distiller(student=student, teacher=store, objective="forward-kl", train_dataset=data(),
                     args=arguments(tmp_path, max_steps=25))  # fmt: skip
    made.train()
    assert sum(made.losses[-5:]) < sum(made.losses[:5])


def test_bytes_per_token(tmp_path):
    long = rows(40, length=120)
    found = LogitStore.capture(make_tiny("llama", **TEACHER), long, tmp_path / "s", k=64)
    assert 256 <= found.bytes_per_token < 262


def test_a_store_of_other_rows_is_told(tmp_path, store):
    def made(rows, source=store, **options):
        return Distiller(student=make_tiny("llama", seed=2, layers=1), teacher=source, objective="forward-kl",
                         train_dataset=rows, args=arguments(tmp_path), **options)  # fmt: skip

    other = rows(10, seed=7)
    for wrong in (data()[::-1], [*data()[:9], other[9]]):
        with pytest.raises(BadInput, match="other rows, or of another order"):
            made(wrong)
    from datasets import Dataset

    columns = {name: [row[name] for row in data()] for name in ("input_ids", "labels")}
    made(Dataset.from_dict(columns))
    made(Dataset.from_dict(columns).add_column("note", ["x"] * 10))  # another fingerprint, the same rows
    index = tmp_path / "s" / "index.json"
    older = {key: value for key, value in json.loads(index.read_text()).items() if key != "ids"}
    index.write_text(json.dumps(older))
    made(data()[::-1], LogitStore(tmp_path / "s"))
    LogitStore.capture(make_tiny("llama", **TEACHER), data(), tmp_path / "s", k=16, shard_rows=4)
    with pytest.raises(NotApplicable, match="policy"):
        made(data(), policy=Policy())


def test_what_is_refused(tmp_path, store):
    teacher = make_tiny("llama", **TEACHER)
    for k in (0, 400, 1000):
        with pytest.raises(BadInput, match="V - 1 = 399"):
            LogitStore.capture(teacher, data(), tmp_path / "x", k=k)
    assert not (tmp_path / "x").exists()
    with pytest.raises(BadInput, match="other data"):
        LogitStore.capture(teacher, rows(10, seed=3), tmp_path / "s", k=16, shard_rows=4)
    with pytest.raises(BadInput, match="no logit store"):
        LogitStore(tmp_path / "nothing")
    with pytest.raises(BadInput, match="rows are stored"):
        Distiller(student=make_tiny("llama", seed=2, layers=1), teacher=store, objective="jsd",
                  train_dataset=data()[:5], args=arguments(tmp_path))  # fmt: skip
    with pytest.raises(BadInput, match="not in the store"):
        store.row(10)
    batch = {"labels": torch.full((1, 6), 5), "row": torch.tensor([0])}
    with pytest.raises(BadInput, match="predicts 5 tokens, 8 are stored"):
        store.signal(batch)
    (tmp_path / "s" / "index.json").write_text("{")
    with pytest.raises(CorruptFile, match="unreadable"):
        LogitStore(tmp_path / "s")
