"""core.metrics: values by hand, limits, invariances, bad input."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfuse.core.errors import BadInput
from transfuse.core.metrics import (
    bootstrap_interval,
    contains_answer,
    exact_match,
    fluency,
    gap_closed,
    memory_ratio,
    normalise_answer,
    perplexity,
    token_f1,
)


class TestBootstrap:
    def test_two_values_by_enumeration(self):
        # Resampled means of (0, 1) are 0, 1/2, 1 with shares 1/4, 1/2, 1/4: a 95 % interval is [0, 1],
        # one of 40 % lies inside the middle half.
        assert bootstrap_interval([0, 1]) == (0.5, 0.0, 1.0)
        assert bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5, 0.5)

    def test_normal_limit(self):
        rng = __import__("numpy").random.default_rng(3)
        values = rng.normal(2.0, 1.5, size=4000)
        mean, low, high = bootstrap_interval(values, resamples=4000)
        half = 1.96 * statistics.stdev(values) / math.sqrt(4000)
        assert mean == pytest.approx(values.mean())
        assert mean - low == pytest.approx(half, rel=0.08)
        assert high - mean == pytest.approx(half, rel=0.08)

    def test_seeded_and_degenerate(self):
        values = [math.sin(i) for i in range(40)]
        assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
        assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
        assert bootstrap_interval([0.3]) == (0.3, 0.3, 0.3)

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
    def test_interval_holds_mean_and_stays_in_range(self, values):
        mean, low, high = bootstrap_interval(values, resamples=50)
        assert low <= mean <= high
        slack = 1e-9 * max(1.0, *(abs(v) for v in values))
        assert min(values) - slack <= low and high <= max(values) + slack

    @pytest.mark.parametrize(
        "arguments", [{"values": []}, {"values": [1.0, math.nan]}, {"values": [math.inf]},
                      {"values": ["a"]},
                      {"values": [1.0], "confidence": 1.0}, {"values": [1.0], "resamples": 0}],
    )  # fmt: skip
    def test_bad_input(self, arguments):
        with pytest.raises(BadInput):
            bootstrap_interval(**arguments)


def test_gap_closed():
    assert gap_closed(0.2, 0.2, 0.8) == 0.0
    assert gap_closed(0.8, 0.2, 0.8) == 1.0
    assert gap_closed(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert gap_closed(0.1, 0.2, 0.8) == pytest.approx(-1 / 6)
    assert gap_closed(3.0, 5.0, 1.0) == 0.5  # lower is better: the reference lies below the base
    assert math.isnan(gap_closed(0.9, 0.4, 0.4))


class TestAnswers:
    def test_normalise(self):
        assert normalise_answer("  The  Eiffel Tower! ") == "eiffel tower"
        assert normalise_answer("An apple, a day") == "apple day"
        assert normalise_answer("theatre") == "theatre"
        assert normalise_answer("«Ça va ?»") == "ça va"
        assert normalise_answer("A") == "a" and normalise_answer("+") == "+"

    @given(st.text())
    def test_normalise_twice_changes_nothing(self, text):
        once = normalise_answer(text)
        assert normalise_answer(once) == once
        assert bool(once) == bool(text.split())

    def test_exact_match_and_aliases(self):
        assert exact_match("the Paris.", "Paris") == 1.0
        assert exact_match("Paris, France", "Paris") == 0.0
        assert exact_match("nyc", ["New York", "NYC"]) == 1.0

    def test_token_f1_by_hand(self):
        # 2 shared words; precision 2/3, recall 2/4 -> 4/7
        assert token_f1("red green blue", "green blue white black") == pytest.approx(4 / 7)
        # repeated words count as often as both sides hold them: 1 shared, precision 1/2, recall 1
        assert token_f1("port port", "port") == pytest.approx(2 / 3)
        assert token_f1("Oskar", ["Ines Varro", "Oskar Tveld"]) == pytest.approx(2 / 3)
        assert token_f1("nothing", "else") == 0.0

    def test_yes_no_rule(self):
        assert token_f1("no idea", "no") == 0.0
        assert token_f1("yes", "yes it is") == 0.0
        assert token_f1("No.", "no") == 1.0
        assert token_f1("no idea", ["no", "idea"]) == pytest.approx(2 / 3)

    def test_contains_whole_words_only(self):
        assert contains_answer("It is in New York.", "york")
        assert contains_answer("It is in New York.", ["Boston", "New York"])
        assert not contains_answer("He flew to Russia", "US")
        assert contains_answer("答案是北京市", "北京")
        assert not contains_answer("", "x")

    def test_marks_belong_to_their_letters(self):
        assert contains_answer("\u0930\u093e\u092e \u0917\u092f\u093e", "\u0930\u093e\u092e")  # Ram went
        assert not contains_answer("\u0930\u093e\u092e\u093e\u092f\u0923", "\u0930\u093e\u092e")  # Ramayana
        composed, apart = "caf\u00e9 noir", "cafe\u0301 noir"
        assert exact_match(composed, apart) == token_f1(apart, composed) == 1.0
        assert contains_answer(apart, "caf\u00e9") and not contains_answer(apart, "cafe")

    @given(st.lists(st.sampled_from(["ines", "varro", "1687", "quenby"]), min_size=1, max_size=5))
    def test_scores_agree(self, words):
        text = " ".join(words)
        assert exact_match(text, text) == token_f1(text, text) == 1.0
        assert contains_answer(f"so it was {text} indeed", text)

    @pytest.mark.parametrize("answers", ["", "  ", [], ["ok", ""]])
    def test_empty_answers_refused(self, answers):
        for function in (exact_match, token_f1, contains_answer):
            with pytest.raises(BadInput, match="answers"):
                function("text", answers)


class TestFluency:
    def test_by_hand(self):
        # "a b a b": bigrams ab, ba, ab -> H2 = 2/3 log2(3/2) + 1/3 log2 3; trigrams aba, bab -> H3 = 1
        h2 = 2 / 3 * math.log2(1.5) + 1 / 3 * math.log2(3)
        assert fluency("a b a b") == pytest.approx(100 * (2 / 3 * h2 + 4 / 3 * 1.0) / 2)

    def test_case_is_kept(self):
        # "A a A a": two bigrams Aa, aA, Aa and two trigrams, as for "a b a b"; in one case all are equal.
        assert fluency("A a A a") == pytest.approx(fluency("a b a b"))
        assert fluency("A a A a") > fluency("a a a a") == 0.0

    def test_distinct_words_reach_the_limit(self):
        text = " ".join(f"w{i}" for i in range(10))
        assert fluency([text]) == pytest.approx(100 * (math.log2(9) / 3 + 2 * math.log2(8) / 3))

    def test_repetition_scores_zero_and_mean(self):
        assert fluency("so so so so so") == 0.0
        assert fluency("word") == 0.0
        assert fluency(["so so so", "a b a b"]) == pytest.approx(fluency("a b a b") / 2)
        assert fluency("end. end") > 0  # marks are words of their own

    def test_empty(self):
        with pytest.raises(BadInput):
            fluency([])


class TestMemoryRatio:
    def test_counts(self):
        result = memory_ratio(
            ["Paris it is", "Madrid", "Paris, not Madrid", "who knows"],
            ["Paris", ["Paris"], "Paris", "Paris"],
            ["Madrid", "Madrid", ["Madrid", "Toledo"], "Madrid"],
        )
        assert result == (0.5, 0.5, 0.5, 1, 0.75)

    def test_answer_inside_the_other_is_reported(self):
        assert memory_ratio(["New York"], ["York"], ["New York"]).both == 1

    def test_no_hit(self):
        result = memory_ratio(["x"], ["a1"], ["b1"])
        assert math.isnan(result.ratio) and result.hit_rate == 0

    def test_bad_input(self):
        with pytest.raises(BadInput, match="predictions"):
            memory_ratio([], [], [])
        with pytest.raises(BadInput, match="context_answers"):
            memory_ratio(["a"], ["b"], ["c", "d"])
        with pytest.raises(BadInput, match="memory_answers"):
            memory_ratio(["a"], "b", ["c"])


TEXT = "The capital of France is Paris. The mayor of Port Ellery is Ines Varro, who was born in Quenby."


def slow_perplexity(model, ids, window, begin):
    """Token by token in float64, each from its own forward pass over the tokens its window allows."""
    import torch

    start = 0 if begin else 1
    nll = []
    for first in range(start, len(ids), window - 1):
        for position in range(first, min(first + window - 1, len(ids))):
            context = ([begin] if begin else [ids[first - 1]]) + ids[first:position]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
            nll.append((torch.logsumexp(logits, 0) - logits[ids[position]]).item())
    return math.exp(statistics.fmean(nll))


class TestPerplexity:
    @pytest.mark.parametrize(
        ("architecture", "window"), list(itertools.product(["llama", "gpt2", "gemma3"], [2, 7, 512]))
    )
    def test_against_loop(self, tiny_lm, tiny_tokenizer, architecture, window):
        model = tiny_lm(architecture)
        ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        expected = slow_perplexity(model, ids, window, None)
        assert perplexity(model, tiny_tokenizer, TEXT, window=window) == pytest.approx(expected, rel=1e-4)

    def test_begin_token_leads_every_window(self, tiny_lm, tiny_tokenizer):
        class WithBegin:
            bos_token_id = tiny_tokenizer.bos_token_id

            def __call__(self, text, add_special_tokens=True, **kwargs):
                ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
                return {"input_ids": [self.bos_token_id] * add_special_tokens + ids}

        model = tiny_lm("llama")
        ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        expected = slow_perplexity(model, ids, 9, tiny_tokenizer.bos_token_id)
        assert perplexity(model, WithBegin(), TEXT, window=9) == pytest.approx(expected, rel=1e-4)

    def test_uniform_model_scores_the_vocabulary_size(self, tiny_lm, tiny_tokenizer):
        model = tiny_lm("llama")
        model.get_output_embeddings().weight.data.zero_()
        assert perplexity(model, tiny_tokenizer, TEXT) == pytest.approx(400.0, rel=1e-5)

    def test_soft_capped_logits_are_the_models_own(self, tiny_lm, tiny_tokenizer):
        model = tiny_lm("gemma3")
        model.get_output_embeddings().weight.data.mul_(8.0)
        plain = perplexity(model, tiny_tokenizer, TEXT)
        model.config.final_logit_softcapping = 1.0
        ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        capped = perplexity(model, tiny_tokenizer, TEXT)
        assert capped == pytest.approx(slow_perplexity(model, ids, 512, None), rel=1e-4)
        assert abs(capped - plain) > 1

    def test_every_module_keeps_its_mode(self, tiny_lm, tiny_tokenizer):
        model = tiny_lm("llama", layers=2).train()
        model.model.layers[1].eval()
        before = [module.training for module in model.modules()]
        perplexity(model, tiny_tokenizer, TEXT)
        assert before == [module.training for module in model.modules()]

    def test_a_broken_model_scores_nan_not_infinity(self, tiny_lm, tiny_tokenizer):
        model = tiny_lm("llama", layers=1)
        model.model.norm.weight.data.fill_(math.nan)
        assert math.isnan(perplexity(model, tiny_tokenizer, TEXT))

    def test_adapter_counts_and_mode_is_restored(self, tiny_lm, tiny_tokenizer):
        import torch
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
        base = perplexity(model, tiny_tokenizer, TEXT)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.3)
        model.train()
        first = perplexity(model, tiny_tokenizer, TEXT)
        assert first == perplexity(model, tiny_tokenizer, TEXT)  # dropout is off
        assert abs(first - base) > 1e-3
        assert model.training
        with model.disable_adapter():
            assert perplexity(model, tiny_tokenizer, TEXT) == pytest.approx(base)

    def test_head_never_sees_the_whole_window(self, tiny_lm, tiny_tokenizer):
        model, rows = tiny_lm("llama"), []
        head = model.get_output_embeddings()
        forward = head.forward
        head.forward = lambda hidden: rows.append(hidden.shape[-2]) or forward(hidden)
        perplexity(model, tiny_tokenizer, TEXT * 12, window=400)
        assert max(rows) <= 128 and sum(rows) > 300

    def test_bad_input(self, tiny_lm, tiny_tokenizer):
        model = tiny_lm("llama")
        with pytest.raises(BadInput, match="too short"):
            perplexity(model, tiny_tokenizer, "")
        with pytest.raises(BadInput, match="window"):
            perplexity(model, tiny_tokenizer, TEXT, window=1)


def test_import_leaves_torch_alone():
    code = "import sys, transfuse.core.metrics; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
