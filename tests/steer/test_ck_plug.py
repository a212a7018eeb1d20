"""ck-plug: the mix against a slow float64 loop, the gate row by row, texts end to end."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.generate import encode_pair, generate_texts, pad_batch
from transfuse.core.training import generator
from transfuse.steer.ck_plug import CKPlug, ck_plug_mix, ck_plug_scores, confidence_gain, plausibility_head

QUERIES = ["The capital of France is", "The mayor of Port Ellery is", "A question: who built the bridge?"]
CONTEXTS = [
    "New facts: the capital of France is Quenby, and was before.",
    "Ines left.",
    "An answer: Oskar Tveld did, in 1687, over the river Ostrin in Spain.",
]


def make(model, tokenizer):
    """For the family's contract: an instance, arguments for `generate`, what its first stream reads."""
    method = CKPlug(model, tokenizer, alpha=0.1, gate="repo")
    return method, (QUERIES, CONTEXTS), with_context(method)


def slow_mix(z_c, z_q, alpha, gate, epsilon, top, relative_top):
    """The card's equations in Python floats, one row and one token at a time."""
    rows, gains, fired = [], [], []
    for c, q in zip(z_c.double().tolist(), z_q.double().tolist()):

        def log_softmax(z):
            m = max(z)
            norm = m + math.log(sum(math.exp(x - m) for x in z))
            return [x - norm for x in z]

        def head(log_probs):
            kth = sorted(log_probs, reverse=True)[min(top, len(log_probs)) - 1]
            threshold = min(kth, max(log_probs) + math.log(relative_top))
            return {i for i, x in enumerate(log_probs) if x >= threshold}

        def entropy(log_probs, kept):
            total = sum(math.exp(log_probs[i]) for i in kept)
            shares = [math.exp(log_probs[i]) / total for i in kept]
            return -sum(p * math.log(p) for p in shares if p > 0)

        l_c, l_q = log_softmax(c), log_softmax(q)
        kept = head(l_c) | head(l_q)
        h_c, h_q = entropy(l_c, kept), entropy(l_q, kept)
        gain = h_q - h_c
        conflict = gain < epsilon if gate == "paper" else gain - abs(h_c) < epsilon
        weight = alpha
        if alpha == "adaptive":
            weight = h_c / (h_q + h_c) if h_q + h_c > 0 else 0.5
        mixed = [
            weight * l_q[i] + (1 - weight) * (l_c[i] - l_q[i]) if i in kept else -math.inf
            for i in range(len(l_c))
        ]
        rows.append(mixed if conflict else c)
        gains.append(gain)
        fired.append(conflict)
    return torch.tensor(rows), torch.tensor(gains), torch.tensor(fired)


def logits(rows=12, vocab=60, seed=0):
    """Rows of very different sharpness in both streams, so that each gate fires on some and not on others."""
    g = generator(seed)
    sharp = torch.rand(2, rows, 1, generator=g) * 6 + 0.1
    z = torch.randn(2, rows, vocab, generator=g) * sharp
    return z[0], z[1]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, "adaptive"])
@pytest.mark.parametrize(("gate", "epsilon"), [("paper", 0.0), ("repo", 0.0), ("paper", -1.0), ("repo", 0.7)])
def test_the_mix_is_the_slow_loop(alpha, gate, epsilon):
    z_c, z_q = logits()
    settings = {"alpha": alpha, "gate": gate, "epsilon": epsilon, "top": 4, "relative_top": 0.05}
    ours = ck_plug_mix(z_c, z_q, **settings)
    scores, gain, conflict = slow_mix(z_c, z_q, **settings)
    assert 0 < conflict.sum() < len(conflict)
    assert torch.equal(ours.conflict, conflict)
    torch.testing.assert_close(ours.gain, gain.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.scores, scores.float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(
        ours.scores[~conflict], z_c[~conflict]
    )  # exactly: greedy output is that of plain reading
    assert torch.equal(ck_plug_scores(z_c, z_q, **settings), ours.scores)


def test_defaults_and_the_mix_by_hand():
    """Two tokens: p_c = (1/2, 1/2), p_q = (4/5, 1/5). H_c = ln 2 = 0.6931, H_q = 0.5004."""
    z_c, z_q = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 1.0]]).log()
    ours = ck_plug_mix(z_c, z_q)  # alpha 0.5, paper's gate at 0
    assert ours.gain.item() == pytest.approx(0.500402 - 0.693147, abs=1e-5)
    assert ours.conflict.item() is True
    assert ours.scores[0].tolist() == pytest.approx([0.5 * math.log(0.5)] * 2)
    contrast = ck_plug_scores(z_c, z_q, alpha=0.0)[0]
    assert contrast.tolist() == pytest.approx([math.log(0.5 / 0.8), math.log(0.5 / 0.2)])
    assert ck_plug_scores(z_c, z_q, alpha=1.0)[0].tolist() == pytest.approx([math.log(0.8), math.log(0.2)])
    weight = 0.693147 / (0.693147 + 0.500402)
    adaptive = ck_plug_scores(z_c, z_q, alpha="adaptive")[0, 0].item()
    assert adaptive == pytest.approx(weight * math.log(0.8) + (1 - weight) * math.log(0.5 / 0.8), abs=1e-5)
    # Surer with context than without: plain reading by the paper's gate; the code's asks for twice as sure.
    assert ck_plug_mix(z_q, z_c).conflict.item() is False
    assert ck_plug_mix(z_q, z_c, gate="repo").conflict.item() is True


def test_head_is_the_larger_of_both_sets_and_keeps_ties():
    z = torch.tensor([[5.0, 4.0, 4.0, 4.0, 1.0, -9.0]])
    assert plausibility_head(z, top=2, relative_top=0.9).tolist() == [[True, True, True, True, False, False]]
    assert plausibility_head(z, top=1, relative_top=math.exp(-4.01)).tolist() == [[True] * 5 + [False]]
    assert plausibility_head(z, top=1, relative_top=1.0).tolist() == [[True] + [False] * 5]
    assert plausibility_head(z, top=99).all()  # fewer tokens than k
    # The union: the second stream's favourite is kept although the first rules it out.
    z_c, z_q = torch.tensor([[3.0, 3.0, -20.0, -20.0]]), torch.tensor([[-20.0, -20.0, 9.0, -20.0]])
    scores = ck_plug_scores(z_c, z_q, alpha=1.0, top=1, relative_top=0.5)
    assert scores.argmax().item() == 2
    assert scores.isinf()[0].tolist() == [False, False, False, True]


def test_half_ranks_tokens_as_plain_reading_does():
    z_c, z_q = logits(rows=40, vocab=500)
    ours = ck_plug_mix(z_c, z_q, alpha=0.5, epsilon=math.inf)
    assert ours.conflict.all()
    for scores, plain in zip(ours.scores, z_c):
        kept = scores.isfinite()
        assert torch.equal(plain[kept].argsort(stable=True), scores[kept].argsort(stable=True))
        torch.testing.assert_close(scores[kept].softmax(-1), (plain[kept] / 2).softmax(-1))  # temperature 2


def test_certain_streams_have_no_entropy_and_no_nan():
    """One-hot distributions (every other token at -inf): H_c + H_q = 0, and -inf - -inf in the mix."""
    z = torch.full((2, 5), -math.inf)
    z[0, 1], z[1, 3] = 2.0, 0.0
    for alpha in (0.0, 0.5, 1.0, "adaptive"):
        ours = ck_plug_mix(z, z, alpha=alpha, epsilon=1.0)
        assert ours.gain.tolist() == [0.0, 0.0]
        assert not ours.scores.isnan().any()
        assert (ours.scores[0, 1], ours.scores[1, 3]) == (0.0, 0.0) or alpha == 0.0
    assert (ours.scores.isfinite() == z.isfinite()).all()  # ruled out by both: never chosen, whatever alpha
    differing = z.flip(0)
    assert ck_plug_scores(z, differing, alpha=1.0, epsilon=1.0).argmax(-1).tolist() == [3, 1]
    assert ck_plug_scores(z, differing, alpha=0.0, epsilon=1.0).argmax(-1).tolist() == [1, 3]
    assert ck_plug_scores(z, differing, alpha="adaptive", epsilon=1.0).argmax(-1).tolist() == [1, 3]  # = l_c


def test_adaptive_weights_of_the_code_rank_alike():
    """The published code's weights 2H/(H_c + nH_q) differ from the paper's by a factor per row."""
    z_c, z_q = logits()
    ours = ck_plug_mix(z_c, z_q, alpha="adaptive", gate="repo", top=4)
    _, _, fired = slow_mix(z_c, z_q, "adaptive", "repo", 0.0, 4, 0.01)
    for b in fired.nonzero()[:, 0].tolist():
        head = ours.scores[b].isfinite()
        l_c, l_q = z_c[b].log_softmax(-1), z_q[b].log_softmax(-1)
        h_c, h_q = (-(p := z[b][head].softmax(-1)).mul(p.log()).sum() for z in (z_c, z_q))
        n = 1 + (h_c - h_q).abs() / (h_c + h_q)
        code = 2 * h_c / (h_c + n * h_q) * l_q + 2 * h_q / (h_c + n * h_q) * (l_c - l_q)
        assert code[head].argmax() == ours.scores[b][head].argmax()


def test_rows_are_gated_one_by_one_and_in_float32():
    z_c, z_q = logits(rows=6)
    whole = ck_plug_scores(z_c, z_q, alpha=0.2)
    assert torch.equal(
        whole, torch.cat([ck_plug_scores(z_c[b : b + 1], z_q[b : b + 1], alpha=0.2) for b in range(6)])
    )
    half = ck_plug_scores(z_c.bfloat16(), z_q.bfloat16(), alpha=0.2)
    assert half.dtype == torch.float32
    assert torch.equal(half, ck_plug_scores(z_c.bfloat16().float(), z_q.bfloat16().float(), alpha=0.2))


def test_both_streams_move_with_the_added_constant():
    """Logits are defined up to a constant per row; so are the scores, and the gate not at all."""
    z_c, z_q = logits()
    ours, moved = ck_plug_mix(z_c, z_q, alpha=0.7), ck_plug_mix(z_c + 3.0, z_q - 11.0, alpha=0.7)
    assert torch.equal(ours.conflict, moved.conflict)
    torch.testing.assert_close(ours.scores.softmax(-1), moved.scores.softmax(-1), rtol=1e-4, atol=1e-6)


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2", "qwen2"])
def steered(request, tiny_lm, tiny_tokenizer):
    return CKPlug(tiny_lm(request.param, layers=2), tiny_tokenizer, alpha=0.0, gate="repo")


def ids_of(tokenizer, texts):
    return [tokenizer(text)["input_ids"] for text in texts]


def with_context(method):
    return [method.prompt.format(query=q, context=c) for q, c in zip(QUERIES, CONTEXTS)]


@torch.no_grad()
def slow_answer(method, query, context, steps):
    """One row, two full forwards per token, the slow mix."""
    model, tokenizer, new, fired = method.model, method.tokenizer, [], []
    a = tokenizer(method.prompt.format(query=query, context=context))["input_ids"]
    b = tokenizer(query)["input_ids"]
    while len(new) < steps and new[-1:] != [2]:
        z_c, z_q = (model(torch.tensor([ids + new])).logits[:, -1] for ids in (a, b))
        scores, _, conflict = slow_mix(
            z_c, z_q, method.alpha, method.gate, method.epsilon, method.top, method.relative_top
        )
        new.append(int(scores.argmax()))
        fired.append(bool(conflict))
    return new, fired


def test_answers_are_the_slow_loop(steered):
    answers = steered.generate(QUERIES, CONTEXTS, max_new_tokens=12, details=True)
    gated = []
    for query, context, found in zip(QUERIES, CONTEXTS, answers):
        tokens, fired = slow_answer(steered, query, context, 12)
        assert found.tokens.tolist() == tokens
        assert found.trace[1].tolist() == fired
        assert len(found.trace[0]) == len(tokens)
        gated += fired
    assert any(gated)


def test_cache_batch_and_order_do_not_matter(steered):
    answers = steered.generate(QUERIES, CONTEXTS, max_new_tokens=12)
    assert steered.generate(QUERIES, CONTEXTS, max_new_tokens=12, use_cache=False) == answers
    assert steered.generate(QUERIES, CONTEXTS, max_new_tokens=12, batch_size=1) == answers
    assert steered.generate(QUERIES[::-1], CONTEXTS[::-1], max_new_tokens=12, batch_size=2) == answers[::-1]
    one = steered.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=12)
    assert one == answers[0]


def test_right_padding_gives_the_same_tokens(steered):
    tokenizer = steered.tokenizer
    rows = []
    for side in ("left", "right"):
        ids, mask = pad_batch(ids_of(tokenizer, with_context(steered)), 0, side=side)
        alone, alone_mask = pad_batch(ids_of(tokenizer, QUERIES), 0, side=side)
        output = steered.model.generate(
            input_ids=ids, attention_mask=mask, custom_generate=steered,
            parametric_input_ids=alone, parametric_attention_mask=alone_mask,
            max_new_tokens=12, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        rows.append(output[:, ids.shape[1] :])
    assert torch.equal(*rows)


def test_a_gate_that_never_fires_is_plain_generation(steered):
    """Token for token what transformers generates from the prompt with context."""
    plain = steered.neutral()
    assert steered.epsilon == 0.0
    ids, mask = pad_batch(ids_of(steered.tokenizer, with_context(steered)), 0, side="left")
    alone, alone_mask = pad_batch(ids_of(steered.tokenizer, QUERIES), 0, side="left")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = steered.model.generate(input_ids=ids, attention_mask=mask, **settings)
    ours = steered.model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=plain,
        parametric_input_ids=alone, parametric_attention_mask=alone_mask, **settings,
    )  # fmt: skip
    assert torch.equal(ours, expected)
    texts = plain.generate(QUERIES, CONTEXTS, max_new_tokens=12)
    assert texts == generate_texts(steered.model, steered.tokenizer, with_context(steered), max_new_tokens=12)
    assert texts != steered.generate(QUERIES, CONTEXTS, max_new_tokens=12)


def test_without_context_the_query_is_decoded_plainly(steered):
    contexts = [CONTEXTS[0], " ", CONTEXTS[2]]
    with pytest.warns(UserWarning, match="no context in 1 of 3"):
        answers = steered.generate(QUERIES, contexts, max_new_tokens=8, details=True)
    expected = generate_texts(steered.model, steered.tokenizer, QUERIES[1:2], max_new_tokens=8)
    assert answers[1].text == expected[0]
    assert not answers[1].trace[1].any()
    assert [a.text for a in answers[::2]] == steered.generate(QUERIES[::2], contexts[::2], max_new_tokens=8)


def test_following_predicts_what_would_be_generated(steered):
    """An own answer, fed back as given text, is predicted token by token; ragged targets share a batch."""
    targets = [" Quenby", " Ines Varro", " Oskar"]
    predictions = steered.follow(QUERIES, CONTEXTS, targets)
    for query, context, target, found in zip(QUERIES, CONTEXTS, targets, predictions):
        _, ids = encode_pair(steered.tokenizer, query, target)
        assert found.shape == (len(ids),)
        assert found.dtype == torch.int64
        a = steered.tokenizer(steered.prompt.format(query=query, context=context))["input_ids"]
        b = steered.tokenizer(query)["input_ids"]
        for t in range(len(ids)):
            with torch.no_grad():
                z_c, z_q = (steered.model(torch.tensor([p + ids[:t]])).logits[:, -1] for p in (a, b))
            scores, _, _ = slow_mix(z_c, z_q, 0.0, "repo", 0.0, 10, 0.01)
            assert found[t] == scores.argmax()
    alone = steered.follow(QUERIES[0], CONTEXTS[0], targets[0])
    assert torch.equal(alone[0], predictions[0])
    assert [p.tolist() for p in steered.follow(QUERIES, CONTEXTS, targets, batch_size=1)] == [
        p.tolist() for p in predictions
    ]


def test_sampling_is_seeded_by_its_generator(steered):
    steered.epsilon = math.inf
    draw = [
        steered.generate(QUERIES, CONTEXTS, max_new_tokens=12, do_sample=True, generator=generator(seed))
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]
    greedy = steered.generate(QUERIES, CONTEXTS, max_new_tokens=12)
    assert steered.generate(QUERIES, CONTEXTS, max_new_tokens=12, do_sample=True, top_k=1) == greedy
    seen = []
    steered.generate(QUERIES, CONTEXTS, max_new_tokens=5, on_tokens=seen.append, eos_token_id=None)
    assert len(seen) == 5


def test_audit_of_a_prompt(steered):
    """The gain at each shared token, from two plain forwards."""
    tokenizer, model = steered.tokenizer, steered.model
    query = torch.tensor(tokenizer(QUERIES[0])["input_ids"])
    context = torch.tensor(tokenizer(CONTEXTS[0] + "\n")["input_ids"])
    gains = confidence_gain(model, query, torch.cat([context, query]), top=4)
    assert gains.shape == query.shape
    with torch.no_grad():
        z_q = model(query[None]).logits[0]
        z_c = model(torch.cat([context, query])[None]).logits[0, len(context) :]
    _, expected, _ = slow_mix(z_c, z_q, 0.5, "paper", 0.0, 4, 0.01)
    torch.testing.assert_close(gains, expected.float(), rtol=1e-4, atol=1e-4)
    assert confidence_gain(model, query, query).abs().max() < 1e-6
    with pytest.raises(BadInput, match="does not end like query_ids"):
        confidence_gain(model, query, torch.cat([query, context]))


def test_chat_prompts_differ_in_the_context_alone(tiny_lm, tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    method = CKPlug(
        tiny_lm("llama", layers=2), tokenizer, chat=True, system="Be brief.", prompt="{context}|{query}"
    )
    with_it, alone = method._prompts().encode("Who?", "Ines.")
    assert tokenizer.decode(with_it) == "<s>system: Be brief.</s><s>user: Ines.|Who?</s>A:"
    assert tokenizer.decode(alone) == "<s>system: Be brief.</s><s>user: Who?</s>A:"
    assert alone.count(1) == 2  # the template's begin tokens, no third one from the tokenizer
    _, target = method._prompts().encode_target("Who?", "Ines.", " Varro ")
    assert tokenizer.decode(target) == "Varro"
    assert len(method.generate("Who?", "Ines.", max_new_tokens=3, details=True).tokens) <= 3
    assert method.follow("Who?", "Ines.", "Varro")[0].shape == (len(target),)


def test_bad_input_is_refused_before_decoding(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama", layers=1)
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    settings = [
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"alpha": -0.1}, "alpha = -0.1"),
        ({"alpha": "auto"}, "alpha = 'auto'"),
        ({"alpha": math.nan}, "alpha = nan"),
        ({"gate": "code"}, "gate = 'code'"),
        ({"epsilon": math.nan}, "epsilon = nan"),
        ({"top": 0}, "top = 0"),
        ({"relative_top": 0.0}, "relative_top = 0.0"),
        ({"relative_top": 1.1}, "relative_top = 1.1"),
        ({"prompt": "{query}"}, "prompt = '{query}' lacks {context}"),
        ({"prompt": "{context} {query} {x}"}, "prompt = '{context} {query} {x}' has further fields"),
        ({"chat": True}, "chat = True needs a chat template"),
        ({"system": "Be brief."}, "system = 'Be brief.'"),
    ]
    for wrong, message in settings:
        method = CKPlug(model, tiny_tokenizer, **wrong)
        for call in (
            lambda m=method: m.generate("q", "c"),
            lambda m=method: m.follow("q", "c", "a"),
        ):
            with pytest.raises(BadInput) as caught:
                call()
            assert str(caught.value).startswith(message)
    method = CKPlug(model, tiny_tokenizer)
    with pytest.raises(BadInput, match="contexts"):
        method.generate(["a", "b"], ["c"])
    with pytest.raises(BadInput, match="contexts"):
        method.generate(["a"], "c")
    with pytest.raises(BadInput, match=r"queries.*empty"):
        method.generate([], [])
    with pytest.raises(BadInput, match="continuations"):
        method.follow(["a"], ["c"], ["x", "y"])
    with pytest.raises(BadInput, match="empty"):
        method.follow(["a"], ["c"], [" "])
    with pytest.raises(BadInput, match="batch_size = 0"):
        method.generate("a", "c", batch_size=0)
    with pytest.raises(BadInput, match="512 positions"):
        method.generate("a", "the mayor of Port Ellery " * 100, max_new_tokens=4)
    with pytest.raises(BadInput, match="z_q"):
        ck_plug_scores(torch.zeros(1, 4), torch.zeros(1, 5))
    with pytest.raises(BadInput, match="top = 0"):
        ck_plug_scores(torch.zeros(1, 4), torch.zeros(1, 4), top=0)
    for refused in ({"num_return_sequences": 2}, {"assistant_model": model}, {"guidance_scale": 2.0}):
        with pytest.raises(NotApplicable):
            method.generate("a", "c", **refused)
    with pytest.raises(BadInput, match="parametric_input_ids"):
        model.generate(
            torch.tensor([[3]]), custom_generate=method, generation_config=GenerationConfig(max_new_tokens=2)
        )


def test_models_that_cannot_be_streams_are_refused_by_name(tiny_lm, tiny_tokenizer):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    prompted = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for model, message in (
        (T5ForConditionalGeneration(config), "T5ForConditionalGeneration' reads its prompt with an encoder"),
        (get_peft_model(tiny_lm("llama", layers=1), prompted), "has virtual tokens of PEFT"),
    ):
        with pytest.raises(NotApplicable, match=message):
            CKPlug(model, tiny_tokenizer).generate(QUERIES, CONTEXTS, max_new_tokens=2)


def test_an_adapter_is_part_of_the_model(tiny_lm, tiny_tokenizer):
    """A PEFT model is steered with its adapter on, as the merged model would be."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny_lm("llama", layers=2), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator(3))
    adapted.eval()
    method = CKPlug(adapted, tiny_tokenizer, alpha=0.1, gate="repo")
    answers = method.generate(QUERIES, CONTEXTS, max_new_tokens=8)
    predictions = method.follow(QUERIES, CONTEXTS, QUERIES)
    with adapted.disable_adapter():
        assert method.generate(QUERIES, CONTEXTS, max_new_tokens=8) != answers
    merged = CKPlug(adapted.merge_and_unload(), tiny_tokenizer, alpha=0.1, gate="repo")
    assert merged.generate(QUERIES, CONTEXTS, max_new_tokens=8) == answers
    assert all(torch.equal(*pair) for pair in zip(merged.follow(QUERIES, CONTEXTS, QUERIES), predictions))


# --- the real model -----------------------------------------------------------------------------------------


def test_smollm_follows_memory_or_context(smollm):
    """The dial decides in bf16; with a gate that never fires it is transformers' own generation."""
    model, tokenizer = smollm
    query, context = (
        "The capital of Spain is",
        "The capital of Spain is Oslo. Oslo has long been the capital of Spain.",
    )
    answers = {}
    for alpha in (0.0, 0.5, 1.0):
        method = CKPlug(model, tokenizer, alpha=alpha, prompt="{context} {query}")
        answers[alpha] = method.generate(query, context, max_new_tokens=3)
    assert "Oslo" in answers[0.0]
    assert "Madrid" in answers[0.5]
    assert "Madrid" in answers[1.0]
    model.float()  # bf16 rounds differently in batches of one and of two rows
    plain = CKPlug(model, tokenizer, prompt="{context} {query}").neutral()
    ours = plain.generate([query], [context], max_new_tokens=16, details=True)[0]
    ids = torch.tensor([tokenizer(f"{context} {query}")["input_ids"]])
    expected = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert torch.equal(ours.tokens, expected)
    assert not ours.trace[1].any()
