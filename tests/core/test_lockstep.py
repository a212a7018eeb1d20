"""Streams in step, against transformers' own loop and a slow loop of one row, one stream, no cache."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria, TemperatureLogitsWarper, TopKLogitsWarper

from transfuse.core import groups
from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.generate import pad_batch
from transfuse.core.lockstep import decode, decode_prepared, follow
from transfuse.core.streams import Stream, check_generation, check_vocabularies, unpadded
from transfuse.core.training import generator

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma3"]
NEW = 10


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    g = generator(seed)
    return [torch.randint(3, 400, (n,), generator=g).tolist() for n in lengths]


def stream(model, rows, side="left") -> Stream:
    return Stream(model, *pad_batch(rows, 0, side=side))


def only(logits):
    return logits[0]


def blend(logits):
    """Three unequal parts, nonlinear in each, so that mixing up streams or rows cannot go unseen."""
    weights = [1.0, -0.4, 0.25]
    return sum(w * z.log_softmax(-1) for w, z in zip(weights, logits))


@torch.no_grad()
def slow(streams, combine, steps, forced=None):
    """Row by row, stream by stream, the whole text again at each step; no mask, no positions, no cache."""
    texts = [unpadded(s) for s in streams]
    tokens, scores = [], []
    for b in range(len(texts[0])):
        new, seen = [], []
        for t in range(steps):
            logits = [
                s.model(torch.tensor([text[b] + new])).logits[:, -1].float()
                for s, text in zip(streams, texts)
            ]
            seen.append(combine(logits)[0])
            new.append(int(seen[-1].argmax()) if forced is None else int(forced[b, t]))
        tokens.append(new)
        scores.append(torch.stack(seen))
    return torch.tensor(tokens), torch.stack(scores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_stream_is_transformers_generate(tiny_lm, architecture):
    model = tiny_lm(architecture)
    one = stream(model, prompts(1, [9, 4, 13]))
    ours = decode([one], only, max_new_tokens=NEW, eos_token_id=2, pad_token_id=0)
    theirs = model.generate(
        input_ids=one.input_ids, attention_mask=one.attention_mask, max_new_tokens=NEW, do_sample=False
    )[:, 13:]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_streams_are_the_slow_loop(tiny_lm, architecture, use_cache):
    model, other = tiny_lm(architecture), tiny_lm(architecture, seed=5, layers=2)
    streams = [
        stream(model, prompts(1, [5, 21, 8])),
        stream(other, prompts(2, [30, 3, 1])),
        stream(model, prompts(3, [1, 2, 40])),
    ]
    ours = decode(streams, blend, max_new_tokens=NEW, use_cache=use_cache)
    assert torch.equal(ours, slow(streams, blend, NEW)[0])


def test_caches_of_sliding_windows_are_aligned(tiny_lm):
    """Prompts shorter and longer than the window, and crossing it while decoding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    donor = tiny_lm("gemma3")
    settings = {**donor.config.to_dict(), "sliding_window": 8}
    settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.load_state_dict(donor.state_dict())
    streams = [
        stream(model, prompts(1, [3, 5])),
        stream(model, prompts(2, [20, 6])),
        stream(model, prompts(3, [7, 7])),
    ]
    ours = decode(streams, blend, max_new_tokens=14)
    assert torch.equal(ours, slow(streams, blend, 14)[0])


@pytest.fixture
def calls(monkeypatch):
    """Shapes (rows, tokens read, positions scored) of every forward pass."""
    seen = []
    forward = groups.Group.forward

    def counted(self, keep=1):
        before = 0 if self.cache is None else self.ids.shape[1] - 1
        logits = forward(self, keep)
        seen.append((self.ids.shape[0], self.ids.shape[1] - before, logits.shape[1]))
        return logits

    monkeypatch.setattr(groups.Group, "forward", counted)
    return seen


def test_streams_of_one_model_share_a_forward(tiny_lm, calls):
    model, other = tiny_lm("llama"), tiny_lm("llama", seed=5)
    streams = [stream(m, prompts(i, [4 + i, 2])) for i, m in enumerate([model, other, model])]
    decode(streams, blend, max_new_tokens=3)
    assert calls[:3] == [(2, 4, 1), (2, 5, 1), (2, 6, 1)]  # each prompt is read without the others' padding
    assert calls[3:] == [(4, 1, 1), (2, 1, 1)] * 2


def test_padding_dearer_than_the_weights_keeps_streams_apart(tiny_lm, calls, monkeypatch):
    model = tiny_lm("llama")
    streams = [stream(model, prompts(1, [3])), stream(model, prompts(2, [50]))]
    together = decode(streams, blend, max_new_tokens=NEW)
    assert calls[-1] == (2, 1, 1)
    # 47 positions x 4 layers x (keys + values) x 2 heads x 8 numbers x 4 bytes
    pairs = [groups.Group(s, True) for s in streams]
    for group in pairs:
        group.forward()
    assert groups._padding_bytes(groups._layer_pairs(*(g.cache for g in pairs))) == 47 * 4 * 2 * 2 * 8 * 4
    given = list(pairs[1].cache.layers)
    assert pairs[0].absorb(pairs[1]) and pairs[1].cache is None
    assert all(layer.keys is None and layer.values is None for layer in given)  # nothing is held twice
    monkeypatch.setattr(groups, "_weight_bytes", lambda model: 47 * 4 * 2 * 2 * 8 * 4 - 1)
    apart = decode(streams, blend, max_new_tokens=NEW)
    assert calls[-2:] == [(1, 1, 1), (1, 1, 1)]
    assert torch.equal(together, apart)


def test_only_the_last_position_is_scored(tiny_lm):
    model = tiny_lm("llama")
    widths = []
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: widths.append(hidden.shape[1]) or head(hidden)
    decode([stream(model, prompts(1, [12, 5]))], only, max_new_tokens=3)
    assert widths == [1, 1, 1]


def test_rows_do_not_know_of_each_other(tiny_lm):
    model, other = tiny_lm("qwen2"), tiny_lm("qwen2", seed=3)
    long, short = prompts(1, [5, 17, 9]), prompts(2, [8, 2, 4])
    together = decode([stream(model, long), stream(other, short)], blend, max_new_tokens=NEW)
    for b in range(3):
        alone = decode(
            [stream(model, long[b : b + 1]), stream(other, short[b : b + 1])], blend, max_new_tokens=NEW
        )
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_side_and_width_do_not_matter(tiny_lm, architecture):
    model = tiny_lm(architecture)
    a, b = prompts(1, [5, 9]), prompts(2, [6, 2])
    left = decode([stream(model, a), stream(model, b)], blend, max_new_tokens=NEW)
    right = decode([stream(model, a, "right"), stream(model, b, "right")], blend, max_new_tokens=NEW)
    ids, mask = pad_batch(a, 0, side="left")
    wide = Stream(
        model, torch.nn.functional.pad(ids, (7, 0), value=99), torch.nn.functional.pad(mask, (7, 0))
    )
    assert torch.equal(left, right)
    assert torch.equal(left, decode([wide, stream(model, b)], blend, max_new_tokens=NEW))


def test_bfloat16(tiny_lm):
    """Scores reach `combine` in float32; alone in its batch, a stream is what transformers makes of it."""
    model = tiny_lm("llama").to(torch.bfloat16)
    one = stream(model, prompts(1, [9]))
    dtypes = set()

    def combine(logits):
        dtypes.update(z.dtype for z in logits)
        return logits[0]

    ours = decode([one], combine, max_new_tokens=NEW)
    theirs = model.generate(input_ids=one.input_ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[
        :, 9:
    ]
    assert dtypes == {torch.float32}
    assert torch.equal(ours, theirs)


def test_a_row_ends_and_the_others_go_on(tiny_lm):
    model = tiny_lm("llama")
    rows = prompts(1, [5, 9, 7])
    free = decode([stream(model, rows)], only, max_new_tokens=NEW)
    end = int(free[1, 2])
    ended = decode([stream(model, rows)], only, max_new_tokens=NEW, eos_token_id=[end, 399], pad_token_id=7)
    for row, unhindered in zip(ended, free):
        at = (unhindered == end).nonzero()
        stop = int(at[0]) + 1 if len(at) else NEW
        assert torch.equal(row[:stop], unhindered[: min(stop, len(row))])
        assert (row[stop:] == 7).all()
    assert (ended[1, 3:] == 7).all()
    single = decode([stream(model, rows[1:2])], only, max_new_tokens=NEW, eos_token_id=end)
    assert single.shape[1] == 1 + int((free[1] == end).nonzero()[0])  # nothing is decoded after the last end


def test_criteria_callbacks_and_processors_see_the_first_stream(tiny_lm):
    model = tiny_lm("llama")
    first, second = prompts(1, [5, 9]), prompts(2, [3, 3])
    given = stream(model, first)
    streamed, widths, scores = [], [], []

    def forbid_repeats(ids, z):
        widths.append(ids.shape[1])
        return z.scatter(1, ids, -torch.inf)

    out = decode(
        [given, stream(model, second)],
        blend,
        max_new_tokens=50,
        logits_processor=LogitsProcessorList([forbid_repeats]),
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(9 + 6)]),
        on_tokens=streamed.append,
        on_scores=scores.append,
    )
    assert out.shape == (2, 6)
    assert torch.equal(torch.stack(streamed, 1), out)
    assert torch.equal(torch.stack(scores, 1).argmax(-1), out)
    assert widths == list(range(9, 15))
    for row, prompt in zip(out.tolist(), first):
        assert len({*row}) == 6
        assert not {*row} & {*prompt}


def test_sampling_draws_from_the_combined_scores(tiny_lm):
    model, other = tiny_lm("llama", vocab=12), tiny_lm("llama", seed=1, vocab=12)
    draws = 4000
    a, b = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])
    streams = [Stream(model, a.repeat(draws, 1)), Stream(other, b.repeat(draws, 1))]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(2.0), TopKLogitsWarper(5)])
    out = decode(
        streams, blend, max_new_tokens=1, do_sample=True, generator=generator(0), logits_processor=warpers
    )
    _, scores = slow([Stream(model, a), Stream(other, b)], blend, 1)
    best = scores[0, 0].div(2).topk(5)
    expected = torch.zeros(12).scatter(0, best.indices, best.values.softmax(-1)) * draws
    counts = torch.bincount(out[:, 0], minlength=12)
    assert counts[expected == 0].sum() == 0
    chi = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi < 18.47  # 4 degrees of freedom, p = 0.001
    again = decode(
        streams, blend, max_new_tokens=1, do_sample=True, generator=generator(0), logits_processor=warpers
    )
    assert torch.equal(out, again)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_following_is_the_slow_loop(tiny_lm, architecture):
    model, other = tiny_lm(architecture), tiny_lm(architecture, seed=5)
    streams = [
        stream(model, prompts(1, [5, 12])),
        stream(other, prompts(2, [30, 3])),
        stream(model, prompts(3, [1, 2])),
    ]
    forced = torch.tensor(prompts(4, [6, 6]))
    ours = follow(streams, blend, forced)
    _, scores = slow(streams, blend, 6, forced)
    assert torch.equal(ours.predictions, scores.argmax(-1))
    expected = scores.log_softmax(-1).gather(2, forced[..., None])[..., 0]
    torch.testing.assert_close(ours.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_following_its_own_answer_predicts_it(tiny_lm):
    model = tiny_lm("llama")
    streams = [stream(model, prompts(1, [5, 12])), stream(model, prompts(2, [30, 3]))]
    out = decode(streams, blend, max_new_tokens=NEW)
    assert torch.equal(follow(streams, blend, out).predictions, out)
    assert torch.equal(follow(streams, blend, out[:, :1]).predictions, out[:, :1])
    ragged = out.clone()
    ragged[0, 4:] = 0  # padding behind a shorter continuation changes nothing before it
    assert torch.equal(follow(streams, blend, ragged).predictions[0, :5], out[0, :5])


def test_bad_streams_are_refused_before_any_forward(tiny_lm, calls):
    model = tiny_lm("llama")
    good = Stream(model, torch.tensor([[3, 4], [5, 6]]))
    cases = [
        ([], BadInput, "streams = .*empty"),
        ([Stream(model, torch.tensor([3, 4]))], BadInput, "not a batch"),
        ([Stream(model, torch.zeros(0, 4, dtype=torch.long))], BadInput, "not a batch"),
        (
            [good, Stream(model, torch.tensor([[3]]))],
            BadInput,
            r"streams\[1\].*1 rows where the first stream has 2",
        ),
        ([good._replace(attention_mask=torch.ones(2, 3))], BadInput, "attention_mask"),
        ([good._replace(attention_mask=torch.tensor([[1, 1], [0, 0]]))], BadInput, "without tokens"),
        (
            [Stream(model, torch.full((1, 510), 3))],
            BadInput,
            "512 positions .*shorten the prompt by 1 tokens",
        ),
        ([good, good._replace(model=tiny_lm("llama", vocab=399))], IncompatibleModels, "399 tokens .* 400"),
    ]
    for streams, error, message in cases:
        with pytest.raises(error, match=message):
            decode(streams, blend, max_new_tokens=4)
    with pytest.raises(BadInput, match="max_new_tokens = 0"):
        decode([good], only, max_new_tokens=0)
    for forced in (torch.zeros(2, 0, dtype=torch.long), torch.tensor([[1]]), torch.tensor([1, 2])):
        with pytest.raises(BadInput, match="forced"):
            follow([good], only, forced)
    assert calls == []
    assert decode([Stream(model, torch.full((1, 509), 3))], only, max_new_tokens=4).shape == (1, 4)


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(NotApplicable, match="decoder-only"):
        decode([Stream(T5ForConditionalGeneration(config), torch.tensor([[3]]))], only, max_new_tokens=1)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_are_refused(tiny_lm, kind):
    """PEFT puts them before whatever is read: over a cache they would come again at each token, or not at all."""
    import peft

    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, ids = peft.get_peft_model(tiny_lm("llama"), settings), torch.tensor([[3, 4, 5]])
    with pytest.raises(
        NotApplicable, match=r"streams\[0\].model = 'PeftModelForCausalLM' has virtual tokens"
    ):
        decode([Stream(model, ids)], only, max_new_tokens=2)

    def custom(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        streams = [Stream(model, input_ids)]
        return decode_prepared(streams, only, logits_processor, stopping_criteria, generation_config, kwargs)

    with pytest.raises(NotApplicable, match="has virtual tokens"):
        model.generate(input_ids=ids, max_new_tokens=2, custom_generate=custom)
    base = model.get_base_model()
    assert decode([Stream(base, ids)], only, max_new_tokens=2).shape == (1, 2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_models_in_training_mode_are_read_in_evaluation_mode(tiny_lm, options):
    model = tiny_lm("gpt2")
    streams = [stream(model, prompts(1, [5, 9])), stream(model, prompts(2, [7, 3]))]
    out = decode(streams, blend, max_new_tokens=NEW, **options)
    expected = follow(streams, blend, out)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(decode(streams, blend, max_new_tokens=NEW, **options), out)
    assert torch.equal(follow(streams, blend, out).logprobs, expected.logprobs)

    def fail(logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode(streams, fail, max_new_tokens=NEW, **options)
    assert [module.training for module in model.modules()] == modes


def test_vocabularies_are_compared_id_by_id(tiny_tokenizer):
    import copy

    check_vocabularies([tiny_tokenizer, copy.deepcopy(tiny_tokenizer)])
    grown = copy.deepcopy(tiny_tokenizer)
    grown.add_tokens(["quenby"])
    check_vocabularies([tiny_tokenizer, grown])  # more ids at the end: cut off
    size = len(tiny_tokenizer)
    with pytest.raises(
        IncompatibleModels, match=rf"\({size + 1}, {size}\) differ: token id {size} is 'quenby' .* None"
    ):
        check_vocabularies([grown, tiny_tokenizer])


def test_tokens_that_only_later_streams_know_are_cut_off(tiny_lm):
    model, wide = tiny_lm("llama"), tiny_lm("llama", seed=5, vocab=407)
    streams = [stream(model, prompts(1, [5, 9])), stream(wide, prompts(2, [7, 3]))]
    seen = []

    def combine(logits):
        seen.append([z.shape for z in logits])
        return blend(logits)

    out = decode(streams, combine, max_new_tokens=3)
    assert set(map(tuple, seen)) == {((2, 400), (2, 400))}
    assert torch.equal(follow(streams, combine, out).predictions, out)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 4},
        {"guidance_scale": 1.5},
        {"cache_implementation": "static"},
    ],
)
def test_modes_that_cannot_be_right_are_refused(settings):
    with pytest.raises(NotApplicable):
        check_generation(GenerationConfig(**settings))


def test_as_custom_generate(tiny_lm):
    """Everything transformers prepares acts on the combined scores; refused inputs are named."""
    model = tiny_lm("llama")
    ids, other = torch.tensor(prompts(1, [6, 6])), torch.tensor(prompts(2, [3, 3]))

    def custom(
        model, input_ids, logits_processor, stopping_criteria, generation_config, *, second=None, **kwargs
    ):
        streams = [Stream(model, input_ids, kwargs.get("attention_mask")), Stream(model, second)]
        streams[1] = streams[1].repeated(generation_config.num_return_sequences or 1)
        return decode_prepared(streams, blend, logits_processor, stopping_criteria, generation_config, kwargs)

    def run(**options):
        return model.generate(
            input_ids=ids, custom_generate=custom, second=other, max_new_tokens=5, **options
        )

    ours = decode(
        [Stream(model, ids), Stream(model, other)], blend, max_new_tokens=5, eos_token_id=2, pad_token_id=0
    )
    assert torch.equal(run(do_sample=False), torch.cat([ids, ours], dim=1))
    output = run(do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences[:, 6:], ours)
    assert torch.equal(torch.stack(output.scores, 1).argmax(-1), ours)
    banned = int(ours[0, 0])
    assert banned not in run(do_sample=False, suppress_tokens=[banned])[0, 6:]
    several = run(do_sample=True, num_return_sequences=3, top_k=1)
    assert torch.equal(several, run(do_sample=False).repeat_interleave(3, 0))
    with pytest.raises(NotApplicable, match="beam_sample"):
        run(num_beams=2, do_sample=True)
    cache = model(ids[:, :-1]).past_key_values
    with pytest.raises(NotApplicable, match="past_key_values"):
        run(past_key_values=cache)
