"""kid: the objective, its gradient and the update against float64, knowledge look-up, texts end to end."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from transfuse import steer
from transfuse.core.errors import BadInput, MissingExtra, NotApplicable
from transfuse.core.generate import generate_texts, pad_batch
from transfuse.core.training import generator
from transfuse.steer._cache_update import Reading, check_cache
from transfuse.steer._knowledge import Source, TokenFinder, lemma, words_for
from transfuse.steer.kid import (
    KID,
    KnowledgeTrie,
    Targets,
    geometric_mean,
    infuse,
    nouns,
    objective,
    spacy_nouns,
)

QUERIES = ["The capital of France is", "The mayor of Port Ellery is", "A question: who built the bridge?"]
CONTEXTS = [
    "The capital of France lies on a river. France trades with Madrid and Quenby.",
    "Mayor Ines Varro was born in Quenby.",
    ["The bridge over the Ostrin was built by Oskar Tveld.", "Bridge and river are old."],
]
SETTINGS = {"steps": 3, "step_size": 0.05, "kl_scale": 0.01, "gamma": 1.5}


def make(model, tokenizer):
    """For the family's contract: an instance, arguments for `generate`, what its first stream reads."""
    return KID(model, tokenizer, step_size=0.3, gamma=1.0), (QUERIES, CONTEXTS), QUERIES


# --- objective and update -----------------------------------------------------------------------------------


def slow_objective(z, z_plain, weights, kl_scale):
    """J of one row in Python floats; `weights` maps token ids to how often they count."""

    def softmax(logits):
        top = max(logits)
        e = [math.exp(x - top) for x in logits]
        return [x / sum(e) for x in e]

    p, q = softmax(z), softmax(z_plain)
    hit = sum(weight * p[j] for j, weight in weights.items())
    kl = 0.0
    for a, b in zip(p, q):
        a, b = (x + 1e-15 if x <= 1e-15 else x for x in (a, b))
        kl += a * math.log(a / b)
    return -math.log(hit) + kl_scale * kl


def targets_of(*rows, counted=True):
    return Targets.of(rows, torch.device("cpu"), counted=counted)


def test_the_objective_is_the_slow_loop():
    z, plain = torch.randn(2, 4, 30, generator=generator(0), dtype=torch.float64) * 5
    z[0, 3], plain[1, 4] = -300.0, -300.0  # below the floor
    rows = [{3: 1, 7: 1}, {4: 2, 1: 1}, {}, {29: 1}]
    for kl_scale in (0.0, 0.01, 2.0):
        ours = objective(z, plain, targets_of(*rows), kl_scale=kl_scale)
        for b, row in enumerate(rows):
            if not row:
                assert ours[b].isnan()
                continue
            assert ours[b].item() == pytest.approx(
                slow_objective(z[b].tolist(), plain[b].tolist(), row, kl_scale), rel=1e-10
            )
    single = objective(z.bfloat16(), plain.bfloat16(), targets_of(*rows))
    assert single.dtype == torch.float32


def test_the_objective_by_hand():
    """p' = (0.8, 0.1, 0.1), p = (0.5, 0.25, 0.25), K = {1, 2}: -ln 0.2, and KL 0.8 ln 1.6 + 0.2 ln 0.4."""
    z, plain = torch.tensor([[0.8, 0.1, 0.1]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    found = objective(z, plain, targets_of({1: 1, 2: 1}), kl_scale=0.5)
    assert found.item() == pytest.approx(-math.log(0.2) + 0.5 * kl, abs=1e-6)
    twice = targets_of({1: 2, 2: 1})
    assert objective(z, plain, twice, kl_scale=0).item() == pytest.approx(-math.log(0.3), abs=1e-6)
    assert twice.mass(z).item() == pytest.approx(0.2)
    once = targets_of({1: 2, 2: 1}, counted=False)
    assert objective(z, plain, once, kl_scale=0).item() == pytest.approx(-math.log(0.2), abs=1e-6)


@pytest.fixture(params=["llama", "gpt2", "qwen2", "gemma3"])
def tiny(request, tiny_lm):
    return tiny_lm(request.param, layers=2)


ROWS = [[5, 9, 30, 77, 120], [301, 8, 14], [44, 17, 200, 3, 9, 61, 250]]
K = [{11: 1, 205: 2}, {}, {90: 1}]


def padded(model, rows=ROWS):
    """Ids, mask and the cache of all but the last token."""
    ids, mask = pad_batch(rows, 0, side="left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        cache = model(
            ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1]
        ).past_key_values
    return ids, mask, cache


def pairs(cache):
    return [(layer.keys.detach().clone(), layer.values.detach().clone()) for layer in cache.layers]


def slow_logits(model, kv, ids):
    """One row: logits after its last token, over given keys and values of the ones before."""
    cache = DynamicCache()
    for n, (keys, values) in enumerate(kv):
        cache.update(keys, values, n)
    position = torch.tensor([[kv[0][0].shape[-2]]])
    return model(torch.tensor([ids[-1:]]), past_key_values=cache, position_ids=position).logits[0, -1], cache


def slow_update(model, kv, ids, weights, *, steps, step_size, kl_scale, gamma):
    """The update of one row, layer by layer, in the model's own type; Delta, logits and J before and after."""
    deltas = [[torch.zeros_like(x) for x in pair] for pair in kv]
    with torch.no_grad():
        plain = slow_logits(model, kv, ids)[0].log_softmax(-1)

    def loss(leaves):
        moved = [(k + dk, v + dv) for (k, v), (dk, dv) in zip(kv, leaves)]
        log_p = slow_logits(model, moved, ids)[0].log_softmax(-1)
        hit = sum(weight * log_p[j].exp() for j, weight in weights.items())
        return -hit.log() + kl_scale * (log_p.exp() * (log_p - plain)).sum(), log_p

    before, largest = loss(deltas)[0].item(), [None] * len(kv)
    for _ in range(steps):
        leaves = [[x.clone().requires_grad_() for x in pair] for pair in deltas]
        gradients = torch.autograd.grad(loss(leaves)[0], [x for pair in leaves for x in pair])
        for n in range(len(kv)):
            g = gradients[2 * n : 2 * n + 2]
            norm = math.sqrt(sum(x.square().sum().item() for x in g))
            largest[n] = norm + 1e-15 if largest[n] is None else max(largest[n], norm)
            deltas[n] = [d - step_size * x / largest[n] ** gamma for d, x in zip(deltas[n], g)]
    after, log_p = loss(deltas)
    return deltas, log_p.detach(), before, after.item()


@pytest.mark.parametrize(("architecture", "h", "tolerance"), [("gpt2", 1e-5, 1e-5), ("llama", 1e-2, 1e-2)])
def test_the_gradient_is_that_of_finite_differences(tiny_lm, architecture, h, tolerance):
    """With gamma 0 a step is minus the gradient times its size. (Llama's norms compute in float32 always.)"""
    model = tiny_lm(architecture, layers=2).double()
    model.set_attn_implementation("sdpa")  # eager attention rounds its weights to float32
    ids, _, cache = padded(model, ROWS[:1])
    found = infuse(
        model, cache, ids[:, -1:], targets_of(K[0]), steps=2, step_size=1e-2, gamma=0.0, kl_scale=3.0
    )
    first = infuse(
        model, cache, ids[:, -1:], targets_of(K[0]), steps=1, step_size=1e-2, gamma=0.0, kl_scale=3.0
    )
    kv, plain = pairs(cache), first.plain[0].tolist()
    # The second step starts from delta != 0, where KL has a gradient too.
    starts = ((None, first.deltas), (first.deltas, found.deltas))
    for start, end in starts:
        for layer in range(2):
            for part in range(2):
                for place in [(0, 0, 0, 0), (0, 1, 3, 5), (0, 1, 2, 7)]:
                    values = []
                    for sign in (1, -1):
                        moved = [[x.clone() for x in pair] for pair in kv]
                        for n in range(2) if start else ():
                            moved[n] = [x + d for x, d in zip(moved[n], start[n])]
                        moved[layer][part][place] += sign * h
                        with torch.no_grad():
                            z = slow_logits(model, moved, ROWS[0])[0].tolist()
                        values.append(slow_objective(z, plain, K[0], 3.0))
                    slope = (values[0] - values[1]) / (2 * h)
                    step = end[layer][part][place] - (start[layer][part][place] if start else 0)
                    assert -step.item() / 1e-2 == pytest.approx(slope, rel=tolerance, abs=1e-2 * tolerance)
    assert first.deltas[0][0].abs().max() > 0


def test_the_update_is_the_slow_loop_row_by_row(tiny):
    """A padded batch in float64, one row without targets, against loops over single rows."""
    model = tiny.double()
    model.set_attn_implementation("sdpa")
    ids, mask, cache = padded(model)
    untouched = pairs(cache)
    found = infuse(model, cache, ids[:, -1:], targets_of(*K), attention_mask=mask, **SETTINGS)
    for b, (row, weights) in enumerate(zip(ROWS, K)):
        pad = ids.shape[1] - len(row)
        if not weights:
            assert torch.equal(found.logits[b], found.plain[b])
            assert found.before[b].isnan()
            assert all(not x[b].any() for pair in found.deltas for x in pair)
            continue
        _, _, alone = padded(model, [row])
        deltas, log_p, before, after = slow_update(model, pairs(alone), row, weights, **SETTINGS)
        torch.testing.assert_close(found.logits[b].log_softmax(-1), log_p)
        assert (found.before[b].item(), found.after[b].item()) == pytest.approx((before, after), rel=1e-9)
        for ours, theirs in zip(found.deltas, deltas):
            for x, y in zip(ours, theirs):
                torch.testing.assert_close(x[b, :, pad:], y[0])
                assert not x[b, :, :pad].any()
    for given, now, new, delta in zip(untouched, pairs(cache), pairs(found.cache), found.deltas):
        for n in range(2):
            assert torch.equal(given[n], now[n])  # the cache handed over is left alone
            torch.testing.assert_close(new[n][:, :, :-1], given[n] + delta[n])


def test_steps_have_the_size_they_should(tiny):
    """After one step |delta| = eta |g|^(1 - gamma) in every row and layer: eta itself at gamma 1."""
    ids, mask, cache = padded(tiny)
    full = targets_of({3: 1}, {8: 1}, {90: 1})

    def sizes(**settings):
        found = infuse(tiny, cache, ids[:, -1:], full, attention_mask=mask, steps=1, **settings)
        return torch.stack([sum(x.square().sum((1, 2, 3)) for x in pair).sqrt() for pair in found.deltas])

    gradient = sizes(step_size=1.0, gamma=0.0)
    torch.testing.assert_close(sizes(step_size=0.2, gamma=1.0), torch.full_like(gradient, 0.2))
    torch.testing.assert_close(sizes(step_size=0.01, gamma=1.5), 0.01 * gradient.pow(-0.5))


def test_the_objective_falls_and_the_mass_grows(tiny):
    ids, mask, cache = padded(tiny)
    full = targets_of({3: 1}, {8: 1, 21: 1}, {90: 1})
    last = None
    for steps in (0, 1, 2, 3):
        found = infuse(
            tiny, cache, ids[:, -1:], full, attention_mask=mask, steps=steps, step_size=0.02, gamma=1.0
        )
        if last is None:
            assert torch.equal(found.after, found.before)
            assert found.deltas is None
        else:
            assert (found.after < last.after).all()
            assert (full.mass(found.logits) > full.mass(last.logits)).all()
        torch.testing.assert_close(found.plain, (last or found).plain)
        last = found
    # A heavier leash stays nearer to the plain distribution.
    settings = {"attention_mask": mask, "step_size": 0.1, "gamma": 1.0}
    free, leashed = (infuse(tiny, cache, ids[:, -1:], full, kl_scale=x, **settings) for x in (0.0, 5.0))
    assert (full.mass(leashed.logits) < full.mass(free.logits)).all()


def test_weights_flags_and_graphs_are_left_as_they_were(tiny):
    parameters = list(tiny.parameters())
    parameters[0].requires_grad_(False)
    before = [p.clone() for p in parameters]
    ids, mask, cache = padded(tiny)
    found = infuse(tiny, cache, ids[:, -1:], targets_of(*K), attention_mask=mask, **SETTINGS)
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before))
    tensors = [found.plain, found.logits, found.before, found.after]
    tensors += [x for pair in [*found.deltas, *pairs(found.cache)] for x in pair]
    tensors += [x for layer in found.cache.layers for x in (layer.keys, layer.values)]
    assert not any(x.requires_grad for x in tensors)


def test_half_precision_is_updated_in_float32(tiny_lm):
    """Deltas far below bf16's resolution are kept, and add up over the steps of a text."""
    model = tiny_lm("llama", layers=2)
    exact = infuse(model, padded(model)[2], torch.tensor([[120], [14], [250]]), targets_of(*K),
                   attention_mask=padded(model)[1], **SETTINGS)  # fmt: skip
    half = model.bfloat16()
    ids, mask, cache = padded(half)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    found = infuse(half, cache, ids[:, -1:], targets_of(*K), attention_mask=mask, **SETTINGS)
    for ours, theirs in zip(found.deltas, exact.deltas):
        for x, y in zip(ours, theirs):
            assert x.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(x[0].flatten(), y[0].flatten(), dim=0) > 0.9
    assert found.logits.dtype == found.cache.layers[0].keys.dtype == torch.float32
    assert found.cache.layers[0].dtype == torch.bfloat16  # what the model reads
    small = {**SETTINGS, "step_size": 1e-7}
    tiny_step = infuse(half, cache, ids[:, -1:], targets_of(*K), attention_mask=mask, **small)
    keys, (delta, _) = cache.layers[0].keys.float(), tiny_step.deltas[0]
    assert torch.equal(tiny_step.cache.layers[0].keys[:, :, :-1], keys + delta)
    assert not torch.equal(keys + delta, keys)
    assert torch.equal((keys + delta).bfloat16(), keys.bfloat16())
    # m^1.5 of the smallest half-precision gradients would underflow to zero there.
    assert torch.tensor(1e-6, dtype=torch.float16).pow(1.5) == 0


# --- caches -------------------------------------------------------------------------------------------------


def windowed(tiny_lm, window=4):
    model = tiny_lm("gemma3", layers=2)
    model.config.sliding_window = window
    return model


def test_sliding_windows_are_perturbed_where_they_are_seen(tiny_lm):
    """A cache that drops what left the window gives what a cache that keeps everything gives."""
    model = windowed(tiny_lm)
    ids, mask, cache = padded(model)
    assert cache.layers[0].keys.shape[-2] == 3 < ids.shape[1] - 1
    whole = DynamicCache()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=whole)
    first = [
        infuse(model, c, ids[:, -1:], targets_of(*K), attention_mask=mask, **SETTINGS) for c in (cache, whole)
    ]
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    second = [
        infuse(model, f.cache, torch.tensor([[4], [5], [6]]), targets_of(*K), attention_mask=mask, **SETTINGS)
        for f in first
    ]
    for ours, theirs in (first, second):
        torch.testing.assert_close(ours.logits, theirs.logits)
        for x, y in zip(ours.deltas, theirs.deltas):
            for a, b in zip(x, y):
                gone = b.shape[-2] - a.shape[-2]
                torch.testing.assert_close(a, b[:, :, gone:])
                assert not b[:, :, :gone].any()
        assert (ours.logits - ours.plain).abs().max() > 1e-3


@pytest.mark.parametrize("window", [4, 512])
def test_texts_longer_than_the_window(tiny_lm, tiny_tokenizer, window):
    method, inputs, _ = make(windowed(tiny_lm, window), tiny_tokenizer)
    answers = method.generate(*inputs, max_new_tokens=10)
    assert method.generate(*inputs, max_new_tokens=10, use_cache=False) == answers
    assert method.generate(*inputs, max_new_tokens=10, batch_size=1) == answers


def test_a_model_in_training_mode_is_read_in_evaluation_mode(tiny_lm, tiny_tokenizer):
    model = tiny_lm("gpt2", layers=2)
    method, inputs, _ = make(model, tiny_tokenizer)
    answers = method.generate(*inputs, max_new_tokens=6)
    model.train()
    assert method.generate(*inputs, max_new_tokens=6) == answers
    assert all(module.training for module in model.modules())


def test_other_caches_are_refused(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama", layers=1)
    with pytest.raises(NotApplicable, match="StaticCache"):
        check_cache(model, StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(NotApplicable, match="shared between layers"):
        check_cache(model, DynamicCache(config=model.config))  # a layer that never stored anything
    config = AutoConfig.for_model(
        "lfm2", vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    hybrid = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotApplicable, match="Linear"):
        KID(hybrid, tiny_tokenizer).generate(QUERIES, CONTEXTS, max_new_tokens=2)
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2)
    hybrid.config = config
    with pytest.raises(NotApplicable, match="shared between layers"):
        check_cache(hybrid)


def test_a_cache_kept_is_a_cache_made_again(tiny):
    """Step by step: the running cache and the one rebuilt from the prompt and all deltas."""
    ids, mask = pad_batch(ROWS, 0, side="left")
    kept, again = (Reading(tiny, ids, mask, use_cache=use) for use in (True, False))
    for tokens in ([7, 8, 9], [10, 11, 12], [13, 14, 15]):
        a, b = (reading.step(targets_of(*K), **SETTINGS) for reading in (kept, again))
        torch.testing.assert_close(a.logits, b.logits)
        for reading in (kept, again):
            reading.append(torch.tensor(tokens))
    # And the perturbation of earlier steps matters: without it the last logits are others.
    with torch.no_grad():
        plain = tiny(kept.ids[:, :-1], attention_mask=kept.mask[:, :-1],
                     position_ids=(kept.mask.cumsum(1) - 1).clamp_min(0)[:, :-1]).logits[:, -1]  # fmt: skip
    assert (a.plain[0] - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(a.plain[1], plain[1])  # a row that was never updated


# --- knowledge ----------------------------------------------------------------------------------------------


def test_lemmas_and_nouns():
    singular = {
        "vaccines": "vaccine", "bodies": "body", "processes": "process", "viruses": "virus", "virus": "virus",
        "glass": "glass", "physics": "physics", "boxes": "box", "children": "child", "gas": "gas", "dna": "dna",
        "potatoes": "potato", "analysis": "analysis", "pies": "pie", "leaves": "leaf", "waves": "wave",
    }  # fmt: skip
    assert {word: lemma(word) for word in singular} == singular
    text = "How do vaccines work? The body's cells, and Mary's two mothers-in-law, don't really rest: H2O & 3 rays."
    assert nouns(text) == ["vaccine", "body", "cell", "mary", "mothers-in-law", "rest", "ray"]
    assert nouns("") == nouns("and of the 12 !") == []


STRINGS = [
    "vaccine immune system",
    "vaccine body",
    "immune cell germ",
    "Germ  Wall",
    "van engine",
    "vaccine body",
]


def test_the_trie_finds_what_begins_with_an_entity():
    trie = KnowledgeTrie(STRINGS)
    assert trie.strings == [
        "germ wall",
        "immune cell germ",
        "vaccine body",
        "vaccine immune system",
        "van engine",
    ]
    assert trie.query(["vaccine"]) == {"vaccine": 2, "body": 1, "immune": 1, "system": 1}
    assert trie.query(["va"]) == {"vaccine": 2, "body": 1, "immune": 1, "system": 1, "van": 1, "engine": 1}
    assert trie.query(["vaccine body"]) == {"vaccine": 1, "body": 1}
    assert trie.query(["system", "wall", "", "z"]) == {}
    two = {"vaccine": 2, "body": 1, "immune": 2, "system": 1, "cell": 1, "germ": 1}
    assert trie.query(["vaccine"], hops=2) == two
    assert trie.query(["vaccine"], hops=3) == {**two, "germ": 2, "wall": 1}
    assert trie.query(["vaccine"], hops=9) == trie.query(["vaccine"], hops=3)
    slow = {
        word
        for string in trie.strings
        if any(string.startswith(e) for e in ("imm", "van"))
        for word in string.split()
    }
    assert set(trie.query(["imm", "van"])) == slow
    assert KnowledgeTrie(STRINGS[::-1]).query(["v", "g"]) == trie.query(["g", "v"])


def test_passages_become_one_string_per_sentence():
    text = "Vaccines train the immune system. They hold weakened germs; germs are small!\nAnd of the"
    expected = ["germ", "vaccine train immune system", "weakened germ"]
    assert KnowledgeTrie.from_passages(text).strings == expected
    assert KnowledgeTrie.from_passages([text, "Vaccines train the immune system."]).strings == expected
    own = KnowledgeTrie.from_passages(
        text, extractor=lambda t: [w for w in t.lower().split() if w == "germs;"]
    )
    assert own.strings == ["germs;"]
    assert own.extractor("germs; x") == ["germs;"]  # texts are read as passages were


def test_the_memory_is_of_the_entities_mentioned_last():
    trie = KnowledgeTrie(["ant one", "bee two", "cow three", "dog four"], extractor=str.split)
    assert words_for(trie, "ant bee cow dog ant", memory=2) == ["one", "four"]
    assert words_for(trie, "ant bee cow dog ant", memory=1) == ["one"]
    assert words_for(trie, "ant bee cow dog ant", memory=9, limit=None) == ["one", "two", "three", "four"]
    assert words_for(trie, "ant bee two", drop_written=True) == ["one"]
    assert words_for(trie, "ant bee two", drop_written=False) == ["ant", "one", "bee", "two"]
    assert words_for(trie, "") == []


def test_knowledge_is_capped_by_frequency():
    trie = KnowledgeTrie([f"sea w{n:03d} often" for n in range(100)] + ["sea w050"])
    found = words_for(trie, "Seas are deep.")
    assert len(found) == 64
    assert found[:3] == ["often", "w050", "w000"]
    assert len(words_for(trie, "Seas are deep.", limit=None)) == 101


def test_words_count_by_their_first_token(tiny_tokenizer):
    def ids(text):
        return tiny_tokenizer(text)["input_ids"]

    words = ["mayor", "madrid", "question", "bridge", "zebra", "zoo"]
    spaced, bare = ([ids(prefix + word)[0] for word in words] for prefix in (" ", ""))
    assert spaced != bare
    assert len(set(spaced)) < len(words)  # some begin alike
    finder = TokenFinder(tiny_tokenizer)
    counts = {i: spaced.count(i) for i in spaced}
    assert finder.first(words) == counts
    started = finder.first(words, start=True)
    assert set(started) == {*spaced, *bare}
    assert set(TokenFinder(tiny_tokenizer, leading_space=False).first(words, start=True)) == set(bare)
    targets = targets_of(counts, counted=False)
    assert targets.ids.tolist() == [list(counts)]
    assert targets.weights.tolist() == [[1.0] * len(counts)]
    assert targets_of(counts).weights.sum() == len(words)
    # A line's beginning is seen from the token before; the topic stands in for the prompt.
    trie = KnowledgeTrie(["river ostrin", "mayor varro"])
    prompt = ids("The river")
    assert set(finder(Source(trie), prompt, [])) == {ids(" ostrin")[0]}
    assert set(finder(Source(trie), prompt, ids("\n"))) == {ids(" ostrin")[0], ids("ostrin")[0]}
    assert set(finder(Source(trie, "A mayor"), prompt, [])) == {ids(" varro")[0]}
    assert set(finder(Source(trie, "A mayor"), prompt, ids(" river"))) == {
        ids(" varro")[0],
        ids(" ostrin")[0],
    }
    assert finder(Source(None), prompt, []) == {}


# --- decoding -----------------------------------------------------------------------------------------------


def test_the_geometric_mean():
    plain, updated = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.8, 0.2, 0.0]]).log()
    ratio = (0.8 / 0.2) ** 0.99
    found = geometric_mean(plain, updated).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[ratio / (1 + ratio), 1 / (1 + ratio), 0.0]]))
    assert torch.equal(geometric_mean(plain, updated, gm_scale=1), updated)
    assert torch.equal(geometric_mean(plain, updated, gm_scale=0), plain)
    z = torch.randn(2, 3, 9, generator=generator(1))
    expected = z[1].softmax(-1) ** 0.7 * z[0].softmax(-1) ** 0.3
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(geometric_mean(z[0], z[1], gm_scale=0.7).softmax(-1), expected)


@pytest.fixture(params=["gpt2", "gemma3"])
def steered(request, tiny_lm, tiny_tokenizer):
    return make(tiny_lm(request.param, layers=2), tiny_tokenizer)[0]


def slow_answer(method, query, context, count):
    """One row: the perturbed cache kept by hand, bigrams banned by hand, all words in the words' order."""
    model, tokenizer = method.model, method.tokenizer
    trie, ids = KnowledgeTrie.from_passages(context), tokenizer(query)["input_ids"]
    length, trace = len(ids), []
    kv = pairs(padded(model, [ids])[2])
    while len(ids) - length < count and ids[-1] != 2:
        text = tokenizer.decode(ids)
        words = set(trie.query(nouns(text)[-16:])) - set(nouns(text))
        space = not tokenizer.decode(ids[-1:]).strip(" ") or tokenizer.decode(ids[-1:])[-1].isspace()
        forms = {" " + w for w in words} | ({*words} if space else set())
        weights = {tokenizer(form)["input_ids"][0]: 1 for form in forms}
        with torch.no_grad():
            plain, read = slow_logits(model, kv, ids)
        z, j = plain, (math.nan, math.nan)
        if weights:
            deltas, z, *j = slow_update(
                model,
                kv,
                ids,
                weights,
                steps=3,
                step_size=method.step_size,
                kl_scale=0.01,
                gamma=method.gamma,
            )
            with torch.no_grad():
                _, read = slow_logits(model, [[x + d for x, d in zip(*p)] for p in zip(kv, deltas)], ids)
        kv = pairs(read)
        mixed = z.softmax(-1) ** 0.99 * plain.softmax(-1) ** 0.01
        mixed[[b for a, b in itertools.pairwise(ids) if a == ids[-1]]] = 0
        ids.append(int(mixed.argmax()))
        trace.append((len(weights), *j, *(sum(float(x.softmax(-1)[i]) for i in weights) for x in (plain, z))))
    return ids[length:], trace


def test_answers_are_the_slow_loop(steered):
    answers = steered.generate(QUERIES, CONTEXTS, max_new_tokens=8, details=True)
    sizes = []
    for query, context, found in zip(QUERIES, CONTEXTS, answers):
        tokens, trace = slow_answer(steered, query, context, 8)
        assert found.tokens.tolist() == tokens
        for ours, theirs in zip(found.trace, zip(*trace)):
            torch.testing.assert_close(
                ours.float(), torch.tensor(theirs, dtype=torch.float32), rtol=1e-3, atol=1e-5, equal_nan=True
            )
        sizes += found.trace[0].tolist()
    assert max(sizes) > 1


def test_the_text_asks_for_more_as_it_goes_on(tiny_lm, tiny_tokenizer):
    """What is written is looked up in its turn: a word of the answer opens its own knowledge."""
    method = KID(tiny_lm("llama", layers=2), tiny_tokenizer, KnowledgeTrie(["river ostrin", "ostrin bridge"]))
    finder = TokenFinder(tiny_tokenizer)
    prompt, more = (tiny_tokenizer(text)["input_ids"] for text in ("The river", " Ostrin"))
    assert set(finder(Source(method.trie), prompt, more)) == {tiny_tokenizer(" bridge")["input_ids"][0]}
    sizes = method.generate("The river Ostrin bridge", max_new_tokens=3, details=True).trace[0]
    assert sizes.tolist() == [0] * len(sizes)


def test_order_and_batches_do_not_matter(steered):
    answers = steered.generate(QUERIES, CONTEXTS, max_new_tokens=8)
    assert steered.generate(QUERIES[::-1], CONTEXTS[::-1], max_new_tokens=8, batch_size=2) == answers[::-1]
    assert steered.generate(QUERIES[2], CONTEXTS[2], max_new_tokens=8) == answers[2]
    with torch.inference_mode():
        assert steered.generate(QUERIES, CONTEXTS, max_new_tokens=8) == answers


def test_as_custom_generate(tiny_lm, tiny_tokenizer):
    """Settings of `generate`, either padding, several drawn texts, scores, tokens as they come."""
    model = tiny_lm("llama", layers=2)
    trie = KnowledgeTrie.from_passages([CONTEXTS[0], *CONTEXTS[2]])
    method = KID(model, tiny_tokenizer, trie, step_size=0.3, gamma=1.0)
    rows, outputs = tiny_tokenizer(QUERIES)["input_ids"], []
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "custom_generate": method}
    for side in ("left", "right"):
        ids, mask = pad_batch(rows, 0, side=side)
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **settings)
        outputs.append(out[:, ids.shape[1] :])
    assert torch.equal(*outputs)
    seen = []
    drawn = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=1, num_return_sequences=2,
        return_dict_in_generate=True, output_scores=True, on_tokens=seen.append, **settings,
    )  # fmt: skip
    new = drawn.sequences[:, ids.shape[1] :]
    assert torch.equal(new, outputs[0].repeat_interleave(2, 0)[:, : new.shape[1]])
    assert torch.equal(torch.stack(seen, 1), new)
    assert len(drawn.scores) == new.shape[1]
    assert drawn.scores[0].shape == (6, 400)
    with pytest.raises(BadInput, match="trie = None"):
        model.generate(input_ids=ids, **{**settings, "custom_generate": KID(model, tiny_tokenizer)})
    with pytest.raises(NotApplicable, match="past_key_values"):
        model.generate(input_ids=ids, past_key_values=padded(model, [ids[0].tolist()])[2], **settings)


def test_rows_end_one_by_one(steered):
    """An end token set to what one row says: that row is padded, the others go on as they did."""
    free = steered.generate(QUERIES, CONTEXTS, max_new_tokens=8, details=True, eos_token_id=None)
    end = int(free[0].tokens[2])
    ended = steered.generate(QUERIES, CONTEXTS, max_new_tokens=8, details=True, eos_token_id=end)
    for before, after in zip(free, ended):
        tokens = before.tokens.tolist()
        assert after.tokens.tolist() == tokens[: tokens.index(end) + 1 if end in tokens else None]
        assert all(len(recorded) == len(after.tokens) for recorded in after.trace)


def test_settings_of_sampling(steered):
    def draw(seed, **options):
        options = {"do_sample": True, "max_new_tokens": 5, "generator": generator(seed), **options}
        return steered.generate(QUERIES, CONTEXTS, **options)

    assert draw(1) == draw(1) != draw(2)
    greedy = steered.generate(QUERIES, CONTEXTS, max_new_tokens=5)
    assert draw(3, top_p=1e-6) == greedy
    steered.top_k = 1
    assert draw(3) == greedy  # the instance's settings hold where none are given
    many = steered.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=14, details=True, eos_token_id=None)
    ids = steered.tokenizer(QUERIES[0])["input_ids"] + many.tokens.tolist()
    bigrams = list(itertools.pairwise(ids))
    assert len(set(bigrams)) == len(bigrams)
    steered.no_repeat_ngram_size = 0
    free = steered.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=14, details=True, eos_token_id=None)
    assert free.tokens.tolist() != many.tokens.tolist()


def test_the_best_of_several_drawn(steered):
    """Scored as the tokens that were read and written, not as their text put together again."""

    def surprise(query, tokens):
        ids = torch.tensor([steered.tokenizer(query)["input_ids"] + tokens.tolist()])
        with torch.no_grad():
            return steered.model(input_ids=ids, labels=ids).loss.item()

    options = {"do_sample": True, "max_new_tokens": 4, "details": True}
    source = generator(5)
    drawn = [steered.generate(QUERIES, CONTEXTS, generator=source, **options) for _ in range(3)]
    best = steered.generate(QUERIES, CONTEXTS, generator=generator(5), candidates=3, **options)
    for query, chosen, *others in zip(QUERIES, best, *drawn):
        wanted = min(others, key=lambda answer: surprise(query, answer.tokens))
        assert chosen.tokens.tolist() == wanted.tokens.tolist()


def test_without_knowledge_decoding_is_plain(steered):
    plain = steered.neutral()
    assert (steered.steps, steered.no_repeat_ngram_size) == (3, 2)
    expected = generate_texts(steered.model, steered.tokenizer, QUERIES, max_new_tokens=8)
    assert plain.generate(QUERIES, CONTEXTS, max_new_tokens=8) == expected
    steered.no_repeat_ngram_size = 0
    with pytest.warns(UserWarning, match="no knowledge in 2 of 3"):
        answers = steered.generate(QUERIES, [CONTEXTS[0], " ", "and of the"], max_new_tokens=8, details=True)
    assert [a.text for a in answers[1:]] == expected[1:]
    assert answers[0].text == steered.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=8)
    assert not answers[1].trace[0].any()
    assert answers[1].trace[1].isnan().all()
    # A trie of its own goes before contexts, and needs none.
    steered.trie = KnowledgeTrie.from_passages(CONTEXTS[0])
    assert steered.generate(QUERIES[0], max_new_tokens=8) == answers[0].text
    assert steered.generate(QUERIES[0], "Else.", max_new_tokens=8) == answers[0].text


def test_variants_of_the_published_code_change_the_words(tiny_lm, tiny_tokenizer):
    def sizes(**settings):
        method = KID(tiny_lm("llama", layers=2), tiny_tokenizer, step_size=0.3, gamma=1.0, **settings)
        return method.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=1, details=True).trace

    plain = sizes()
    assert sizes(drop_written=False)[0] > plain[0]
    assert sizes(limit=1)[0] == 1
    assert sizes(count_duplicates=True)[1] < plain[1]  # -log of a sum that counts more
    assert sizes(count_duplicates=True)[3] == plain[3]  # the mass counts each token once
    assert sizes(leading_space=False)[3] != plain[3]
    assert sizes(memory=1)[0] <= plain[0]


def test_chat_templates_are_no_knowledge(tiny_lm, tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>bridge {{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    model, trie = tiny_lm("llama", layers=2), KnowledgeTrie(["bridge river", "user ostrin", "mayor varro"])
    chat = KID(model, tokenizer, trie, chat=True, system="Bridge.")
    assert chat.generate("Who was mayor?", max_new_tokens=1, details=True).trace[0].tolist() == [1]
    assert chat.generate("Who?", max_new_tokens=1, details=True).trace[0].tolist() == [0]
    assert KID(model, tokenizer, trie).generate("Bridge", max_new_tokens=1, details=True).trace[
        0
    ].tolist() == [1]


def test_bad_input_is_refused_before_decoding(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama", layers=1)
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for name, values in {
        "steps": [-1],
        "step_size": [0.0, -0.1, math.nan, math.inf],
        "kl_scale": [-0.1, math.nan],
        "gamma": [-0.5, math.nan],
        "gm_scale": [-0.1, 1.1, math.nan],
        "hops": [0],
        "memory": [0],
        "limit": [0],
        "chat": [True],
        "system": ["Be brief."],
    }.items():
        for value in values:
            with pytest.raises(BadInput) as caught:
                KID(model, tiny_tokenizer, **{name: value}).generate("a b c", "The river.")
            assert str(caught.value).startswith(f"{name} = {value!r}")
    method = KID(model, tiny_tokenizer)
    with pytest.raises(BadInput, match="contexts = None is missing"):
        method.generate(QUERIES)
    with pytest.raises(BadInput, match="contexts"):
        method.generate(QUERIES, CONTEXTS[:2])
    with pytest.raises(BadInput, match="contexts"):
        method.generate(QUERIES, "The river.")
    with pytest.raises(BadInput, match=r"queries.*empty"):
        method.generate([], [])
    with pytest.raises(BadInput, match="one token"):
        method.generate("a", "The river.")
    with pytest.raises(BadInput, match="512 positions"):
        method.generate("the mayor of Port Ellery " * 100, "The river.", max_new_tokens=4)
    with pytest.raises(BadInput, match="batch_size = 0"):
        method.generate("a b c", "The river.", batch_size=0)
    for options in ({"candidates": 0}, {"candidates": 2}):
        with pytest.raises(BadInput, match="candidates"):
            method.generate("a b c", "The river.", **options)
    for options in ({"num_beams": 2}, {"assistant_model": model}, {"cache_implementation": "static"}):
        with pytest.raises(NotApplicable):
            method.generate("a b c", "The river.", **options)
    for strings in ([], ["", "  "]):
        with pytest.raises(BadInput, match="trie empty"):
            KnowledgeTrie(strings)
    with pytest.raises(BadInput, match="trie empty"):
        KnowledgeTrie.from_passages(["And of the.", ""])
    with pytest.raises(BadInput, match="hops = 0"):
        KnowledgeTrie(["a b"]).query(["a"], hops=0)
    with pytest.raises(MissingExtra, match="spacy"):
        spacy_nouns()


def test_questions_with_documents(tiny_lm, tiny_tokenizer, tmp_path):
    """What `transfuse run` does with it."""
    (tmp_path / "q.jsonl").write_text(
        "\n".join(
            json.dumps({"id": f"q{i}", "question": q, "answers": ["x"], "document_ids": [f"d{i}"]})
            for i, q in enumerate(QUERIES)
        )
    )
    (tmp_path / "d.jsonl").write_text(
        "\n".join(json.dumps({"id": f"d{i}", "text": "".join(c)}) for i, c in enumerate(CONTEXTS))
    )
    model = tiny_lm("llama", layers=2)
    made = steer.transfer(
        model, tiny_tokenizer, questions=tmp_path / "q.jsonl", documents=tmp_path / "d.jsonl", method=KID,
        output=tmp_path / "out", max_new_tokens=3,
    )  # fmt: skip
    rows = [json.loads(line) for line in (made / "answers.jsonl").read_text().splitlines()]
    expected = KID(model, tiny_tokenizer).generate(QUERIES, ["".join(c) for c in CONTEXTS], max_new_tokens=3)
    assert [row["answer"] for row in rows] == expected


# --- the real model -----------------------------------------------------------------------------------------


def test_smollm_takes_up_the_words(smollm):
    """In bf16: the words gain mass at every step, and a larger step says one of them."""
    model, tokenizer = smollm
    trie = KnowledgeTrie(["vaccine immune antibody germ protection"])
    method = KID(model, tokenizer, trie, step_size=0.1)
    found = method.generate("How do vaccines work? They", max_new_tokens=5, details=True)
    _, before, after, plain, mass = found.trace
    assert (after < before).all()
    assert (mass > 1.5 * plain).all()
    assert any(word in found.text for word in ("immune", "antibod", "germ", "protection"))
