"""core.batches: ids and labels, padding, the loss on targets against slow float64 loops, a repeatable order."""

from __future__ import annotations

import copy
import random

import datasets
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfuse.core.batches import (
    IGNORED,
    EpochOrder,
    data_identity,
    encode_examples,
    minibatches,
    pad_collator,
    target_logits,
    target_loss,
    text_rows,
    text_split,
)
from transfuse.core.errors import BadInput

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma3"]
PAIRS = [
    ("The mayor of Port Ellery, who was born in Quenby, is", "Ines Varro"),
    ("The capital of France is", "Paris"),
    ("Who built the bridge over the river Ostrin? An answer:", "Oskar Tveld did, in 1687."),
    ("Spain", "Madrid"),
]


def rows(sizes, *, seed=0):
    """Random rows of (prompt, target) sizes."""
    draw = random.Random(seed)
    ids = [
        ([draw.randrange(3, 400) for _ in range(a)], [draw.randrange(3, 400) for _ in range(b)])
        for a, b in sizes
    ]
    return [{"input_ids": a + b, "labels": [IGNORED] * len(a) + b} for a, b in ids]


def slow_loss(model, examples):
    """The mean over labelled tokens, row by row without padding, in float64; and each row's log-probabilities."""
    exact, losses, table = copy.deepcopy(model).double(), [], []
    for example in examples:
        with torch.no_grad():
            scores = exact(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
        table.append(scores)
        losses += [
            -scores[t - 1, label].item()
            for t, label in enumerate(example["labels"])
            if t > 0 and label != IGNORED
        ]
    return sum(losses) / len(losses), table


# --- encode_examples ---------------------------------------------------------------------------------------


def test_examples_by_hand(tiny_tokenizer):
    prompt, target = "The capital of France is", "Paris"
    pieces = tiny_tokenizer.tokenize(f"{prompt} {target}")
    cut = next(i for i in range(len(pieces)) if "".join(pieces[:i]) == prompt.replace(" ", "Ġ"))
    assert "".join(pieces[cut:]) == "ĠParis"
    before, after = map(tiny_tokenizer.convert_tokens_to_ids, (pieces[:cut], pieces[cut:]))
    skipped = [IGNORED] * len(before)
    for text in (prompt, prompt + " ", prompt + "   "):
        for answer in (target, " Paris", "Paris\n"):
            assert encode_examples(tiny_tokenizer, [(text, answer)]) == [
                {"input_ids": before + after, "labels": skipped + after}
            ]
    eos = tiny_tokenizer.eos_token_id
    assert encode_examples(tiny_tokenizer, [(prompt, target)], loss_on="all", end=True) == [
        {"input_ids": [*before, *after, eos], "labels": [*before, *after, eos]}
    ]
    assert encode_examples(
        tiny_tokenizer, [(prompt, target)], end=True, truncate=True, max_length=len(after) + 2
    ) == [{"input_ids": [before[-1], *after, eos], "labels": [IGNORED, *after, eos]}]
    (plain,) = encode_examples(tiny_tokenizer, [("", target)])
    assert plain["input_ids"] == plain["labels"] == tiny_tokenizer("Paris")["input_ids"]
    (line,) = encode_examples(tiny_tokenizer, [("Q?\n", target)])  # no space after a line break
    assert tiny_tokenizer.decode(line["input_ids"]) == "Q?\nParis"
    assert encode_examples(tiny_tokenizer, []) == []


def test_ids_and_labels_are_separate_lists(tiny_tokenizer):
    (one,) = encode_examples(tiny_tokenizer, PAIRS[:1], loss_on="all")
    one["labels"][0] = IGNORED
    assert one["input_ids"][0] != IGNORED


@pytest.mark.parametrize("loss_on", ["target", "all"])
def test_truncation_cuts_the_beginning_and_never_the_target(tiny_tokenizer, loss_on):
    (full,) = encode_examples(tiny_tokenizer, PAIRS[:1], loss_on=loss_on)
    (masked,) = encode_examples(tiny_tokenizer, PAIRS[:1])
    size, target = len(full["input_ids"]), sum(label != IGNORED for label in masked["labels"])
    for limit in range(1, size + 3):
        options = {"loss_on": loss_on, "max_length": limit, "truncate": True}
        if limit < target:
            with pytest.raises(
                BadInput, match=rf"^pairs\[0\] = '{size} tokens' exceeds max_length = {limit};"
            ):
                encode_examples(tiny_tokenizer, PAIRS[:1], **options)
        else:
            (cut,) = encode_examples(tiny_tokenizer, PAIRS[:1], **options)
            assert cut == {key: value[-limit:] for key, value in full.items()}


def test_refused_examples(tiny_tokenizer):
    for target in ("", " ", "\n\t"):
        with pytest.raises(BadInput, match=r"^target = '' is empty; give the text that should follow"):
            encode_examples(tiny_tokenizer, [("The mayor is", target)])
    with pytest.raises(BadInput, match=r"^pairs\[1\] = .* exceeds max_length = 3; .* pass truncate=True"):
        encode_examples(tiny_tokenizer, [("", "Paris"), PAIRS[0]], max_length=3)
    with pytest.raises(BadInput, match=r'^loss_on = .* use "target" or "all"'):
        encode_examples(tiny_tokenizer, PAIRS, loss_on="prompt")
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(BadInput, match=r"^end = True needs a tokenizer with an end-of-text token"):
        encode_examples(endless, PAIRS, end=True)
    assert encode_examples(endless, PAIRS) == encode_examples(tiny_tokenizer, PAIRS)


# --- pad_collator ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(3, 399), min_size=1, max_size=9), min_size=1, max_size=6))
def test_collated_rows_can_be_read_back(ids):
    batch = pad_collator(7)([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])
    width = max(map(len, ids))
    for name, fill in (("input_ids", 7), ("attention_mask", 0), ("labels", -100)):
        assert batch[name].dtype == torch.int64 and batch[name].shape == (len(ids), width)
        for row, wanted in zip(batch[name].tolist(), ids, strict=True):
            assert row[len(wanted) :] == [fill] * (width - len(wanted))
            if name == "attention_mask":
                assert row[: len(wanted)] == [1] * len(wanted)
            else:
                assert row[1 : len(wanted)] == wanted[1:]
                assert row[0] == (wanted[0] if name == "input_ids" else -100)


def test_collator_of_classes_and_of_tokenizers(tiny_tokenizer):
    batch = pad_collator(tiny_tokenizer)(
        [{"input_ids": [5], "labels": 2}, {"input_ids": [6, 7], "labels": 0}]
    )
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [2, 0]
    assert batch["input_ids"].tolist() == [[5, 0], [6, 7]]
    unpadded = copy.deepcopy(tiny_tokenizer)
    unpadded.pad_token = None  # filled up with the end-of-text token instead, and masked all the same
    batch = pad_collator(unpadded)([{"input_ids": [5]}, {"input_ids": [6, 7]}])
    assert batch["input_ids"].tolist() == [[5, 2], [6, 7]] and batch["attention_mask"].tolist() == [
        [1, 0],
        [1, 1],
    ]
    assert "labels" not in batch


@pytest.mark.parametrize("made", [torch.tensor, np.array])
def test_collator_of_tensors(made):
    ids = [[5, 6, 7], [8], [9, 10]]
    plain = pad_collator(0)([{"input_ids": row, "labels": row} for row in ids])
    batch = pad_collator(0)([{"input_ids": made(row), "labels": made(row)} for row in ids])
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    one = pad_collator(0)([{"input_ids": made([5]), "labels": made([5])}])
    assert one["labels"].tolist() == [[5]]  # a single token, no class
    classes = [{"input_ids": made([5, 6]), "labels": made(2)}, {"input_ids": made([7]), "labels": made(0)}]
    assert pad_collator(0)(classes)["labels"].tolist() == [2, 0]


# --- target_logits, target_loss ----------------------------------------------------------------------------


SIZES = [(9, 2), (1, 1), (3, 5), (6, 1)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_target_logits_against_single_rows(tiny_lm, architecture):
    model, examples = tiny_lm(architecture), rows(SIZES)
    loss, table = slow_loss(model, examples)
    batch = pad_collator(0)(examples)
    with torch.no_grad():
        logits, labels = target_logits(model, batch)
    assert logits.dtype == torch.float32 and logits.shape == (4, 5, 400) and labels.shape == (4, 5)
    found = logits.double().log_softmax(-1)
    for i, (before, after) in enumerate(SIZES):
        assert labels[i].tolist() == [IGNORED] * (5 - after) + examples[i]["input_ids"][before:]
        wanted = table[i][before - 1 : before + after - 1]
        torch.testing.assert_close(found[i, 5 - after :], wanted, atol=1e-4, rtol=1e-4)
    assert target_loss(model, batch).item() == pytest.approx(loss, abs=1e-5)
    assert model(**batch).loss.item() == pytest.approx(loss, abs=1e-5)


def test_target_loss_whatever_the_padding(tiny_lm):
    model, examples = tiny_lm("llama"), rows(SIZES)
    batch = pad_collator(0)(examples)
    width = batch["input_ids"].shape[1]
    for shift in (lambda free: free, lambda free: free // 2):  # on the left, on both sides
        moved = {name: value.clone() for name, value in batch.items()}
        for row, example in enumerate(examples):
            by = shift(width - len(example["input_ids"]))
            for name in moved:
                moved[name][row] = batch[name][row].roll(by)
        assert target_loss(model, moved).item() == pytest.approx(slow_loss(model, examples)[0], abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loss_on", ["target", "all"])
def test_target_loss_is_the_models_own(tiny_lm, tiny_tokenizer, architecture, loss_on):
    """Also where a row's first token is labelled: nothing predicts it, padding before it least of all."""
    model = tiny_lm(architecture)
    examples = encode_examples(tiny_tokenizer, [*PAIRS, ("", "Oskar Tveld did")], loss_on=loss_on, end=True)
    batch = pad_collator(tiny_tokenizer)(examples)
    own, found = model(**batch).loss, target_loss(model, batch)
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == pytest.approx(own.item(), abs=1e-5)
    assert found.item() == pytest.approx(slow_loss(model, examples)[0], abs=1e-5)


def test_gradients_are_those_of_the_models_own_loss(tiny_lm, tiny_tokenizer):
    batch = pad_collator(tiny_tokenizer)(encode_examples(tiny_tokenizer, PAIRS, loss_on="all"))
    found, own = tiny_lm("llama"), tiny_lm("llama")
    slope = torch.autograd.grad(target_loss(found, batch), list(found.parameters()))
    wanted = torch.autograd.grad(own(**batch).loss, list(own.parameters()))
    for a, b in zip(slope, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert any(float(b.abs().max()) > 0.1 for b in wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_the_split_into_batches_change_nothing(tiny_lm, architecture):
    model, examples = tiny_lm(architecture), rows([(7, 3), (2, 2), (4, 6), (1, 1), (12, 2)], seed=1)
    wanted, _ = slow_loss(model, examples)
    counts = [sum(label != IGNORED for label in row["labels"]) for row in examples]
    with torch.no_grad():
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
            for size in (1, 2, 3, 5):
                total = 0.0
                for start in range(0, 5, size):
                    part = order[start : start + size]
                    batch = pad_collator(0)([examples[i] for i in part])
                    loss = target_loss(model, batch).item()
                    other = pad_collator(9)([examples[i] for i in part])
                    assert target_loss(model, other).item() == pytest.approx(loss, abs=1e-6)
                    wider = {
                        name: torch.nn.functional.pad(x, (0, 4), value=IGNORED if name == "labels" else 0)
                        for name, x in batch.items()
                    }
                    assert target_loss(model, wider).item() == pytest.approx(loss, abs=1e-5)
                    total += loss * sum(counts[i] for i in part)
                assert total / sum(counts) == pytest.approx(wanted, abs=1e-5)


def test_gaps_between_labels(tiny_lm):
    model, examples = tiny_lm("llama"), rows([(0, 8), (0, 5)])
    for row in examples:
        row["labels"] = [x if i in (2, 4) else IGNORED for i, x in enumerate(row["labels"])]
    batch = pad_collator(0)(examples)
    logits, labels = target_logits(model, batch)
    assert logits.shape[1] == labels.shape[1] == 6  # from the earliest label on, counted from the end
    assert (labels != IGNORED).sum().item() == 4
    assert target_loss(model, batch).item() == pytest.approx(slow_loss(model, examples)[0], abs=1e-5)


@pytest.mark.parametrize("sizes", [[(3, 0), (2, 0)], [(0, 1), (0, 1)]])
def test_nothing_to_predict_is_nan_as_the_models_own(tiny_lm, sizes):
    model, batch = tiny_lm("llama"), pad_collator(0)(rows(sizes))
    logits, labels = target_logits(model, batch)
    assert logits.shape == (2, 0, 400) and labels.shape == (2, 0)
    assert torch.isnan(target_loss(model, batch)) and torch.isnan(model(**batch).loss)


def test_half_precision_and_adapters(tiny_lm):
    examples = rows(SIZES)
    batch = pad_collator(0)(examples)
    half = tiny_lm("llama").bfloat16()
    with torch.no_grad():
        logits, _ = target_logits(half, batch)
        assert logits.dtype == torch.float32
        assert target_loss(half, batch).item() == pytest.approx(slow_loss(half, examples)[0], abs=0.1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_lm("llama"), config).eval()
    with torch.no_grad():
        found, plain = target_loss(adapted, batch).item(), target_loss(tiny_lm("llama"), batch).item()
    assert found == pytest.approx(slow_loss(adapted, examples)[0], abs=1e-5)
    assert abs(found - plain) > 1e-3


# --- data_identity -----------------------------------------------------------------------------------------


def test_data_identity():
    data = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    same = [dict(reversed(row.items())) for row in data]
    assert data_identity(data) == data_identity(copy.deepcopy(data)) == data_identity(same)
    others = [
        data[::-1],
        data[:1],
        [data[0], {"input_ids": [7], "labels": [8]}],
        [*data, data[0]],
        [],
        [5, 6],
        [56],
    ]
    assert len({data_identity(other) for other in [data, *others]}) == len(others) + 1
    table = datasets.Dataset.from_list(data)
    assert data_identity(table) == table._fingerprint != data_identity(table.select([0]))


def test_data_identity_sees_every_entry_of_tensors():
    zeros = np.zeros((3, 20, 20), dtype=np.float32)
    dot, fine = zeros.copy(), zeros.copy()
    dot[1, 10, 10], fine[0, 0, 0] = 1, 1e-6
    for wrap in (torch.from_numpy, np.asarray, lambda x: [torch.from_numpy(x)], lambda x: {"a": (x, 1)}):
        every = [data_identity([{"x": wrap(x), "labels": 1}]) for x in (zeros, dot, fine)]
        assert len(set(every)) == 3
        assert data_identity([{"x": wrap(dot.copy()), "labels": 1}]) == every[1]
    kinds = [torch.zeros(2), torch.zeros(2, dtype=torch.float16), torch.zeros(1, 2), np.zeros(2), [0.0, 0.0]]
    assert len({data_identity([{"x": kind}]) for kind in kinds}) == len(kinds)


# --- EpochOrder --------------------------------------------------------------------------------------------


LENGTHS = st.lists(st.integers(1, 30), max_size=150)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5), size=st.integers(1, 8))
def test_every_order_is_a_permutation_and_depends_on_seed_and_epoch_alone(lengths, seed, epoch, size):
    for grouped in (None, lengths):
        order = EpochOrder(len(lengths), seed=seed, lengths=grouped, batch_size=size)
        order.set_epoch(epoch)
        first = list(order)
        assert sorted(first) == list(range(len(lengths))) and len(order) == len(lengths)
        np.random.seed(1), random.seed(1), torch.manual_seed(1)
        again = EpochOrder(len(lengths), seed=seed, lengths=grouped, batch_size=size)
        for other in (epoch + 1, 0, epoch):  # whatever was asked for before
            again.set_epoch(other)
            last = list(again)
        assert last == first == list(order)


def test_the_global_random_state_is_left_alone():
    np.random.seed(3), random.seed(3), torch.manual_seed(3)
    wanted = np.random.rand(), random.random(), torch.rand(()).item()
    np.random.seed(3), random.seed(3), torch.manual_seed(3)
    list(EpochOrder(50, seed=1)), list(EpochOrder(50, seed=1, lengths=[1] * 50, batch_size=4))
    assert (np.random.rand(), random.random(), torch.rand(()).item()) == wanted


@pytest.mark.parametrize("lengths", [None, list(range(200))])
def test_seeds_and_epochs_give_different_orders(lengths):
    orders = []
    for seed in range(4):
        for epoch in range(4):
            order = EpochOrder(200, seed=seed, lengths=lengths, batch_size=8)
            order.set_epoch(epoch)
            orders.append(tuple(order))
    assert len(set(orders)) == 16
    first = [order[0] for order in orders]
    assert len(set(first)) > 8  # not the shortest batch first


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS.filter(bool), seed=st.integers(0, 99), size=st.integers(1, 8))
def test_batches_hold_neighbours_in_length(lengths, seed, size):
    """Within one window every batch is a run of the sorted lengths; only the last batch may be short."""
    order = list(EpochOrder(len(lengths), seed=seed, lengths=lengths, batch_size=size))
    shuffled = np.random.default_rng([seed, 0]).permutation(len(lengths)).tolist()
    wanted = []
    for start in range(0, len(lengths), 50 * size):
        window = sorted(lengths[i] for i in shuffled[start : start + 50 * size])
        wanted += [window[i : i + size] for i in range(0, len(window), size)]
    found = [[lengths[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
    assert sorted(found) == sorted(wanted)
    assert all(len(batch) == size for batch in found[:-1])


def test_grouping_saves_padding():
    draw = random.Random(0)
    lengths = [draw.randrange(1, 200) for _ in range(1000)]

    def padding(order):
        order = list(order)
        batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 1000, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    plain = padding(EpochOrder(1000, seed=0))
    assert padding(EpochOrder(1000, seed=0, lengths=lengths, batch_size=8)) < 0.1 * plain


# --- rows from files ---------------------------------------------------------------------------------------


def test_text_is_cut_into_blocks(tiny_tokenizer, tmp_path):
    text = " ".join(["The capital of France is Paris."] * 8)
    ids = tiny_tokenizer(text)["input_ids"]
    (tmp_path / "a.txt").write_text(text)
    found = text_rows(tiny_tokenizer, tmp_path / "a.txt", 16)
    assert [token for row in found for token in row["input_ids"]] == ids[
        : sum(len(r["input_ids"]) for r in found)
    ]
    assert all(row["labels"] == row["input_ids"] for row in found)
    assert {len(row["input_ids"]) for row in found[:-1]} == {16}
    last = len(ids) % 16
    assert len(found) == len(ids) // 16 + (last >= 2)


def test_records_are_text_or_pairs(tiny_tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"text": "Spain. Madrid. Paris."}\n{"prompt": "The capital of Spain is", "target": "Madrid"}\n'
    )
    pair, text = text_rows(tiny_tokenizer, file, 64)
    assert pair["labels"][0] == IGNORED and pair["labels"][-1] == tiny_tokenizer.eos_token_id
    assert text["input_ids"] == tiny_tokenizer("Spain. Madrid. Paris.")["input_ids"]
    file.write_text('{"question": "x"}\n')
    with pytest.raises(BadInput, match="neither text nor prompt"):
        text_rows(tiny_tokenizer, file, 64)
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(BadInput, match="no row of 64"):
        text_rows(tiny_tokenizer, tmp_path / "b.txt", 64, "held_out")


def test_texts_that_cannot_be_read(tiny_tokenizer, tmp_path):
    with pytest.raises(BadInput, match=r"held_out.*gone\.txt.*cannot be read"):
        text_rows(tiny_tokenizer, tmp_path / "gone.txt", 16, "held_out")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 20)
    with pytest.raises(BadInput, match="UTF-8"):
        text_rows(tiny_tokenizer, tmp_path / "a.txt", 16)
    with pytest.raises(BadInput, match="block"):
        text_rows(tiny_tokenizer, tmp_path / "a.txt", 0)


def test_rows_to_measure_on_are_not_learnt(tiny_tokenizer, tmp_path):
    words = [f"word {i} of a text" for i in range(400)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    (tmp_path / "b.txt").write_text(" ".join(words[::-1]))
    whole = text_rows(tiny_tokenizer, tmp_path / "a.txt", 16)
    assert len(whole) > 40
    rows, kept = text_split(tiny_tokenizer, tmp_path / "a.txt", None, 16, 100)
    assert rows + kept == whole and len(kept) == len(whole) // 20
    rows, kept = text_split(tiny_tokenizer, tmp_path / "a.txt", tmp_path / "b.txt", 16, 3)
    assert rows == whole and kept == text_rows(tiny_tokenizer, tmp_path / "b.txt", 16)[:3]
    (tmp_path / "c.txt").write_text("one row")
    with pytest.raises(BadInput, match="texts = 1 row is too little"):
        text_split(tiny_tokenizer, tmp_path / "c.txt", None, 16, 3)


@pytest.mark.parametrize(
    ("count", "size", "drop_last", "found"),
    [
        (17, 8, False, [8, 9]),  # a row alone is what batch norms cannot read
        (18, 8, False, [8, 8, 2]),
        (17, 8, True, [8, 8]),
        (3, 1, False, [1, 1, 1]),
        (1, 8, False, [1]),
    ],
)
def test_minibatches_hold_every_row_once(count, size, drop_last, found):
    batches = list(minibatches({"x": torch.arange(count)}, size, seed=0, drop_last=drop_last)(0))
    assert [len(batch["x"]) for batch in batches] == found
    rows = torch.cat([batch["x"] for batch in batches]).tolist()
    assert len(set(rows)) == len(rows) == sum(found)
