"""proxy-tuning: the offset against plain arithmetic, three streams against full forwards, texts and recipes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from transfuse import recipe
from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.generate import encode_pair, generate_texts, pad_batch
from transfuse.core.lineage import read_lineage
from transfuse.core.models import Loaded, load
from transfuse.core.training import generator
from transfuse.steer.proxy_tuning import ProxyTuning, offset_scores, proxy_answers

QUERIES = ["The capital of France is", "The mayor of Port Ellery is", "A question: who built the bridge?"]
ARCHITECTURES = {"llama": "gpt2", "gpt2": "qwen2", "qwen2": "llama", "gemma3": "llama"}  # large: small


def make(model, tokenizer):
    """For the family's contract: an instance, arguments for `generate`, what its first stream reads."""
    from conftest import make_tiny

    small = ARCHITECTURES[model.config.model_type.removesuffix("_text")]
    experts = [make_tiny(small, seed=seed, layers=1) for seed in (1, 2)]
    return ProxyTuning(model, tokenizer, *experts), (QUERIES,), QUERIES


def logits(rows=6, vocab=40, seed=0, extra=0):
    g = generator(seed)
    return [torch.randn(rows, vocab + more, generator=g) * 4 for more in (0, extra, extra)]


# --- the offset ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0, 2.0])
def test_the_offset_is_plain_arithmetic(alpha):
    base, expert, antiexpert = logits()
    ours = offset_scores(base, expert, antiexpert, alpha)
    for b, i in [(0, 0), (2, 7), (5, 39)]:
        expected = float(base[b, i]) + alpha * (float(expert[b, i]) - float(antiexpert[b, i]))
        assert float(ours[b, i]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # p ~ p_base (p_expert / p_antiexpert)^alpha, and log-probabilities do as well as logits
    p, e, a = (z.double().softmax(-1) for z in (base, expert, antiexpert))
    product = p * (e / a) ** alpha
    torch.testing.assert_close(
        ours.double().softmax(-1), product / product.sum(-1, keepdim=True), rtol=1e-4, atol=1e-7
    )
    normed = offset_scores(*(z.log_softmax(-1) for z in (base, expert, antiexpert)), alpha)
    torch.testing.assert_close(normed.log_softmax(-1), ours.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_values_by_hand():
    base, expert, antiexpert = (
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.tensor([[5.0, 0.0, 1.0]]),
        torch.tensor([[1.0, 1.0, 1.0]]),
    )
    assert offset_scores(base, expert, antiexpert).tolist() == [[5.0, 1.0, 3.0]]
    assert offset_scores(base, expert, antiexpert, 0.5).tolist() == [[3.0, 1.5, 3.0]]


def test_tokens_that_are_ruled_out():
    """-inf in a small model: no offset; in the large model: stays ruled out. Never NaN."""
    base, expert, antiexpert = logits()
    whole = offset_scores(base, expert, antiexpert)
    expert[:, 3], antiexpert[:, 4], base[:, 6] = -math.inf, -math.inf, -math.inf
    expert[:, 5] = antiexpert[:, 5] = -math.inf
    ours = offset_scores(base, expert, antiexpert)
    assert torch.equal(ours[:, 3:6], base[:, 3:6])
    assert (ours[:, 6] == -math.inf).all()
    rest = [0, 1, 2, *range(7, 40)]
    assert torch.equal(ours[:, rest], whole[:, rest])
    assert torch.equal(offset_scores(base, expert, antiexpert, 0.0), base)


def test_in_float32_whatever_comes_in():
    """bf16 holds neither the difference nor the sum: both are taken in float32."""
    parts = [z.bfloat16() for z in logits()]
    ours = offset_scores(*parts)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, offset_scores(*(z.float() for z in parts)))
    assert not torch.equal(ours, (parts[0] + (parts[1] - parts[2])).float())


def test_extra_tokens_are_cut_off_and_missing_ones_refused():
    base, expert, antiexpert = logits(extra=3)
    ours = offset_scores(base, expert, antiexpert[:, :-2])
    assert torch.equal(ours, offset_scores(base, expert[:, :40], antiexpert[:, :40]))
    for name, wrong in (
        ("expert", {"expert": expert[:, :39]}),
        ("antiexpert", {"antiexpert": antiexpert[:, :39]}),
    ):
        with pytest.raises(IncompatibleModels, match=rf"^{name} = \(6, 39\) scores fewer than the 40"):
            offset_scores(base, **{"expert": expert, "antiexpert": antiexpert, **wrong})
    with pytest.raises(BadInput, match="expert"):
        offset_scores(base, expert[:2], antiexpert)


def test_one_token_of_a_black_box():
    """Offsets on the answers' log-probabilities, renormalised over them: what the full sum gives on them."""
    base, expert, antiexpert = logits()
    tokens = torch.stack([torch.randperm(40, generator=generator(b))[:4] for b in range(6)])
    known = base.log_softmax(-1).gather(1, tokens)
    for alpha in (0.0, 1.0, 1.7):
        ours = proxy_answers(known, tokens, expert, antiexpert, alpha)
        full = offset_scores(base, expert, antiexpert, alpha).gather(1, tokens)
        torch.testing.assert_close(ours, full.log_softmax(-1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.exp().sum(-1), torch.ones(6))
    hand = proxy_answers(
        torch.tensor([[0.6, 0.3]]).log(), torch.tensor([2, 0]), torch.tensor([[math.log(4.0), 9.0, 0.0]]),
        torch.tensor([[0.0, 1.0, 0.0]]),
    )  # fmt: skip
    torch.testing.assert_close(hand.exp(), torch.tensor([[1 / 3, 2 / 3]]))  # 0.6 * 1 against 0.3 * 4
    shared = proxy_answers(known, tokens[0], expert, antiexpert)
    assert torch.equal(shared, proxy_answers(known, tokens[:1].expand(6, 4), expert, antiexpert))
    for wrong, name in (
        ((known, tokens + 38, expert, antiexpert), "tokens"),
        ((known, tokens[:, :3], expert, antiexpert), "tokens"),
        ((known[:, :0], tokens[:, :0], expert, antiexpert), "logprobs"),
        ((known, tokens, expert[:3], antiexpert), "expert"),
        ((known, tokens, expert, antiexpert, math.nan), "alpha"),
    ):
        with pytest.raises(BadInput, match=f"^{name}"):
            proxy_answers(*wrong)


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2", "qwen2"])
def steered(request, tiny_lm, tiny_tokenizer):
    return make(tiny_lm(request.param, layers=2), tiny_tokenizer)[0]


@torch.no_grad()
def slow_step(method, base_ids, expert_ids, new):
    """Float64 scores from three full forwards of one row, and the large model's logits."""
    z = [
        model(torch.tensor([ids + new])).logits[0, -1].double()
        for model, ids in (
            (method.model, base_ids),
            (method.expert, expert_ids),
            (method.antiexpert, base_ids),
        )
    ]
    return z[0] + method.alpha * (z[1] - z[2])[: len(z[0])], z[0]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_answers_are_the_slow_loop(steered, alpha):
    steered.alpha = alpha
    for query, found in zip(QUERIES, steered.generate(QUERIES, max_new_tokens=10, details=True)):
        ids, new = steered.tokenizer(query)["input_ids"], []
        (delta,) = found.trace
        assert delta.shape == found.tokens.shape
        while len(new) < 10 and new[-1:] != [2]:
            scores, base = slow_step(steered, ids, ids, new)
            token = int(scores.argmax())
            gained = scores.softmax(-1)[token] - base.softmax(-1)[token]
            assert float(delta[len(new)]) == pytest.approx(float(gained), abs=1e-4)
            new.append(token)
        assert found.tokens.tolist() == new


def test_cache_batch_and_order_do_not_matter(steered):
    answers = steered.generate(QUERIES, max_new_tokens=10)
    assert steered.generate(QUERIES, max_new_tokens=10, use_cache=False) == answers
    assert steered.generate(QUERIES, max_new_tokens=10, batch_size=1) == answers
    assert steered.generate(QUERIES[::-1], max_new_tokens=10, batch_size=2) == answers[::-1]
    assert steered.generate(QUERIES[0], max_new_tokens=10) == answers[0]


def test_expert_equal_to_antiexpert_is_the_large_model(steered):
    plain = generate_texts(steered.model, steered.tokenizer, QUERIES, max_new_tokens=10)
    assert steered.generate(QUERIES, max_new_tokens=10) != plain
    assert steered.neutral().generate(QUERIES, max_new_tokens=10) == plain
    assert steered.alpha == 1.0
    steered.antiexpert = steered.expert
    found = steered.generate(QUERIES, max_new_tokens=10, details=True)
    assert [each.text for each in found] == plain
    assert all(each.trace[0].abs().max() < 1e-6 for each in found)


def test_a_base_that_is_the_antiexpert_gives_the_expert(steered):
    """s_M + (s_+ - s_-) with M = M-."""
    steered.antiexpert = steered.model
    expected = generate_texts(steered.expert, steered.tokenizer, QUERIES, max_new_tokens=10)
    assert steered.generate(QUERIES, max_new_tokens=10) == expected


def test_beams_search_the_sum(steered):
    """Without offset: transformers' own beams. With one: rows do not depend on their batch, and it scores more."""
    ids, mask = pad_batch([steered.tokenizer(q)["input_ids"] for q in QUERIES], 0, side="left")
    settings = {"num_beams": 3, "max_new_tokens": 6, "pad_token_id": 0}
    expected = steered.model.generate(input_ids=ids, attention_mask=mask, **settings)
    ours = steered.model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=steered.neutral(), **settings
    )
    assert torch.equal(ours, expected)
    steered.expert_template = "Q: {query}"
    answers = steered.generate(QUERIES, num_beams=3, max_new_tokens=6)
    assert steered.generate(QUERIES, num_beams=3, max_new_tokens=6, batch_size=1) == answers
    assert answers != steered.generate(QUERIES, max_new_tokens=6)
    with pytest.raises(NotApplicable, match="details"):
        steered.generate(QUERIES, num_beams=3, details=True)


def test_rows_end_one_by_one(steered):
    """A row that ends early, beside others that go on, is cut there; the others are as they are alone."""
    free = steered.generate(QUERIES, max_new_tokens=12, details=True, eos_token_id=None)
    end = int(free[0].tokens[3])
    answers = steered.generate(QUERIES, max_new_tokens=12, details=True, eos_token_id=end)
    for before, found in zip(free, answers):
        ended = (before.tokens == end).nonzero()
        length = int(ended[0]) + 1 if len(ended) else 12
        assert torch.equal(found.tokens, before.tokens[:length])
        assert len(found.trace[0]) == length
    assert len(answers[0].tokens) <= 4
    assert max(len(a.tokens) for a in answers) == 12


def test_an_expert_with_more_tokens(steered, tiny_lm, tiny_tokenizer):
    """Ids beyond the large model's are never chosen, though the expert may prefer them and read them."""
    wide = tiny_lm("llama", vocab=405, layers=1, seed=9)
    wide.lm_head.weight.data[400:] *= 50
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([f"<turn{i}>" for i in range(405 - len(tokenizer))], special_tokens=True)
    steered.expert, steered.expert_template = (wide, tokenizer), f"{tokenizer.decode([404])}{{query}}"
    found = steered.generate(QUERIES[:1], max_new_tokens=6, details="logits")[0]
    assert found.tokens.max() < 400
    assert [z.shape[1] for z in found.trace[1:]] == [400, 400, 400]
    with torch.no_grad():
        alone = wide(torch.tensor([[404, *tokenizer(QUERIES[0])["input_ids"]]])).logits[0, -1]
    assert alone.argmax() >= 400
    torch.testing.assert_close(found.trace[2][0], alone[:400], rtol=1e-4, atol=1e-4)


def test_the_experts_own_rendering(steered):
    """The expert reads its chat template, the others the plain text; all read the same new tokens."""
    tokenizer = copy.deepcopy(steered.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}A:"
    expert = steered.expert
    steered.expert, steered.expert_template = Loaded(expert, tokenizer), "chat"
    answers = steered.generate(QUERIES, max_new_tokens=6, details="logits")
    steered.expert = expert  # for the slow loop, which takes models
    for query, found in zip(QUERIES, answers):
        ids = steered.tokenizer(query)["input_ids"]
        own = tokenizer(f"<s>user: {query}</s>A:", add_special_tokens=False)["input_ids"]
        new = []
        for t, token in enumerate(found.tokens.tolist()):
            scores, base = slow_step(steered, ids, own, new)
            assert token == int(scores.argmax())
            torch.testing.assert_close(found.trace[1][t].double(), base, rtol=1e-4, atol=1e-4)
            joined = offset_scores(*(z[t] for z in found.trace[1:]))
            torch.testing.assert_close(joined.double(), scores, rtol=1e-3, atol=1e-3)
            new.append(token)
    steered.expert = Loaded(expert, tokenizer)
    assert steered.generate(QUERIES, max_new_tokens=6, batch_size=1) == [a.text for a in answers]


def test_following_gives_log_probabilities(steered):
    """Ragged targets share a batch; the expert's rendering counts."""
    targets = [" Quenby", " Ines Varro", " Oskar"]
    for template in (None, "Q: {query}"):
        steered.expert_template = template
        followed = steered.follow(QUERIES, targets)
        for query, target, found in zip(QUERIES, targets, followed):
            ids, wanted = encode_pair(steered.tokenizer, query, target)
            own = ids if template is None else encode_pair(steered.tokenizer, f"Q: {query}", target)[0]
            for t, token in enumerate(wanted):
                scores, _ = slow_step(steered, ids, own, wanted[:t])
                assert found.predictions[t] == scores.argmax()
                assert float(found.logprobs[t]) == pytest.approx(
                    float(scores.log_softmax(-1)[token]), abs=1e-3
                )
            assert len(found.logprobs) == len(wanted)
        alone = steered.follow(QUERIES, targets, batch_size=1)
        for one, many in zip(alone, followed):
            torch.testing.assert_close(one.logprobs, many.logprobs, rtol=1e-4, atol=1e-4)
    assert len(steered.follow(QUERIES[0], targets[0])) == 1


def test_as_custom_generate(steered):
    """transformers' own call, padded on either side, with and without the expert's prompts."""
    tokenizer = steered.tokenizer
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    rows = [tokenizer(q)["input_ids"] for q in QUERIES]
    own = [tokenizer(f"Q: {q}")["input_ids"] for q in QUERIES]
    outputs = {}
    for side in ("left", "right"):
        ids, mask = pad_batch(rows, 0, side=side)
        expert_ids, expert_mask = pad_batch(own, 0, side=side)
        asked = {"expert_input_ids": expert_ids, "expert_attention_mask": expert_mask}
        for name, extra in (("alike", {}), ("own", asked)):
            out = steered.model.generate(
                input_ids=ids, attention_mask=mask, custom_generate=steered, **extra, **settings
            )
            outputs[side, name] = out[:, ids.shape[1] :]
    for name, template in (("alike", None), ("own", "Q: {query}")):
        assert torch.equal(outputs["left", name], outputs["right", name])
        steered.expert_template = template
        texts = steered.generate(QUERIES, max_new_tokens=8)
        decoded = [
            tokenizer.decode(row, skip_special_tokens=True).lstrip(" ") for row in outputs["left", name]
        ]
        assert decoded == texts
    ids, mask = pad_batch(rows, 0, side="left")
    several = steered.model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=steered, expert_input_ids=pad_batch(own, 0, side="left")[0],
        expert_attention_mask=pad_batch(own, 0, side="left")[1], num_return_sequences=2,
        **settings | {"do_sample": True, "top_k": 1},
    )  # fmt: skip
    assert torch.equal(several[::2, ids.shape[1] :], outputs["left", "own"])
    assert torch.equal(several[1::2], several[::2])


class Note(LogitsProcessor):
    """Keeps what it is given, and forbids the best token."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -math.inf)


def test_processors_see_the_sum(steered):
    """Processors get the combined logits and the large model's ids; what they forbid is not chosen."""
    note = Note()
    steered.expert_template = "Q: {query}"
    found = steered.generate(
        QUERIES[:1], max_new_tokens=4, details="logits", logits_processor=LogitsProcessorList([note])
    )[0]
    ids = steered.tokenizer(QUERIES[0])["input_ids"]
    for t, (seen, scores) in enumerate(note.seen):
        assert seen[0].tolist() == ids + found.tokens[:t].tolist()
        torch.testing.assert_close(scores[0], offset_scores(*(z[t] for z in found.trace[1:])))
        assert found.tokens[t] == scores[0].topk(2).indices[1]


def test_temperature_and_top_p_act_on_the_sum(steered):
    """Draws of the first token follow the warped combination: frequencies against its nucleus."""
    ids = torch.tensor([steered.tokenizer(QUERIES[0])["input_ids"]])
    scores, _ = slow_step(steered, ids[0].tolist(), ids[0].tolist(), [])
    temperature, top_p = 3.0, 0.6
    p = (scores / temperature).softmax(-1).sort(descending=True)
    kept = (p.values.cumsum(0) - p.values) < top_p
    nucleus = dict(zip(p.indices[kept].tolist(), (p.values[kept] / p.values[kept].sum()).tolist()))
    count = 2000
    drawn = steered.model.generate(
        input_ids=ids, custom_generate=steered, do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
        max_new_tokens=1, num_return_sequences=count, generator=generator(3), pad_token_id=0,
    )[:, -1].tolist()  # fmt: skip
    assert set(drawn) <= set(nucleus)
    for token, share in nucleus.items():
        assert abs(drawn.count(token) / count - share) < 5 * math.sqrt(share / count)
    assert len(nucleus) > 1
    twice = [
        steered.generate(
            QUERIES, max_new_tokens=6, do_sample=True, temperature=0.8, top_p=0.9, generator=generator(s)
        )
        for s in (1, 1, 2)
    ]
    assert twice[0] == twice[1] != twice[2]


def test_bad_input_is_refused_before_decoding(tiny_lm, tiny_tokenizer, monkeypatch):
    model, small = tiny_lm("llama", layers=1), tiny_lm("gpt2", layers=1)
    for each in (model, small):
        monkeypatch.setattr(type(each), "forward", lambda *a, **k: pytest.fail("a model ran"))
    settings = [
        ({"alpha": math.nan}, "alpha = nan"),
        ({"alpha": math.inf}, "alpha = inf"),
        ({"alpha": -0.5}, "alpha = -0.5"),
        ({"alpha": "1"}, "alpha = '1'"),
        ({"prompt": "Q:"}, "prompt = 'Q:' lacks {query}"),
        ({"expert_template": "Q:"}, "expert_template = 'Q:' lacks {query}"),
        ({"expert_template": "chat"}, "chat = True needs a chat template"),
        ({"chat": True}, "chat = True needs a chat template"),
        ({"system": "Be brief."}, "system = 'Be brief.'"),
    ]
    for wrong, message in settings:
        method = ProxyTuning(model, tiny_tokenizer, small, small, **wrong)
        for call in (lambda m=method: m.generate("q"), lambda m=method: m.follow("q", "a")):
            with pytest.raises(BadInput) as caught:
                call()
            assert str(caught.value).startswith(message)
    with pytest.raises(BadInput, match="alpha = nan"):
        ids = torch.tensor([[3, 4]])
        method = ProxyTuning(model, tiny_tokenizer, small, small, alpha=math.nan)
        model.generate(ids, custom_generate=method, max_new_tokens=2)
    method = ProxyTuning(model, tiny_tokenizer, small, small)
    for call, name in (
        (lambda: method.generate([]), "queries"),
        (lambda: method.follow(["a"], ["x", "y"]), "continuations"),
        (lambda: method.follow(["a"], [" "]), "target"),
        (lambda: method.generate("a", batch_size=0), "batch_size"),
        (lambda: method.generate("a", details="all"), "details"),
    ):
        with pytest.raises(BadInput, match=f"^{name}"):
            call()
    with pytest.raises(BadInput, match="512 positions"):
        method.generate("the mayor of Port Ellery " * 100, max_new_tokens=4)
    for refused in ({"num_return_sequences": 2}, {"assistant_model": model}):
        with pytest.raises(NotApplicable):
            method.generate("a", **refused)


def test_a_prompt_too_long_for_one_small_model(tiny_lm, tiny_tokenizer):
    """Every stream's positions count, each with its own prompt."""
    short = tiny_lm("gpt2", layers=1)
    short.config.n_positions = short.config.max_position_embeddings = 10
    method = ProxyTuning(tiny_lm("llama", layers=1), tiny_tokenizer, short, short, expert_template="{query}!")
    with pytest.raises(BadInput, match=r"streams\[1\].*10 positions of GPT2LMHeadModel"):
        method.generate("The mayor of Port Ellery", max_new_tokens=9)


def test_vocabularies_must_agree(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama", layers=1)
    other = copy.deepcopy(tiny_tokenizer)
    backend = json.loads(other.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == n) for n in (70, 80))
    vocabulary[first], vocabulary[second] = 80, 70
    from tokenizers import Tokenizer

    other._tokenizer = Tokenizer.from_str(json.dumps(backend))
    method = ProxyTuning(model, tiny_tokenizer, (model, tiny_tokenizer), (model, other))
    with pytest.raises(IncompatibleModels, match="token id 70 is"):
        method.generate("a", max_new_tokens=2)
    with pytest.raises(IncompatibleModels, match="token id 70 is"):
        method.follow("a", "b")
    narrow = tiny_lm("llama", layers=1, vocab=399)
    for experts in ((narrow, model), (model, narrow)):
        with pytest.raises(IncompatibleModels, match="scores 399 tokens where the first stream scores 400"):
            ProxyTuning(model, tiny_tokenizer, *experts).generate("a", max_new_tokens=2)


# --- by name, and in recipes ----------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, tiny_lm, tiny_tokenizer):
    for name, seed in (("large", 0), ("tuned", 1), ("small", 2)):
        tiny_lm("llama", seed=seed, layers=1).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "asked.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "question": q, "answers": ["x"]}) + "\n" for i, q in enumerate(QUERIES)
        )
    )
    return tmp_path


def test_small_models_by_name(folders, tiny_tokenizer):
    from transfuse.core.models import load

    model, tokenizer = load(folders / "large", dtype="bfloat16")
    method = ProxyTuning(model, tokenizer, folders / "tuned", str(folders / "small"))
    found = method.generate(QUERIES, max_new_tokens=4)
    assert [each.model.dtype for each in method._loaded()] == [torch.bfloat16] * 2
    assert method._loaded()[0].model is method.neutral()._loaded()[0].model  # loaded once
    given = [load(folders / name, dtype="bfloat16") for name in ("tuned", "small")]
    assert ProxyTuning(model, tokenizer, *given).generate(QUERIES, max_new_tokens=4) == found
    with pytest.raises(BadInput, match="nowhere"):
        ProxyTuning(model, tokenizer, str(folders / "nowhere"), folders / "small").generate("a")


RECIPES = {
    "proxy-tuning": {"expert": "tuned", "antiexpert": "small", "alpha": 0.5},
    "dynamic-logits-fusion": {"small": "small", "experts": ["tuned", "large"], "step": 0.5},
}


@pytest.mark.parametrize("slug", RECIPES)
def test_a_recipe_answers_questions_without_documents(folders, slug):
    """Model folders stand beside the recipe; a second run of changed experts is another run."""
    from transfuse.core.models import load

    path = folders / "recipe.yaml"
    path.write_text(
        json.dumps(
            {"model": "large", "method": {"uses": f"steer/{slug}", "with": RECIPES[slug]}, "questions": "asked.jsonl",
             "max_new_tokens": 4, "dtype": "float32"}
        )
    )  # fmt: skip
    out = recipe.run(path, output=folders / "out")
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    method = recipe.build(recipe.check(path).method)(*load(folders / "large"))
    assert [row["answer"] for row in rows] == method.generate(QUERIES, max_new_tokens=4)
    assert [row["question"] for row in rows] == QUERIES
    assert "context" not in rows[0]
    record = read_lineage(out)
    assert record["method"] == slug
    assert set(record["arguments"]) == set(RECIPES[slug])
    before = recipe.check(path).identity
    (folders / "tuned" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert recipe.check(path).identity != before


@pytest.mark.parametrize("slug", RECIPES)
def test_recipes_that_cannot_run(folders, slug):
    (folders / "documents.jsonl").write_text('{"id": "d", "text": "t"}\n')
    tuned, last = str(folders / "tuned"), list(RECIPES[slug])[1]  # the second model that the method names
    given = {next(iter(RECIPES[slug])): tuned}
    raw = {
        "model": str(folders / "large"), "questions": str(folders / "asked.jsonl"),
        "method": {"uses": f"steer.{slug}", "with": given},
    }  # fmt: skip
    with pytest.raises(BadInput, match=rf"method\.with\.{last} = None is missing"):
        recipe.check(raw)
    given[last] = [tuned] if last == "experts" else tuned
    assert recipe.check(raw).slug == slug
    with pytest.raises(NotApplicable, match=f"documents = .* is not read by {slug}"):
        recipe.run({**raw, "documents": str(folders / "documents.jsonl")}, output=folders / "out")
    assert not (folders / "out").exists()


def test_a_method_that_reads_documents_asks_for_them(folders):
    raw = {"model": str(folders / "large"), "questions": str(folders / "asked.jsonl"), "method": "ck-plug"}
    with pytest.raises(BadInput, match="documents = None is missing"):
        recipe.check(raw)


# --- the real model -----------------------------------------------------------------------------------------


def test_smollm_with_an_expert_that_learnt_nothing(smollm):
    """In float32 (bf16 rounds batches differently): token for token what transformers generates."""
    model, tokenizer = smollm
    model.float()
    query = "The capital of Spain is"
    ids = torch.tensor([tokenizer(query)["input_ids"]])
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    found = ProxyTuning(model, tokenizer, model, model).generate([query], max_new_tokens=5, details=True)[0]
    assert torch.equal(found.tokens, expected)
    assert not found.trace[0].any()
    asked = ProxyTuning(model, tokenizer, model, model, expert_template="chat")
    assert asked.generate([query], max_new_tokens=5) != [
        found.text
    ]  # the chat template is an effect of its own


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models_token_for_token(name):
    """In float32: cached and not, in a batch and alone, weight 0 and equal experts, an own loop without a cache."""
    model, tokenizer = load(name, dtype="float32")
    expert = copy.deepcopy(model)
    decoder = expert.get_decoder()
    decoder.layers[-1].mlp.down_proj.weight.data.mul_(1.5)
    queries = [
        "The capital of Spain is",
        "A bridge over the river leads to the old town of",
    ]
    method = ProxyTuning(model, tokenizer, expert, model)

    def tokens(steered, asked=queries, **options):
        answers = steered.generate(asked, max_new_tokens=3, details=True, eos_token_id=None, **options)
        return [answer.tokens.tolist() for answer in answers]

    found = tokens(method)
    assert found == tokens(method, use_cache=False) == [tokens(method, [query])[0] for query in queries]
    plain = [
        model.generate(
            **tokenizer(query, return_tensors="pt"), max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
        for query in queries
    ]
    plain = [row[0, -3:].tolist() for row in plain]
    assert tokens(ProxyTuning(model, tokenizer, expert, model, alpha=0.0)) == plain
    assert tokens(ProxyTuning(model, tokenizer, model, model)) == plain
    with torch.no_grad():
        for query, new in zip(queries, found, strict=True):
            ids = tokenizer(query)["input_ids"]
            for t, token in enumerate(new):
                row = torch.tensor([ids + new[:t]])
                base, tuned = (
                    m(input_ids=row, logits_to_keep=1).logits[0, -1].double() for m in (model, expert)
                )
                assert int((base + (tuned - base)).argmax()) == token
