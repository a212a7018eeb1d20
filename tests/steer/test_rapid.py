"""rapid: the corrected distribution and the verdicts against slow loops, the loop against plain decoding."""

from __future__ import annotations

import copy
import inspect
import json
import math
from functools import partial, wraps
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteriaList, StopStringCriteria

from transfuse.core import lockstep
from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.generate import generate_texts
from transfuse.core.streams import Stream
from transfuse.core.training import generator
from transfuse.steer import transfer
from transfuse.steer.rapid import (
    RAPID,
    BM25ChunkRetriever,
    ChunkRetriever,
    Reader,
    Verdict,
    corrected,
    residual,
    round_flops,
    speculate,
    verify,
)

QUERIES = ["Who is the mayor of Port Ellery?", "Who built the bridge?", "Where was Ines born?"]
CONTEXTS = [
    "The capital of France is Paris. The mayor of Port Ellery is Ines Varro. " + "New facts move. " * 12,
    "Oskar Tveld built the bridge over the river Ostrin, in 1687. " + "What was known stays. " * 3,
    "The capital of Spain is Madrid. " * 5 + "Ines was born in Quenby.",
]
ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma3"]


def make(model, tokenizer):
    """For the family's contract: an instance, arguments for `generate`, what its first stream reads."""
    method = RAPID(
        model, tokenizer, retriever=BM25ChunkRetriever(chunk_tokens=8, max_tokens=16), gamma=4, eta=40
    )
    return (
        method,
        (QUERIES, CONTEXTS),
        [method.prompt.format(context=c, query=q) for q, c in zip(QUERIES, CONTEXTS)],
    )


def slow_corrected(z, q, eta, temperature, tail):
    """The equations in Python floats, for one `[V]` row."""
    z = [x / temperature for x in z]

    def softmax(values):
        top = max(values)
        weights = [math.exp(v - top) for v in values]
        return [w / sum(weights) for w in weights]

    p = softmax(z)
    stepped = softmax([zk + eta * (qk - pk) for zk, qk, pk in zip(z, q, p)])
    most = max(stepped)
    stepped = [pk if sk < 0.1 * most else sk for sk, pk in zip(stepped, p)]
    if tail == "renormalise":
        stepped = [s / sum(stepped) for s in stepped]
    return p, stepped


def slow_outcome(z, q, eta, tail):
    """Distribution of one emitted token of a round with one draft; and the acceptance rate."""
    p, stepped = slow_corrected(z, q, eta, 1.0, tail)
    accept = [qk * min(1.0, sk / qk) if qk > 0 else 0.0 for qk, sk in zip(q, stepped)]
    rest = [max(pk - sk, pk - qk, 0.0) for pk, sk, qk in zip(p, stepped, q)]
    rest = [r / sum(rest) for r in rest] if sum(rest) > 0 else p
    rejected = 1 - sum(accept)
    return [a + rejected * r for a, r in zip(accept, rest)], sum(accept)


def pair(vocab=12, seed=0, sharp=1.5):
    """Random z and q, `[V]`, float64."""
    z = torch.randn(vocab, generator=generator(seed), dtype=torch.float64) * sharp
    return z, (torch.randn(vocab, generator=generator(seed + 1), dtype=torch.float64) * sharp).softmax(-1)


def drawn(z, q, draws, *, n=1, seed=0, rule=verify, **settings):
    """`draws` rounds of n drafts from q, each against z: the drafts and their verdict."""
    source = generator(seed)
    drafts = torch.multinomial(q, draws * n, replacement=True, generator=source).view(draws, n)
    qs, zs = q.expand(draws, n, -1), z.expand(draws, n + 1, -1)
    return drafts, rule(drafts, qs, zs, generator=source, **settings)


def first_tokens(drafts, verdict):
    return torch.where(verdict.accepted > 0, drafts[:, 0], verdict.token)


# --- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["paper", "renormalise"])
@pytest.mark.parametrize(("eta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (10.0, 0.7), (50.0, 2.0)])
def test_corrected_is_the_slow_loop(tail, eta, temperature):
    rows = [pair(seed=seed, sharp=sharp) for seed, sharp in ((0, 0.3), (2, 1.5), (4, 5.0))]
    z, q = (torch.stack(column) for column in zip(*rows))
    ours = corrected(z, q, eta, temperature, tail)
    for row, (zs, qs) in enumerate(rows):
        p, expected = slow_corrected(zs.tolist(), qs.tolist(), eta, temperature, tail)
        assert ours[row].tolist() == pytest.approx(expected, rel=1e-12)
        if eta == 0:
            assert ours[row].tolist() == pytest.approx(p, rel=1e-12)
    single = corrected(z.float(), q.float(), eta, temperature, tail)
    torch.testing.assert_close(single, ours.float(), rtol=2e-4, atol=1e-6)
    assert corrected(z.bfloat16(), q.bfloat16(), eta, temperature, tail).dtype == torch.float32
    ruled_out = corrected(
        torch.tensor([[0.0, -math.inf, 1.0]]), torch.tensor([[0.5, 0.0, 0.5]]), eta, 1.0, tail
    )
    assert ruled_out[0, 1] == 0
    assert ruled_out.isfinite().all()


P, Q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.7, 0.1])


def test_the_worked_examples():
    """p = (.6, .3, .1), q = (.2, .7, .1): biased at eta 1, not a distribution at eta 5."""
    z = P.log()
    weights = [0.6 * math.exp(-0.4), 0.3 * math.exp(0.4), 0.1]
    assert corrected(z, Q, 1.0).tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-5)
    outcome, _ = slow_outcome(z.tolist(), Q.tolist(), 1.0, "paper")
    assert outcome == pytest.approx([0.43, 0.47, 0.10], abs=0.005)
    drafts, verdict = drawn(z, Q, 20_000, eta=1.0)
    shares = first_tokens(drafts, verdict).bincount(minlength=3) / 20_000
    assert shares.tolist() == pytest.approx(outcome, abs=0.012)
    # e^-2 .6 = .0812, e^2 .3 = 2.2167, .1: shares .034, .924, .042, the outer two below a tenth of the best
    assert corrected(z, Q, 5.0).tolist() == pytest.approx([0.60, 0.9245, 0.10], abs=1e-4)
    total = 0.6 + 0.9245 + 0.1
    assert corrected(z, Q, 5.0, 1.0, "renormalise").tolist() == pytest.approx(
        [0.6 / total, 0.9245 / total, 0.1 / total], abs=1e-4
    )
    _, verdict = drawn(z, Q, 2000, n=3, eta=5.0)
    assert (verdict.accepted == 3).all()
    _, verdict = drawn(z, Q, 2000, n=3, eta=5.0, tail="renormalise")
    assert 0 < (verdict.accepted == 3).float().mean() < 1


def test_residual_by_hand_and_where_it_is_zero():
    stepped = corrected(P.log(), Q, 1.0)
    assert residual(P, stepped, Q).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert torch.equal(residual(P, P, P), P)
    both = residual(torch.stack([P, P]), torch.stack([P, P]), torch.stack([P, Q]))
    assert both[0].tolist() == pytest.approx(P.tolist())
    assert both[1].tolist() == pytest.approx([1.0, 0.0, 0.0])
    # every draft accepted: the token after is drawn from p, and so it is where q = p
    _, verdict = drawn(P.log(), P, 20_000, eta=7.0)
    assert (verdict.accepted == 1).all()
    shares = verdict.token.bincount(minlength=3) / 20_000
    assert shares.tolist() == pytest.approx(P.tolist(), abs=0.012)


def test_at_eta_0_the_output_is_the_targets():
    """20,000 rounds: chi-square over 12 tokens stays below the 99.9 % point of 11 degrees, 31.3."""
    z, q = pair()
    p = z.softmax(-1)
    for tail in ("paper", "renormalise"):
        drafts, verdict = drawn(z, q, 20_000, eta=0.0, tail=tail)
        counts = first_tokens(drafts, verdict).bincount(minlength=12).double()
        expected = 20_000 * p
        assert ((counts - expected) ** 2 / expected).sum() < 31.3
        assert 0.5 * (counts / 20_000 - p).abs().sum() < 0.02
    # the same test sees the step at eta 3
    drafts, verdict = drawn(z, q, 20_000, eta=3.0)
    counts = first_tokens(drafts, verdict).bincount(minlength=12).double()
    assert ((counts - expected) ** 2 / expected).sum() > 100


def test_all_tokens_of_longer_rounds_at_eta_0():
    """Random p and q over 50 tokens: what rounds of five drafts emit, all places pooled, is distributed as p."""
    z, q = pair(50, seed=3, sharp=1.0)
    drafts, verdict = drawn(z, q, 20_000, n=5, eta=0.0)
    kept = torch.arange(5) < verdict.accepted[:, None]
    emitted = torch.cat([drafts[kept], verdict.token])
    assert len(emitted) > 35_000
    p = z.softmax(-1)
    shares = emitted.bincount(minlength=50) / len(emitted)
    assert 0.5 * (shares - p).abs().sum() < 0.02
    assert 0.5 * (q - p).abs().sum() > 0.2
    # how many stay: a run of successes, each of chance sum min(p, q)
    chance = float(torch.minimum(p, q).sum())
    for k in range(1, 6):
        assert (verdict.accepted >= k).double().mean().item() == pytest.approx(chance**k, abs=0.015)


@pytest.mark.parametrize("tail", ["paper", "renormalise"])
def test_output_and_acceptance_follow_the_slow_loop(tail):
    z, q = pair(6, seed=5)
    for eta in (1.0, 5.0, 20.0):
        expected, accepted = slow_outcome(z.tolist(), q.tolist(), eta, tail)
        drafts, verdict = drawn(z, q, 20_000, eta=eta, tail=tail)
        shares = first_tokens(drafts, verdict).bincount(minlength=6) / 20_000
        assert shares.tolist() == pytest.approx(expected, abs=0.015)
        assert verdict.accepted.double().mean().item() == pytest.approx(accepted, abs=0.015)


def test_acceptance_does_not_fall_with_eta():
    for seed in range(5):
        z, q = pair(50, seed=10 * seed, sharp=1.0)
        exact = [slow_outcome(z.tolist(), q.tolist(), eta, "paper")[1] for eta in (0, 1, 5, 10)]
        assert exact == sorted(exact)
        rates = [drawn(z, q, 4000, n=3, eta=eta)[1].accepted.double().mean().item() for eta in (0, 1, 5, 10)]
        assert all(b >= a - 0.03 for a, b in pairwise(rates))
        assert rates[-1] > rates[0] + 0.05


def test_greedy_verdicts():
    """A draft stays while it is the best of p^, which takes its place if not; then the best of z."""
    z = torch.tensor([[[2.0, 1.9, -9.0], [0.0, 3.0, 1.0], [1.0, 0.0, 5.0]]])
    q = torch.tensor([[[0.1, 0.9, 0.0], [0.0, 1.0, 0.0]]])
    judge = partial(verify, q=q, z=z, do_sample=False)
    assert [int(x) for x in judge(torch.tensor([[1, 1]]), eta=0.0)] == [0, 0]
    assert [int(x) for x in judge(torch.tensor([[1, 1]]), eta=5.0)] == [2, 2]
    assert [int(x) for x in judge(torch.tensor([[1, 0]]), eta=5.0)] == [1, 1]
    assert [int(x) for x in judge(torch.tensor([[0, 1]]), eta=5.0)] == [0, 1]
    none = verify(
        torch.empty(2, 0, dtype=torch.long),
        q[:, :0].expand(2, 0, 3),
        z[:, 2:].expand(2, 1, 3),
        do_sample=False,
    )
    assert none.token.tolist() == [2, 2]


def test_a_draft_without_any_chance_is_rejected():
    z = torch.tensor([[[0.0, -math.inf], [0.0, 0.0]]]).expand(500, 2, 2)
    q = torch.tensor([[[0.0, 1.0]]]).expand(500, 1, 2)
    verdict = verify(torch.ones(500, 1, dtype=torch.long), q, z, eta=0.0, generator=generator(0))
    assert not verdict.accepted.any()
    assert not verdict.token.any()


def test_cost_model():
    assert round_flops(8, 0, 1000, 0, gamma=0) == 2 * 8 * 1000
    expected = 2 * 10 * 3 * 100 + 10 * 10 * 3 + 2 * 8 * (1000 + 10)
    assert round_flops(8, 3, 1000, 100) == expected
    assert round_flops(8, 3, 1000, 100, acceptance=4.0) == expected / 4
    with pytest.raises(BadInput, match="acceptance = 0"):
        round_flops(1, 1, 1, 1, acceptance=0)


# --- retrieval ----------------------------------------------------------------------------------------------


class Letters:
    """An encoder that counts letters: enough to rank texts, and to see what it was given."""

    def __init__(self, limit=None, tokenizer=None):
        self.seen: list[str] = []
        if limit:
            self.max_seq_length, self.tokenizer = limit, tokenizer

    def encode(self, texts):
        self.seen += texts
        return [[text.count(c) + 1e-6 for c in "abcdefgh"] for text in texts]


def test_chunks_are_pieces_of_the_document_in_its_order(tiny_tokenizer):
    text = "".join(c * 8 + " " for c in "abcabdcbabbc") + "é ü"
    retriever = ChunkRetriever(Letters(), chunk_tokens=9, threshold=-1.0)
    chunks = retriever.chunks("bbb", text, tiny_tokenizer)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(chunk.tokens for chunk in chunks) == len(ids)
    assert all(chunk.tokens == 9 for chunk in chunks[:-1])
    assert retriever("bbb", text, tiny_tokenizer) == text
    near = ChunkRetriever(Letters(), chunk_tokens=9, threshold=0.7).chunks("bbb", text, tiny_tokenizer)
    assert 3 <= len(near) < len(chunks)
    assert [chunk.number for chunk in near] == [c.number for c in chunks if c.score >= 0.7]
    assert all("b" in chunk.text for chunk in near)
    expected = near[0].text
    for before, chunk in pairwise(near):
        expected += ("" if chunk.number == before.number + 1 else "\n") + chunk.text
    assert ChunkRetriever(Letters(), chunk_tokens=9, threshold=0.7)("bbb", text, tiny_tokenizer) == expected
    assert {"\n" in expected, any(b.number == a.number + 1 for a, b in pairwise(near))} == {True}


def test_how_many_chunks_are_kept(tiny_tokenizer):
    text = "abababab " * 400
    total = len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
    for most, size, kept in ((40, 10, 4), (45, 10, 4), (9, 10, 1)):
        retriever = ChunkRetriever(Letters(), size, -1.0, max_tokens=most)
        assert len(retriever.chunks("a", text, tiny_tokenizer)) == kept
    defaults = ChunkRetriever(Letters())
    assert (defaults.chunk_tokens, defaults.threshold, defaults.max_tokens) == (512, 0.3, None)
    assert total < 4096
    assert len(ChunkRetriever(Letters(), 100, -1.0).chunks("a", text, tiny_tokenizer)) == math.ceil(
        total / 100
    )
    longer = text * 9  # 4096 tokens at most, as the 24th part is less
    kept = ChunkRetriever(Letters(), 512, -1.0).chunks("a", longer, tiny_tokenizer)
    assert sum(chunk.tokens for chunk in kept) == 4096


def test_below_the_threshold_the_best_chunk_is_used(tiny_tokenizer):
    text = "aaaa aaaa aaaa cccc cccc bccc aaaa aaaa"
    retriever = ChunkRetriever(Letters(), chunk_tokens=5, threshold=0.95)
    with pytest.warns(UserWarning, match=r"no chunk reaches the threshold 0.95.*the best one"):
        chunks = retriever.chunks("bbb", text, tiny_tokenizer)
    assert len(chunks) == 1
    assert "b" in chunks[0].text
    with pytest.warns(UserWarning, match="no chunk"):
        assert BM25ChunkRetriever(5)("zebra", text, tiny_tokenizer) in text


def test_an_encoder_with_a_short_window_reads_chunks_in_parts(tiny_tokenizer):
    text = "aaaa " * 30 + "gggg " + "aaaa " * 9
    narrow, wide = Letters(40, tiny_tokenizer), Letters()
    scores = []
    for encoder in (wide, narrow):
        retriever = ChunkRetriever(encoder, chunk_tokens=4096, threshold=-1.0)
        scores.append(retriever.chunks("gggg", text, tiny_tokenizer)[0].score)
    assert scores[1] > 2 * scores[0]
    parts = [part for part in narrow.seen if part != "gggg"]
    assert len(parts) > 3
    assert " ".join(parts).split() == text.split()
    assert all(len(tiny_tokenizer(part)["input_ids"]) <= 40 for part in parts)
    read = len(narrow.seen)
    retriever.chunks("aaaa", text, tiny_tokenizer)
    assert len(narrow.seen) == read + 1  # the document's index is kept
    retriever.chunks("aaaa", text + "b", tiny_tokenizer)
    assert len(narrow.seen) > read + 3


def test_bm25_chunks(tiny_tokenizer):
    document = " ".join(CONTEXTS)
    kept = BM25ChunkRetriever(16).chunks("Who built the bridge?", document, tiny_tokenizer)
    assert kept
    assert all("built" in c.text or "bridge" in c.text for c in kept)
    strict = BM25ChunkRetriever(16, max(c.score for c in kept))
    assert len(strict.chunks("Who built the bridge?", document, tiny_tokenizer)) == 1


def test_minilm_finds_the_needle(tiny_tokenizer):
    """The real encoder, through the resolver: its window is shorter than the chunk."""
    filler = "The weather was mild and the harvest was brought in early that year. " * 12
    document = filler + "The access code of the observatory is 7341. " + filler * 2
    retriever = ChunkRetriever(chunk_tokens=300)
    chunks = retriever.chunks("What is the access code of the observatory?", document, tiny_tokenizer)
    assert 1 <= len(chunks) < math.ceil(len(tiny_tokenizer(document)["input_ids"]) / 300)
    assert any("7341" in chunk.text for chunk in chunks)


# --- the loop -----------------------------------------------------------------------------------------------


def short_of(method):
    """Token ids of the drafter's prompts."""
    for query, context in zip(QUERIES, CONTEXTS):
        text = method.prompt.format(context=method.retriever(query, context, method.tokenizer), query=query)
        yield torch.tensor([method.tokenizer(text)["input_ids"]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_rounds_are_decoding_by_the_corrected_scores(architecture, tiny_lm, tiny_tokenizer):
    """With gamma as long as the answer no token comes after a full round: each is the best of p^."""
    model = tiny_lm(architecture, layers=2)
    method, inputs, first = make(model, tiny_tokenizer)
    method.gamma = 24
    found = method.generate(*inputs, max_new_tokens=24, details=True)

    def combine(logits):
        return corrected(logits[0], logits[1].softmax(-1), method.eta).log()

    for text, short, ours in zip(first, short_of(method), found):
        long = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        expected = lockstep.decode(
            [Stream(model, long), Stream(model, short)], combine, max_new_tokens=24, eos_token_id=2
        )
        assert torch.equal(ours.tokens, expected[0])
        assert ours.prompt_tokens == (long.shape[1], short.shape[1])
    assert any(0 < answer.acceptance < 1 for answer in found)
    assert any(1 < answer.rounds < len(answer.tokens) for answer in found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gamma", [0, 1, 3, 10])
def test_greedy_at_eta_0_is_the_target_alone(architecture, gamma, tiny_lm, tiny_tokenizer):
    model = tiny_lm(architecture, layers=2)
    method, inputs, first = make(model, tiny_tokenizer)
    method.gamma, method.prefill_tokens = gamma, 7
    plain = generate_texts(model, tiny_tokenizer, first, max_new_tokens=17)
    assert method.neutral().generate(*inputs, max_new_tokens=17) == plain
    assert (method.eta, method.verify_fn) == (40, None)
    if gamma == 0:
        assert method.generate(*inputs, max_new_tokens=17) == plain


def test_windows_that_have_rolled_on(tiny_tokenizer):
    """Drafts taken back uncover tokens that a sliding window had dropped: the caches keep them."""
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator(i)) * 0.1
    method, inputs, first = make(model, tiny_tokenizer)
    method.prefill_tokens = 10
    plain = generate_texts(model, tiny_tokenizer, first, max_new_tokens=40)
    answers = method.neutral().generate(*inputs, max_new_tokens=40, details=True)
    assert [a.text for a in answers] == plain
    assert any(0 < a.acceptance < 1 for a in answers)
    assert method.generate(*inputs, max_new_tokens=20, use_cache=False) == method.generate(
        *inputs, max_new_tokens=20
    )


def test_a_recurrent_state_cannot_be_taken_back(tiny_tokenizer):
    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_num_value_heads=2,
        linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="cannot be taken back"):
        Reader(AutoModelForCausalLM.from_config(config))


@pytest.fixture
def method(tiny_lm, tiny_tokenizer):
    return make(tiny_lm("llama", layers=2), tiny_tokenizer)[0]


def test_lengths_within_a_round(method):
    """A shorter answer is the beginning of a longer one, however long the rounds."""
    for method.gamma in (3, 10):
        whole = method.generate(QUERIES, CONTEXTS, max_new_tokens=23, details=True)
        for new in (1, 2, 5, 11):
            for longer, answer in zip(
                whole, method.generate(QUERIES, CONTEXTS, max_new_tokens=new, details=True)
            ):
                assert len(answer.tokens) == min(new, len(longer.tokens))
                assert torch.equal(answer.tokens, longer.tokens[:new])


def test_an_end_among_accepted_drafts_ends_the_answer(method):
    method.eta, method.gamma = 300.0, 10
    whole = method.generate(QUERIES[2], CONTEXTS[2], max_new_tokens=30, details=True, eos_token_id=None)
    inside = [i for i in range(1, 29) if whole.origins[i] == 0 and whole.origins[i + 1] == 0]
    place = next(i for i in inside if whole.tokens[i] not in whole.tokens[:i])
    for end in (int(whole.tokens[place]), [399, int(whole.tokens[place])]):
        ended = method.generate(QUERIES[2], CONTEXTS[2], max_new_tokens=30, details=True, eos_token_id=end)
        assert torch.equal(ended.tokens, whole.tokens[: place + 1])
        assert torch.equal(ended.origins, whole.origins[: place + 1])
        assert ended.drafted < whole.drafted


def test_stop_strings_and_callbacks(method):
    whole = method.generate(QUERIES[1], CONTEXTS[1], max_new_tokens=20)
    string, made = whole[8:10], []
    text = method.generate(
        QUERIES[1], CONTEXTS[1], max_new_tokens=20, on_tokens=made.append,
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(method.tokenizer, [string])]),
    )  # fmt: skip
    assert len(text) < len(whole)
    assert whole.startswith(text)
    assert string in text
    assert text.index(string) >= len(text) - len(string) - 3  # the token that completes it is the last
    assert method.tokenizer.decode(torch.cat(made)).lstrip(" ") == text


def test_details_add_up(method):
    seen = []

    def counting(drafts, q, z, **options):
        verdict = verify(drafts, q, z, eta=method.eta, **options)
        seen.append((drafts.shape[1], int(verdict.accepted)))
        return verdict

    counted = copy.copy(method)
    counted.verify_fn = counting
    answer = counted.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=25, details=True)
    plain = method.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=25, details=True)
    assert torch.equal(answer.tokens, plain.tokens)
    assert answer.rounds == len(seen)
    assert answer.drafted == sum(drafted for drafted, _ in seen)
    assert answer.acceptance == sum(kept for _, kept in seen) / answer.drafted
    assert answer.passes_per_token == len(seen) / 25
    expected = [o for drafted, kept in seen for o in [0] * kept + [1 if kept < drafted else 2]]
    assert answer.origins.tolist() == expected[:25]
    method.gamma = 0
    plain = method.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=5, details=True)
    assert math.isnan(plain.acceptance)
    assert plain.passes_per_token == 1
    assert set(plain.origins.tolist()) == {2}


def test_a_rule_of_ones_own(method):
    """A fixed rule: nothing is accepted, token 7 follows. And accepting everything is drafting alone."""

    def never(drafts, q, z, *, do_sample, generator):
        return Verdict(torch.zeros(1, dtype=torch.long), torch.tensor([7]))

    def always(drafts, q, z, *, do_sample, generator):
        return Verdict(torch.tensor([drafts.shape[1]]), z[:, -1].argmax(-1))

    method.verify_fn = never
    assert set(method.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=6, details=True).tokens.tolist()) == {
        7
    }
    method.verify_fn, method.gamma = always, 12
    answers = method.generate(QUERIES, CONTEXTS, max_new_tokens=12, details=True)
    for short, answer in zip(short_of(method), answers):
        alone = method.model.generate(short, max_new_tokens=12, do_sample=False)[0, short.shape[1] :]
        assert torch.equal(answer.tokens, alone)
        assert answer.acceptance == 1


def test_q_goes_through_the_same_warpers(method):
    """Temperature, top-k and a ban act on both readers before p, q and p^ are formed."""
    seen = []

    def watching(drafts, q, z, **options):
        seen.append((drafts, q, z))
        return verify(drafts, q, z, eta=1.0, **options)

    method.verify_fn = watching
    method.generate(
        QUERIES[0], CONTEXTS[0], max_new_tokens=8, do_sample=True, temperature=0.5, top_k=5,
        suppress_tokens=[9], generator=generator(1),
    )  # fmt: skip
    drafts, q, z = seen[0]
    assert ((q > 0).sum(-1) <= 5).all()
    assert (z.isfinite().sum(-1) <= 5).all()
    assert (q.gather(-1, drafts[..., None]) > 0).all()
    short = next(short_of(method))
    raw = method.model(short).logits[0, -1]
    raw[9] = -math.inf
    top = raw.topk(5)
    torch.testing.assert_close(q[0, 0, top.indices], (top.values / 0.5).softmax(-1), rtol=1e-4, atol=1e-6)


def test_sampling_at_eta_0_is_the_targets_distribution(method):
    """First two tokens of 400 sampled answers against their exact probabilities, cut to the best three tokens."""
    model, gamma = method.model, 2
    long = torch.tensor([method.tokenizer(make(model, method.tokenizer)[2][1])["input_ids"]])
    short = list(short_of(method))[1]
    source, counts = generator(5), {}

    def top3(text, scores):
        return (
            scores.masked_fill(scores < scores.topk(3).values[..., -1:], -math.inf) / 8
        )  # flat: chance matters

    target, drafter = Reader(model), Reader(model)
    draws = 400
    for _ in range(draws):
        target.start(long)
        drafter.start(short)
        speculate(
            target, drafter, partial(verify, eta=0.0), gamma=gamma, do_sample=True, processors=top3, generator=source,
            stop=lambda text, _: text.shape[1] >= long.shape[1] + 2,
        )  # fmt: skip
        pair = tuple(target.ids[0, long.shape[1] :].tolist())
        counts[pair] = counts.get(pair, 0) + 1
    expected = {}
    with torch.no_grad():
        p = top3(None, model(long).logits[:, -1]).softmax(-1)[0]
        for a in range(400):
            if p[a] > 0:
                then = top3(None, model(torch.cat([long, torch.tensor([[a]])], 1)).logits[:, -1]).softmax(-1)[
                    0
                ]
                expected |= {(a, b): float(p[a] * then[b]) for b in then.nonzero()[:, 0].tolist()}
    assert len(expected) == 9
    assert counts.keys() <= expected.keys()
    distance = 0.5 * sum(abs(counts.get(k, 0) / draws - v) for k, v in expected.items())
    assert distance < 0.1


def test_another_drafter_of_the_same_vocabulary(tiny_lm, tiny_tokenizer):
    target, drafter = tiny_lm("llama", layers=2), tiny_lm("gpt2", layers=1, seed=3)
    method, inputs, first = make(target, tiny_tokenizer)
    own = method.generate(*inputs, max_new_tokens=12)
    method.drafter, method.gamma = drafter, 12
    plain = generate_texts(target, tiny_tokenizer, first, max_new_tokens=12)
    assert method.neutral().generate(*inputs, max_new_tokens=12) == plain
    answers = method.generate(*inputs, max_new_tokens=12, details=True)
    assert [a.text for a in answers] != own
    for text, short, ours in zip(first, short_of(method), answers):
        long = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        expected = lockstep.decode(
            [Stream(target, long), Stream(drafter, short)],
            lambda z: corrected(z[0], z[1].softmax(-1), method.eta).log(),
            max_new_tokens=12, eos_token_id=2,
        )  # fmt: skip
        assert torch.equal(ours.tokens, expected[0])


def test_vocabularies(tiny_lm, tiny_tokenizer):
    target = tiny_lm("llama", layers=1)
    assert max(tiny_tokenizer.get_vocab().values()) < 400
    for vocab in (500, 300):
        method, inputs, first = make(target, tiny_tokenizer)
        method.drafter = tiny_lm("llama", layers=1, vocab=vocab)
        with pytest.raises(IncompatibleModels, match=f"scores {vocab} tokens where the target scores 400"):
            method.generate(*inputs)
    method.drafter_tokenizer = tiny_tokenizer  # 300 are fewer than it knows
    with pytest.raises(IncompatibleModels, match="scores 300"):
        method.generate(*inputs)
    method.drafter = tiny_lm("llama", layers=1, vocab=500)  # padding: the tokenizers agree
    plain = generate_texts(target, tiny_tokenizer, first, max_new_tokens=6)
    assert method.neutral().generate(*inputs, max_new_tokens=6) == plain
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<new>"])
    method.drafter, method.drafter_tokenizer = None, other
    method.generate(*inputs, max_new_tokens=1)  # a token more is no hindrance
    method.tokenizer, method.drafter_tokenizer = other, tiny_tokenizer
    with pytest.raises(IncompatibleModels, match="<new>"):
        method.generate(*inputs, max_new_tokens=1)


def test_one_document_is_read_once(method, monkeypatch):
    """Questions on one document: what their prompts have in common stays in the caches, and answers stay the same."""
    queries = ["Who is the mayor of Port Ellery?", "Who is the mayor of Quenby?"]
    contexts = [CONTEXTS[0]] * 2
    separate = [method.generate(q, c, max_new_tokens=8) for q, c in zip(queries, contexts)]
    read, real = [], method.model.forward

    @wraps(real)
    def watched(*args, **kwargs):
        read.append(kwargs["input_ids"].shape[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(method.model, "forward", watched)
    assert [method.generate(q, c, max_new_tokens=8) for q, c in zip(queries, contexts)] == separate
    apart = sum(read)
    read.clear()
    assert method.generate(queries, contexts, max_new_tokens=8) == separate
    assert sum(read) < apart - len(method.tokenizer(CONTEXTS[0])["input_ids"]) + 10
    read.clear()
    kept = {}
    assert method.generate(queries, contexts, max_new_tokens=8, readers=kept) == separate
    read.clear()
    assert method.generate(queries[0], contexts[0], max_new_tokens=1, readers=kept) in separate[0]
    assert sum(read) < 40
    assert method.generate(queries[0], contexts[0], max_new_tokens=8, readers=kept) == separate[0]


def test_long_prompts_are_read_in_pieces_and_few_logits_are_made(method, monkeypatch):
    passes, real = [], method.model.forward

    @wraps(real)
    def watched(*args, **kwargs):
        passes.append((kwargs["input_ids"].shape[1], kwargs["logits_to_keep"]))
        return real(*args, **kwargs)

    whole = method.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=6)
    monkeypatch.setattr(method.model, "forward", watched)
    method.prefill_tokens = 16
    assert method.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=6) == whole
    assert max(read for read, _ in passes) == 16
    assert max(kept for _, kept in passes) == method.gamma + 1


def test_as_custom_generate(method):
    """Through transformers' own `generate`: padded prompts, output objects, and what is refused there."""
    tokenizer, model = method.tokenizer, method.model
    text = make(model, tokenizer)[2][0]
    long, short = torch.tensor([tokenizer(text)["input_ids"]]), next(short_of(method))
    options = {"custom_generate": method, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = method.generate(QUERIES[0], CONTEXTS[0], max_new_tokens=8, details=True).tokens
    plain = model.generate(long, drafter_input_ids=short, **options)
    assert torch.equal(plain[0, : long.shape[1]], long[0])
    assert torch.equal(plain[0, long.shape[1] :], expected)

    def padded(ids, before, after):
        ids = torch.nn.functional.pad(ids, (before, after))
        mask = torch.ones_like(ids)
        mask[:, :before], mask[:, ids.shape[1] - after :] = 0, 0
        return ids, mask

    (long_ids, long_mask), (short_ids, short_mask) = padded(long, 5, 0), padded(short, 2, 3)
    output = model.generate(
        long_ids, attention_mask=long_mask, drafter_input_ids=short_ids, drafter_attention_mask=short_mask,
        return_dict_in_generate=True, output_scores=True, min_new_tokens=3, **options,
    )  # fmt: skip
    assert torch.equal(output.sequences[0, long_ids.shape[1] :], expected)
    assert len(output.scores) == 8
    assert all(scores.shape == (1, 400) for scores in output.scores)
    assert output.scores[0][0, 2] == -math.inf  # no end within the first three tokens
    assert output.scores[5][0, 2] > -math.inf
    for wrong, message in (
        ({"inputs": long.repeat(2, 1), "drafter_input_ids": short}, "input_ids = .* is a batch"),
        ({"inputs": long, "drafter_input_ids": short.repeat(2, 1)}, "drafter_input_ids = .* is a batch"),
        ({"inputs": long}, "drafter_input_ids = None is missing"),
        (
            {"inputs": long, "drafter_input_ids": short, "num_return_sequences": 2, "do_sample": True},
            "is a batch",
        ),
        ({"inputs": long, "drafter_input_ids": short.repeat(1, 40)}, "512 positions"),
    ):
        with pytest.raises(BadInput, match=message):
            model.generate(**{**options, **wrong})
    cache = model(long[:, :3]).past_key_values
    with pytest.raises(NotApplicable, match="past_key_values"):
        model.generate(long, drafter_input_ids=short, past_key_values=cache, **options)
    for refused in ({"num_return_sequences": 2}, {"assistant_model": model}, {"num_beams": 2}):
        with pytest.raises(NotApplicable):
            method.generate(QUERIES[0], CONTEXTS[0], **refused)


def test_run_answers_files_of_questions(tiny_lm, tiny_tokenizer, tmp_path):
    """`transfuse run`: contexts are the documents that questions name."""
    model = tiny_lm("llama", layers=2)
    method, inputs, _ = make(model, tiny_tokenizer)
    documents, questions = tmp_path / "documents.jsonl", tmp_path / "questions.jsonl"
    documents.write_text(
        "".join(json.dumps({"id": str(i), "text": c}) + "\n" for i, c in enumerate(CONTEXTS))
    )
    rows = [{"question": q, "answers": ["x"], "document_ids": [str(i)]} for i, q in enumerate(QUERIES)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = transfer(
        model, tiny_tokenizer, questions=questions, documents=documents, output=tmp_path / "out", max_new_tokens=6,
        method=lambda model, tokenizer: make(model, tokenizer)[0],
    )  # fmt: skip
    answers = [json.loads(line)["answer"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert answers == method.generate(*inputs, max_new_tokens=6)


def test_an_empty_context_is_the_query_alone(method):
    with pytest.warns(UserWarning, match="context is empty"):
        answer = method.generate(QUERIES[0], " ", max_new_tokens=6, details=True)
    assert answer.text == generate_texts(method.model, method.tokenizer, [QUERIES[0]], max_new_tokens=6)[0]
    assert answer.acceptance == 1


def test_bad_input_is_refused_before_decoding(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama", layers=1)
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for wrong, message in (
        ({"eta": -0.1}, "eta = -0.1"),
        ({"eta": math.nan}, "eta = nan"),
        ({"eta": math.inf}, "eta = inf"),
        ({"gamma": -1}, "gamma = -1"),
        ({"tail": "code"}, "tail = 'code'"),
        ({"prefill_tokens": 0}, "prefill_tokens = 0"),
        ({"prompt": "{query}"}, "prompt = '{query}' lacks {context}"),
        ({"chat": True}, "chat = True needs a chat template"),
        ({"system": "Be brief."}, "system = 'Be brief.'"),
        ({"retriever": BM25ChunkRetriever(0)}, "chunk_tokens = 0"),
        ({"retriever": ChunkRetriever(max_tokens=0)}, "max_tokens = 0"),
        ({"retriever": ChunkRetriever(threshold=math.nan)}, "threshold = nan"),
    ):
        with pytest.raises(BadInput) as caught:
            RAPID(model, tiny_tokenizer, **wrong).generate("q", "a context")
        assert str(caught.value).startswith(message)
    method = make(model, tiny_tokenizer)[0]
    for arguments, message in (
        ((["a", "b"], ["c"]), "contexts"),
        ((["a"], "c"), "contexts"),
        (([], []), "queries"),
        (("mayor", "the mayor of Port Ellery " * 100), "512 positions"),
    ):
        with pytest.raises(BadInput, match=message):
            method.generate(*arguments)
    with pytest.raises(BadInput, match="batch_size = 0"):
        method.generate("a", "c", batch_size=0)
    for name in ("query", "document"):
        with pytest.raises(BadInput, match=f"{name} = ' ' is empty"):
            BM25ChunkRetriever().chunks(
                **{"query": "a", "document": "b", "tokenizer": tiny_tokenizer, name: " "}
            )
    z, q = torch.zeros(2, 4), torch.full((2, 4), 0.25)
    for call, message in (
        (lambda: corrected(z, q, -1.0), "eta = -1.0"),
        (lambda: corrected(z, q, 1.0, 0.0), "temperature = 0.0"),
        (lambda: corrected(z, q, 1.0, math.nan), "temperature = nan"),
        (lambda: corrected(z, q, 1.0, 1.0, "none"), "tail = 'none'"),
        (lambda: corrected(z, q[:1]), "q = "),
        (lambda: verify(torch.zeros(1, 2, dtype=torch.long), q[None], z[None]), "z = "),
        (lambda: verify(torch.zeros(1, 1, dtype=torch.long), q[None], z[None]), "z = "),
    ):
        with pytest.raises(BadInput) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_defaults_are_the_papers():
    found = {name: p.default for name, p in inspect.signature(RAPID).parameters.items()}
    assert (found["gamma"], found["eta"], found["tail"], found["drafter"]) == (10, 10.0, "paper", None)


def test_an_adapter_is_part_of_the_model(tiny_lm, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny_lm("llama", layers=2), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator(3))
    method, inputs, _ = make(adapted.eval(), tiny_tokenizer)
    answers = method.generate(*inputs, max_new_tokens=8)
    with adapted.disable_adapter():
        assert method.generate(*inputs, max_new_tokens=8) != answers
    merged, _, _ = make(adapted.merge_and_unload(), tiny_tokenizer)
    assert merged.generate(*inputs, max_new_tokens=8) == answers


# --- the real model -----------------------------------------------------------------------------------------


def test_smollm_at_eta_0_is_transformers_own(smollm):
    """Prompt-wise: float32, as bf16 rounds differently in passes of one token and of several."""
    model, tokenizer = smollm
    model.float()
    context = "The old lighthouse keeper wrote letters every winter. " * 6
    context += "The access code of the observatory is 7341. " + "It rained for a week. " * 6
    query = (
        "Question: What is the access code of the observatory?\nAnswer: The access code of the observatory is"
    )
    method = RAPID(model, tokenizer, retriever=BM25ChunkRetriever(32, max_tokens=64))
    ids = torch.tensor([tokenizer(method.prompt.format(context=context, query=query))["input_ids"]])
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    ours = method.neutral().generate(query, context, max_new_tokens=9, details=True)
    assert torch.equal(ours.tokens, expected)
    assert ours.passes_per_token < 1
    steered = method.generate(query, context, max_new_tokens=9, details=True)
    assert "7341" in steered.text
    assert steered.acceptance >= ours.acceptance
    assert steered.prompt_tokens[1] < steered.prompt_tokens[0]
