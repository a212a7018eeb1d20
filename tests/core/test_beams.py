"""Beam search over streams: against transformers' own, against every text there is, and with caches in order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList

from transfuse.core import groups
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.generate import pad_batch
from transfuse.core.lockstep import decode, decode_prepared
from transfuse.core.streams import Stream, copies, distinct, once
from transfuse.core.training import generator

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma3"]
NEW = 9
ENDS = [5, 17, 23, 31, 44, 58]


def prompts(seed: int, lengths: list[int], vocab: int = 60) -> list[list[int]]:
    g = generator(seed)
    return [torch.randint(3, vocab, (n,), generator=g).tolist() for n in lengths]


def stream(model, rows) -> Stream:
    return Stream(model, *pad_batch(rows, 0, side="left"))


def only(logits):
    return logits[0]


def blend(logits):
    """Three unequal parts, not normalised, so that mixing up streams or rows cannot go unseen."""
    weights = [1.3, -0.4, 0.25]
    return sum(w * z for w, z in zip(weights, logits))


def joined(*others, combine=only):
    """A `custom_generate` that decodes the model that is asked, beside others that read the same or their own."""

    def custom(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        first = Stream(model, input_ids, kwargs.get("attention_mask"))
        streams = [first]
        for other in others:
            own = isinstance(other, Stream)
            streams.append(
                other.repeated(copies(generation_config)) if own else first._replace(model=other or model)
            )
        return decode_prepared(
            streams, combine, logits_processor, stopping_criteria, generation_config, kwargs
        )

    return custom


def both(model, rows, custom, **options):
    """The same search by transformers and by the decoder: all outputs equal."""
    ids, mask = pad_batch(rows, 0, side="left")
    settings = {
        "max_new_tokens": NEW, "pad_token_id": 1, "do_sample": False, "eos_token_id": ENDS, **options,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    theirs = model.generate(input_ids=ids, attention_mask=mask, **settings)
    ours = model.generate(input_ids=ids, attention_mask=mask, custom_generate=custom, **settings)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices.long())
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)
    assert len(ours.scores) == len(theirs.scores)
    for a, b in zip(ours.scores, theirs.scores):
        torch.testing.assert_close(a[:, 3:], b[:, 3:], rtol=1e-3, atol=1e-3)
    return ours


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_stream_is_transformers_beam_search(tiny_lm, architecture, early_stopping):
    model = tiny_lm(architecture, vocab=60)
    shorter = 0
    for seed, (beams, wanted, penalty) in enumerate([(3, 3, 1.0), (4, 2, 0.0), (2, 1, 2.0), (5, 4, -0.7)]):
        rows = prompts(seed, [9, 1, 5][: 1 + seed % 3])
        output = both(
            model, rows, joined(), num_beams=beams, num_return_sequences=wanted, length_penalty=penalty,
            early_stopping=early_stopping,
        )  # fmt: skip
        assert output.sequences.shape[0] == len(rows) * wanted
        shorter += int((output.beam_indices == -1).any())
    assert shorter >= 2  # texts of different length did compete


@pytest.mark.parametrize("count", [2, 3])
def test_equal_streams_are_one(tiny_lm, count):
    model = tiny_lm("qwen2", vocab=60)
    others = [None] * (count - 1)
    mean = joined(*others, combine=lambda logits: sum(logits) / count)
    both(model, prompts(1, [4, 11, 7]), mean, num_beams=3, num_return_sequences=2)


def test_sliding_windows_are_crossed(tiny_lm):
    donor = tiny_lm("gemma3", vocab=60)
    settings = {**donor.config.to_dict(), "sliding_window": 8}
    settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.load_state_dict(donor.state_dict())
    for lengths in ([3, 5], [12, 6], [7]):
        both(model, prompts(len(lengths), lengths), joined(), num_beams=4, max_new_tokens=14)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_allowed_tokens_fn": lambda row, text: list(range(3 + 10 * row, 33 + 10 * row))},
        {"prefix_allowed_tokens_fn": lambda row, text: [7 + row]},  # one text per row, n places for it
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.4, "min_new_tokens": 3},
        {"eos_token_id": None, "bad_words_ids": [[9], [12]]},
        {"eos_token_id": 5, "pad_token_id": 0},
        {"max_new_tokens": 1},
        {"use_cache": False},
        {"stop_strings": None, "max_time": 60.0},
    ],
)
def test_what_generate_prepares_acts_as_in_transformers(tiny_lm, options):
    model = tiny_lm("llama", vocab=60)
    both(model, prompts(2, [6, 2, 8]), joined(), num_beams=3, num_return_sequences=3, **options)


def test_without_a_dictionary_the_sequences_come_alone(tiny_lm):
    model = tiny_lm("llama", vocab=60)
    ids = torch.tensor(prompts(1, [5, 5]))
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    theirs = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, custom_generate=joined(), **options), theirs)
    rows = [Stream(model, ids)]
    own = decode(rows, only, max_new_tokens=4, num_beams=3, num_return_sequences=2, eos_token_id=2)
    assert torch.equal(own, theirs[:, 5:])


@torch.no_grad()
def every_text(streams, combine, length, ends, penalty):
    """All texts of one row that end, or reach the length, with their scores: {tokens: score}, in Python."""
    found = {}
    vocab = streams[0].model.config.vocab_size

    def go_on(text, total):
        if text and (text[-1] in ends or len(text) == length):
            found[tuple(text)] = total / len(text) ** penalty
            return
        logits = [
            s.model(torch.tensor([s.input_ids[0].tolist() + text])).logits[:, -1].float() for s in streams
        ]
        scores = combine(logits)[0].double().tolist()
        norm = math.log(sum(math.exp(z) for z in scores))
        for token in range(vocab):
            go_on([*text, token], total + scores[token] - norm)

    go_on([], 0.0)
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.8, -0.5])
def test_beams_enough_find_the_best_of_all_texts(tiny_lm, penalty):
    """The offset of three models, not normalised: each step's scores are log-softmaxed before the penalty acts."""
    models = [tiny_lm("llama", vocab=6, seed=seed, layers=2) for seed in range(3)]
    streams = [Stream(m, torch.tensor([ids])) for m, ids in zip(models, ([3, 4, 5], [5], [4, 4]))]
    ends, length = [2, 4], 4
    texts = every_text(streams, blend, length, ends, penalty)
    best = sorted(texts, key=texts.__getitem__, reverse=True)[:12]
    assert len({len(text) for text in best}) > 1 or penalty > 1
    ours = decode(
        streams, blend, max_new_tokens=length, eos_token_id=ends, pad_token_id=0, num_beams=200,
        num_return_sequences=12, length_penalty=penalty, early_stopping="never",
    )  # fmt: skip
    for got, wanted in zip(ours.tolist(), best, strict=True):
        assert tuple(got[: len(wanted)]) == wanted
        assert not any(got[len(wanted) :])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches_follow_the_beams(tiny_lm, architecture):
    """Three streams, two models, a shared forward pass: as when the whole text is read again at each step."""
    model, other = tiny_lm(architecture, vocab=60), tiny_lm(architecture, vocab=60, seed=5, layers=2)
    streams = [
        stream(model, prompts(1, [5, 21, 8])),
        stream(other, prompts(2, [30, 3, 1])),
        stream(model, prompts(3, [1, 2, 40])),
    ]
    options = {"max_new_tokens": NEW, "num_beams": 4, "num_return_sequences": 4, "eos_token_id": ENDS}
    together = decode(streams, blend, **options)
    assert torch.equal(together, decode(streams, blend, use_cache=False, **options))
    for b in range(3):
        alone = decode([s._replace(input_ids=s.input_ids[b : b + 1], attention_mask=s.attention_mask[b : b + 1])
                        for s in streams], blend, **options)  # fmt: skip
        width = alone.shape[1]
        assert torch.equal(together[4 * b : 4 * b + 4, :width], alone)
        assert torch.isin(together[4 * b : 4 * b + 4, width:], torch.tensor(ENDS[0])).all()


def test_more_beams_find_likelier_texts_than_greedy(tiny_lm):
    model, other = tiny_lm("gpt2", vocab=60), tiny_lm("gpt2", vocab=60, seed=3)
    streams = [stream(model, prompts(4, [6] * 8)), stream(other, prompts(5, [3] * 8))]
    from transfuse.core.lockstep import follow

    def total(tokens):
        return follow(streams, blend, tokens).logprobs.sum(1)

    greedy = total(decode(streams, blend, max_new_tokens=6))
    beams = total(decode(streams, blend, max_new_tokens=6, num_beams=6))
    assert (beams >= greedy - 1e-4).float().mean() >= 0.75 and beams.mean() > greedy.mean() + 0.1


def test_prompts_are_read_once_per_row(tiny_lm, monkeypatch):
    seen, model, other = [], tiny_lm("llama", vocab=60), tiny_lm("llama", vocab=60, seed=5)
    forward = groups.Group.forward

    def counted(self, keep=1):
        before = 0 if self.cache is None else self.ids.shape[1] - 1
        seen.append((self.ids.shape[0], self.ids.shape[1] - before))
        return forward(self, keep)

    monkeypatch.setattr(groups.Group, "forward", counted)
    second, third = stream(other, prompts(2, [6, 3])), stream(model, prompts(3, [2, 2]))
    ids, mask = pad_batch(prompts(1, [4, 9]), 0, side="left")
    options = {"max_new_tokens": 3, "eos_token_id": None, "num_return_sequences": 3}
    for beams, draws in ((3, {}), (1, {"do_sample": True, "top_k": 1})):
        seen.clear()
        out = model.generate(
            input_ids=ids, attention_mask=mask, num_beams=beams, **options, **draws,
            custom_generate=joined(second, third, combine=blend),
        )  # fmt: skip
        assert out.shape == (6, 12)
        assert seen == [(2, 9), (2, 6), (2, 2)] + [(12, 1), (6, 1)] * 2


def test_settings_per_row_fit_the_beams(tiny_lm):
    """What `combine` holds per row, made from the repeated streams, is that of the row its beams belong to."""
    model, other = tiny_lm("llama", vocab=60), tiny_lm("llama", vocab=60, seed=5)
    rows, alone = prompts(1, [5, 8, 3]), prompts(2, [4, 4, 4])
    weights = torch.tensor([0.0, 0.5, 1.0])
    options = {
        "max_new_tokens": 6,
        "eos_token_id": ENDS,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 1,
    }

    def run(rows, alone, weights):
        ids, mask = pad_batch(rows, 0, side="left")
        repeated = weights.repeat_interleave(3)[:, None]
        seen = []

        def mixed(logits):
            seen.append([tuple(z.shape) for z in logits])
            return (1 - repeated) * logits[0] + repeated * logits[1]

        custom = joined(stream(other, alone), combine=mixed)
        out = model.generate(input_ids=ids, attention_mask=mask, custom_generate=custom, **options)
        assert set(itertools.chain(*seen)) == {(3 * len(rows), 60)}
        return out[:, ids.shape[1] :]

    whole = run(rows, alone, weights)
    for b in range(3):
        row = run(rows[b : b + 1], alone[b : b + 1], weights[b : b + 1])[0]
        assert torch.equal(whole[b, : len(row)], row)


def test_rows_that_are_no_copies_are_refused(tiny_lm):
    model = tiny_lm("llama", vocab=60)
    ids = torch.tensor(prompts(1, [5, 5]))
    for other in (torch.tensor(prompts(2, [4, 4])), torch.tensor(prompts(2, [4] * 6))):
        given = Stream(model, other)
        given = given if len(other) == 6 else given.repeated(2)

        def custom(model, input_ids, processors, criteria, config, *, given=given, **kwargs):
            return decode_prepared(
                [Stream(model, input_ids), given], blend, processors, criteria, config, kwargs
            )

        def generate(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            return custom(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

        with pytest.raises(
            BadInput, match=r"streams\[1\].input_ids = .*(3 rows of each prompt|1 rows where)"
        ):
            model.generate(input_ids=ids, num_beams=3, max_new_tokens=2, custom_generate=generate)


def test_rows_that_repeat_are_told():
    ids = torch.tensor([[3, 4], [3, 4], [5, 6], [5, 6]])
    mask = torch.ones_like(ids)
    streams, times = distinct([Stream(None, ids, mask), Stream(None, ids.flip(1), mask)])
    assert times == 2 and [s.input_ids.tolist() for s in streams] == [[[3, 4], [5, 6]], [[4, 3], [6, 5]]]
    assert distinct([Stream(None, ids, mask), Stream(None, torch.arange(4)[:, None], mask[:, :1])])[1] == 1
    assert distinct([Stream(None, ids[[0, 1, 2]], mask[:3])])[1] == 1  # two and one
    assert distinct([Stream(None, ids[[0, 1, 0, 2]], mask)])[1] == 1
    assert distinct([Stream(None, ids[[0, 2, 2, 3]], mask)])[1] == 1
    assert distinct([Stream(None, ids[[0, 1]], torch.tensor([[1, 1], [0, 1]]))])[1] == 1
    assert distinct([Stream(None, ids[[0, 0, 0]], mask[:3])])[1] == 3
    assert distinct([Stream(None, ids[:1], mask[:1])])[1] == 1
    assert once([Stream(None, ids)], 2)[0].input_ids.tolist() == [[3, 4], [5, 6]]


def test_what_cannot_be_searched_is_refused(tiny_lm):
    model = tiny_lm("llama", vocab=60)
    one = [Stream(model, torch.tensor([[3, 4]]))]
    cases = [
        ({"num_beams": 0}, BadInput, "num_beams = 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, BadInput, "num_return_sequences = 3"),
        ({"num_return_sequences": 2}, BadInput, "num_return_sequences = 2"),
        ({"num_beams": 2, "num_return_sequences": 0}, BadInput, "num_return_sequences = 0"),
        ({"num_beams": 2, "early_stopping": "soon"}, BadInput, "early_stopping = 'soon'"),
        ({"num_beams": 2, "do_sample": True}, NotApplicable, "neither the likeliest"),
        ({"num_beams": 2, "on_tokens": print}, NotApplicable, "shows at the end"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            decode(one, only, max_new_tokens=2, **options)
    with pytest.raises(NotApplicable, match="neither the likeliest"):
        model.generate(
            one[0].input_ids, custom_generate=joined(), num_beams=2, do_sample=True, max_new_tokens=2
        )


def test_a_cache_that_cannot_follow_is_refused(tiny_lm):
    from transformers import LlamaForCausalLM

    class Tuples(LlamaForCausalLM):
        """Keeps its cache as older models do."""

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if kwargs.get("use_cache"):
                output.past_key_values = tuple(vars(layer) for layer in output.past_key_values.layers)
            return output

    donor = tiny_lm("llama", vocab=60)
    model = Tuples(donor.config).eval()
    model.load_state_dict(donor.state_dict())
    ids = torch.tensor(prompts(1, [5, 5]))
    options = {"max_new_tokens": 4, "num_beams": 3}
    with pytest.raises(NotApplicable, match="'Tuples' keeps a cache"):
        decode([Stream(model, ids)], only, **options)
    reread = decode([Stream(model, ids)], only, use_cache=False, **options)
    assert torch.equal(reread, decode([Stream(donor, ids)], only, **options))


def test_processors_see_prompts_as_given(tiny_lm):
    """Rows padded on the right reach the processors unchanged, each beam's new tokens behind them."""
    model = tiny_lm("llama", vocab=60)
    ids, mask = pad_batch(prompts(1, [5, 2]), 0, side="right")
    seen = []

    def watch(texts, scores):
        seen.append(texts.clone())
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(len(scores)))
        return scores

    out = decode(
        [Stream(model, ids, mask)], only, max_new_tokens=3, num_beams=2,
        logits_processor=LogitsProcessorList([watch]),
    )  # fmt: skip
    assert all(torch.equal(texts[:, :5], ids.repeat_interleave(2, 0)) for texts in seen)
    assert [texts.shape for texts in seen] == [(4, 5), (4, 6), (4, 7)]
    left = decode([stream(model, prompts(1, [5, 2]))], only, max_new_tokens=3, num_beams=2)
    assert torch.equal(out, left)
