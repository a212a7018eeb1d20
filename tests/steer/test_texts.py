"""Texts to streams and back: records that belong to the answer they come with, beams included."""

from __future__ import annotations

import pytest
import torch

from transfuse.core.lockstep import decode_prepared
from transfuse.core.streams import Stream, copies
from transfuse.steer._texts import answer

PROMPTS = ["The mayor of Port Ellery is", "New facts", "A question: who built the bridge?", "The capital"]


class Summing:
    """Adds the logits of a second rendering and notes the sum of the scores, and the best two, of each step."""

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, *, other_input_ids,
        other_attention_mask, trace, **kwargs,
    ):  # fmt: skip
        second = Stream(model, other_input_ids, other_attention_mask).repeated(copies(generation_config))

        def combine(logits):
            scores = self.combine(logits)
            trace.append((scores.sum(-1), scores.topk(2).values))
            return scores

        return decode_prepared(
            [Stream(model, input_ids, kwargs.get("attention_mask")), second], combine, logits_processor,
            stopping_criteria, generation_config, kwargs,
        )  # fmt: skip

    def combine(self, logits):
        return logits[0] + 0.3 * logits[1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"num_beams": 3, "length_penalty": 0.0}])
def test_records_are_those_of_the_answer(tiny_lm, tiny_tokenizer, options):
    """Each is found again by reading the answer as given, whatever its beam's places were."""
    model = tiny_lm("llama")
    rows = [
        [tiny_tokenizer(text)["input_ids"], tiny_tokenizer("So: " + text)["input_ids"]] for text in PROMPTS
    ]
    ends = [2, *range(20, 400, 16)]
    answers = answer(
        Summing(), model, tiny_tokenizer, rows, extra=["other"], batch_size=3, max_new_tokens=10,
        eos_token_id=ends, **options,
    )  # fmt: skip
    lengths = set()
    for (one, two), found in zip(rows, answers, strict=True):
        total, best = found.trace
        tokens = found.tokens.tolist()
        lengths.add(len(tokens))
        assert len(total) == len(tokens) and best.shape == (len(tokens), 2)
        with torch.no_grad():
            streams = [model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1] for ids in (one, two)]
        scores = Summing().combine(streams)
        torch.testing.assert_close(total, scores.sum(-1), rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(best, scores.topk(2).values, rtol=1e-3, atol=1e-3)
    assert len(lengths) > 1


def test_the_models_own_settings_do_not_count(tiny_lm, tiny_tokenizer):
    """Nor do its beams; what the caller asks for does."""
    model = tiny_lm("llama")
    rows = [
        [tiny_tokenizer(text)["input_ids"], tiny_tokenizer("So: " + text)["input_ids"]] for text in PROMPTS
    ]

    def said(**options):
        found = answer(
            Summing(), model, tiny_tokenizer, rows, extra=["other"], batch_size=4, max_new_tokens=8, **options
        )
        return [each.tokens.tolist() for each in found]

    wanted, beams = said(), said(num_beams=3)
    model.generation_config.update(
        num_beams=3, no_repeat_ngram_size=1, repetition_penalty=3.0, do_sample=True
    )
    assert said() == wanted and said(num_beams=3) == beams != wanted
