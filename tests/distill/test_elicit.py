"""Elicitation: what is asked, what is kept, on scripted answers; and once with a real model."""

from __future__ import annotations

import itertools
import re

import pytest

from transfuse.core.errors import BadInput
from transfuse.core.llm import Local, Scripted, cached
from transfuse.distill._elicit import curate, expand, feedback, label, preference_rows, rouge_l, self_train
from transfuse.distill._elicit_parts import final_answer, score_in, tasks_in, verdict_in


def lcs(a, b):
    """By the table."""
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


def test_rouge_l_against_the_table():
    import random

    draws = random.Random(0)
    for _ in range(200):
        a, b = ([draws.choice("abcde") for _ in range(draws.randint(1, 12))] for _ in range(2))
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * lcs(a, b) / (len(a) + len(b)))
    assert rouge_l("The cat sat.", "the CAT, sat") == 1.0
    assert rouge_l("", "a") == rouge_l("a", "b") == 0.0


def test_replies_are_read():
    assert final_answer("3 + 4 is 7.\nAnswer: 7") == "7"
    assert final_answer("Answer: 1\nno\n**Answer:** 7.") == "7"
    assert final_answer("so #### 42") == "42"
    assert final_answer("seven") is None
    assert final_answer("Answer: .5") == ".5" and final_answer("Answer: **.5**.") == ".5"
    assert final_answer("Answer: ...") is None
    for text, verdict in {
        "A": "A", " (B). ": "B", '"tie"': "tie", "A tie": "tie", "Answer B": "B", "The better answer is A.": "A",
        "": None, "Both": None, "A or B": None, "Apples": None,
    }.items():  # fmt: skip
        assert verdict_in(text) == verdict, text
    for text, points in {
        "Score: 4": 4.0,
        "score 3.5": 3.5,
        "5": 5.0,
        "4/5": 4.0,
        "**Score:** 4": 4.0,
        "Score: **4**": 4.0,
        "**3**": 3.0,
        "Score = 2": 2.0,
        "Score: 4.": 4.0,
        "score: 0": 0.0,
        "Score: 12": None,
        "Score: 5.7": None,
        "5.7": None,
        "Score: 10": None,
        "Score: 4/5": 4.0,
        "Score: 4/10": None,
        "good": None,
    }.items():
        assert score_in(text) == points, text
    assert tasks_in("1. Name a river.\n2) Say why.\n- Go on\nnothing") == [
        "Name a river.",
        "Say why.",
        "Go on",
    ]


# --- label -------------------------------------------------------------------------------------------------


def test_label_answers():
    teacher = Scripted(["Paris", "Rome"])
    found = label(teacher, ["Capital of France?", {"prompt": "Capital of Italy?"}], instruction="Be short.")
    assert found.column_names == ["prompt", "target", "answer"]
    assert found.to_list()[0] == {"prompt": "Capital of France?", "target": "Paris", "answer": "Paris"}
    assert teacher.requests[0][0]["content"] == "Be short.\n\nCapital of France?"


def test_label_reasoning_rejects_wrong_finals():
    teacher = Scripted(
        ["It is 2 + 2.\nAnswer: 4", "Hm.\nAnswer: 5", "no result", "Twice two.\nAnswer: Four."]
    )
    found = label(
        teacher, [{"prompt": "2 + 2?", "answer": ["4", "four"]}], kind="reasoning", samples=4, temperature=1.0
    )
    assert [row["answer"] for row in found] == ["4", "Four"]
    assert found[0]["target"] == "It is 2 + 2.\nAnswer: 4"
    assert "step by step" in teacher.requests[0][0]["content"]


def test_label_takes_a_verifier_and_drops_what_was_cut_off_or_said_before():
    teacher = Scripted(["yes", "yes", "no", "yes " * 30])
    found = label(
        teacher,
        ["Is it?"],
        samples=4,
        temperature=1.0,
        max_tokens=20,
        verifier=lambda row, text: "yes" in text,
    )
    assert found["target"][:] == ["yes"]
    assert len(label(Scripted(["no"]), [{"prompt": "Is it?", "answer": "yes"}])) == 0


# --- expand ------------------------------------------------------------------------------------------------

SEEDS = ["Name three rivers of Europe.", "Explain why the sky is blue.", "Write a line about rain."]


def test_self_instruct_filters_by_rouge():
    first = "1. Name three rivers of Asia.\n2. List the moons of Mars.\n3. Sorry, I cannot.\n4. Go"
    second = "1. List all moons of Mars.\n2. Describe how bread is baked."
    teacher = Scripted([first, second, "Phobos and Deimos.", "With yeast."])
    found = expand(teacher, SEEDS, count=2)
    assert found.to_list() == [
        {"prompt": "List the moons of Mars.", "target": "Phobos and Deimos.", "parent": ""},
        {"prompt": "Describe how bread is baked.", "target": "With yeast.", "parent": ""},
    ]
    assert "List the moons of Mars." in teacher.requests[1][0]["content"]  # one of its own is shown


def test_evolve_rewrites_what_it_rewrote():
    replies = [
        "Explain why the sky is blue.",
        "Explain the new task at length.",
        "Name a long river and its source.",
    ]
    teacher = Scripted([*replies, "Name a long river, its source and its mouth.", "the Volga", "the Don"])
    found = expand(teacher, SEEDS[1:2], count=2, kind="evolve", seed=3)
    assert found["target"][:] == ["the Volga", "the Don"]
    assert found[0]["parent"] == SEEDS[1]
    assert all(row["parent"] in (SEEDS[1], replies[2]) for row in found)


def test_expansion_ends_though_nothing_is_new():
    teacher = Scripted(lambda text: "1. Name three rivers of Europe.")
    assert len(expand(teacher, SEEDS, count=2, rounds=5)) == 0
    assert len(teacher.requests) == 5


# --- curate ------------------------------------------------------------------------------------------------


def test_curate_fills_a_grid():
    def write(text):
        found = re.match(r"Write one (\w+) question about (\w+)(?:, as (.+) would ask it)?\.", text)
        return f"What {found[1]} thing is {found[2]} to {found[3]}?" if found else "An answer."

    found = curate(
        Scripted(write),
        topics=["chess", "bees"],
        personas=["", "a nurse"],
        difficulties=["easy"],
        threshold=0.95,
    )
    assert found.column_names == ["prompt", "target", "topic", "persona", "difficulty"]
    assert [(r["topic"], r["persona"]) for r in found] == [
        ("chess", ""), ("chess", "a nurse"), ("bees", ""), ("bees", "a nurse"),
    ]  # fmt: skip
    assert found[1]["prompt"] == "What easy thing is chess to a nurse?"
    assert (
        len(curate(Scripted(lambda t: "What is the same thing?"), topics=["a", "b"], difficulties=["easy"]))
        == 1
    )


# --- feedback ----------------------------------------------------------------------------------------------

ROWS = [{"prompt": "2 + 2?", "candidates": ["four", "five"]}]


def test_a_preference_must_hold_in_both_orders():
    def wise(text):
        first, second = re.search(r"Answer A: (\w+)\s+Answer B: (\w+)", text).groups()
        return "A" if first == "four" else "B" if second == "four" else "tie"

    judge = Scripted(wise)
    found = feedback(judge, [{"prompt": "2 + 2?", "candidates": ["five", "four", "six", "four"]}])
    pairs = [(row["chosen"], row["rejected"]) for row in found]
    assert pairs == [("four", "five"), ("four", "six")]
    assert len(judge.requests) == 6  # three pairs of different answers, both ways
    for always in ("A", "B", "tie", "nonsense"):
        assert len(feedback(Scripted(lambda text, always=always: always), ROWS)) == 0


def test_a_student_is_asked_and_corrected():
    student = Scripted(["four", "five"])
    teacher = Scripted(["CORRECT.", "four"])
    found = feedback(teacher, ["2 + 2?"], kind="correct", student=student)
    assert found.to_list() == [{"prompt": "2 + 2?", "target": "four", "student": "five"}]
    assert len(feedback(Scripted(["four"]), [{"prompt": "?", "candidates": ["four"]}], kind="correct")) == 0


# --- self_train --------------------------------------------------------------------------------------------


def test_verified_answers():
    student = Scripted(["So.\nAnswer: 4", "Answer: 5", "four", "So.\nAnswer: 4"])
    found = self_train(student, [{"prompt": "2 + 2?", "answer": ["4", "four"]}])
    assert found.to_list() == [
        {"prompt": "2 + 2?", "target": "So.\nAnswer: 4"}, {"prompt": "2 + 2?", "target": "four"},
    ]  # fmt: skip
    short = self_train(Scripted(["a b", "c"]), ["x"], samples=2, verifier=lambda row, text: len(text) == 1)
    assert short["target"][:] == ["c"]


def test_self_rewarding_pairs():
    student = Scripted(["good", "bad", "odd", "Score: 4", "Score: 1", "no idea"])
    found = self_train(student, ["Say it."], kind="reward", samples=3)
    assert found.to_list() == [
        {"prompt": "Say it.", "chosen": "good", "rejected": "bad", "chosen_score": 4.0, "rejected_score": 1.0}
    ]
    tied = Scripted(["good", "bad", "Score: 3", "Score: 3"])
    assert len(self_train(tied, ["Say it."], kind="reward", samples=2)) == 0


def test_spin_prefers_the_given_answer():
    rows = [{"prompt": "Capital?", "target": "Paris is."}]
    found = self_train(Scripted(["Rome is.", "Paris  is."]), rows, kind="spin", samples=2)
    assert found.to_list() == [{"prompt": "Capital?", "chosen": "Paris is.", "rejected": "Rome is."}]


# --- the rest ----------------------------------------------------------------------------------------------


def test_an_interrupted_call_goes_on(tmp_path):
    """What was answered before is not asked again, and the result is the same."""
    asked = []

    def write(text):
        asked.append(text)
        if len(asked) == 3:
            raise RuntimeError("power cut")
        return (
            "1. List the moons of Mars now.\n2. Say who invented paper money."
            if "more tasks" in text
            else "So."
        )

    teacher = cached(Scripted(write), tmp_path)
    with pytest.raises(RuntimeError):
        expand(teacher, SEEDS, count=4, rounds=3)
    again = expand(teacher, SEEDS, count=4, rounds=3)
    assert len(again) == 2 and again["target"][:] == ["So.", "So."]
    count = len(asked)
    assert expand(teacher, SEEDS, count=4, rounds=3).to_list() == again.to_list()
    assert len(asked) == count


def test_preferences_become_ranked_rows(tiny_tokenizer):
    pairs = feedback(Scripted(["B", "A"]), ROWS)
    [row] = preference_rows(tiny_tokenizer, pairs, end=True)
    assert row["score"] == [1.0, 0.0]
    spoken = [[i for i in labels if i != -100] for labels in row["labels"]]
    assert [tiny_tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in spoken] == [
        "five",
        "four",
    ]
    assert all(ids[-1] == tiny_tokenizer.eos_token_id for ids in spoken)


def test_few_demonstrations_are_enough():
    numbers = itertools.count()

    def write(prompt):
        if "Here are tasks" not in prompt:
            return "an answer"
        shown.append(prompt.split("assistant.")[1].split("Write")[0].count("\n1.") + prompt.count("\n2. "))
        return "\n".join(f"{i}. " + " ".join(f"w{next(numbers)}" for _ in range(5)) for i in range(1, 4))

    for demonstrations in (1, 2):
        shown = []
        found = expand(Scripted(write), ["Name a river in Asia.", "Name a hill."], count=12, own=5,
                       demonstrations=demonstrations, per_request=3)  # fmt: skip
        assert len(found) == 12 and max(shown) == demonstrations


def test_whole_numbers_are_answers_too():
    six = [{"prompt": "6*7", "answer": 42}]
    assert label(Scripted(lambda p: "42"), six)["target"] == ["42"]
    assert self_train(Scripted(lambda p: "42"), six)["target"] == ["42"]
    assert self_train(Scripted(lambda p: "0"), [{"prompt": "6-6", "answer": 0}])["target"] == ["0"]
    assert label(Scripted(lambda p: "42"), [{"prompt": "6*7", "answer": [41, "42"]}])["target"] == ["42"]
    assert label(Scripted(lambda p: "42"), [{"prompt": "6*7", "answer": []}])["target"] == ["42"]
    spin = self_train(Scripted(lambda p: "A"), [{"prompt": "q", "target": 4}], kind="spin")
    assert spin["chosen"] == ["4"]


def test_bad_input():
    silent = Scripted([])
    for call, name in (
        (lambda: label(silent, []), "items"),
        (lambda: label(silent, "one"), "items"),
        (lambda: label(silent, [{"text": "x"}]), r"items\[0\]"),
        (lambda: label(silent, ["x"], kind="essay"), "kind"),
        (lambda: label(silent, ["x"], samples=2), "samples"),
        (lambda: expand(silent, ["x"], count=0), "count"),
        (lambda: expand(silent, [], count=1), "seeds"),
        (lambda: expand(silent, ["x"], count=1, own=-1), "own"),
        (lambda: expand(silent, ["x"], count=1, rounds=-1), "rounds"),
        (lambda: curate(silent, topics=["x"], per_cell=0), "per_cell"),
        (lambda: curate(silent, topics=["x"], per_cell=2, temperature=0), "per_cell"),
        (lambda: curate(silent, topics=["x"], threshold=-1), "threshold"),
        (lambda: curate(silent, topics=["x"], threshold=float("nan")), "threshold"),
        (lambda: label(silent, [{"prompt": "q", "answer": 0.5}]), r"items\[0\]: answer"),
        (lambda: feedback(silent, [{"prompt": "q", "candidates": "abc"}]), r"items\[0\]: candidates"),
        (lambda: self_train(silent, [{"prompt": "q", "target": ["x"]}], kind="spin"), r"items\[0\]: target"),
        (lambda: expand(silent, ["x"], count=1, threshold=0.0), "threshold"),
        (lambda: expand(silent, ["x"], count=1, kind="grow"), "kind"),
        (lambda: curate(silent, topics=[]), "topics"),
        (lambda: curate(silent, topics="chess"), "topics"),
        (lambda: feedback(silent, ["x"]), "candidates"),
        (lambda: feedback(silent, ROWS, kind="praise"), "kind"),
        (lambda: self_train(silent, ["x"]), "answer"),
        (lambda: self_train(silent, ["x"], kind="spin"), "target"),
        (lambda: self_train(silent, ["x"], kind="luck"), "kind"),
    ):
        with pytest.raises(BadInput, match=name):
            call()


def test_with_a_real_model(smollm, tmp_path):
    """SmolLM2-135M answers, judges under a schema, and is its own student; the second time from the cache."""
    backend = cached(Local(*smollm), tmp_path)
    short = {"max_tokens": 24, "seed": 0}

    def everything():
        answers = label(backend, [{"prompt": "What is the capital of France? One word.", "answer": "Paris"}],
                        verifier=lambda row, text: row["answer"] in text, **short)  # fmt: skip
        rows = [{"prompt": "Name a colour.", "candidates": ["Blue.", "I will not tell you that, go away."]}]
        pairs = feedback(backend, rows, constrained=True, **short)
        own = self_train(
            backend, [{"prompt": "Say hello.", "target": "Hello!"}], kind="spin", samples=2, **short
        )
        return answers.to_list(), pairs.to_list(), own.to_list()

    first = everything()
    assert len(first[0]) == 1 and "Paris" in first[0][0]["target"]
    assert len(first[1]) <= 1
    asked = backend.usage.answers
    assert asked >= 5
    assert everything() == first
    assert backend.usage.answers == asked
