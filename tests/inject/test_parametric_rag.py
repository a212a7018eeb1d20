"""Parametric RAG: sequences by hand, the loss and the sum by slow loops, the store, the three modes, refusals."""

from __future__ import annotations

import copy
import json
import math
import os

import pytest
import torch

from transfuse.core.data import QA, Document
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, TrainingDiverged
from transfuse.core.files import read_tensors, write_tensors
from transfuse.core.generate import generate_texts, target_nll
from transfuse.core.llm import Local, Scripted
from transfuse.core.llm.backend import completion
from transfuse.core.metrics import perplexity
from transfuse.core.retrieval import BM25, Hit
from transfuse.inject import _encode, _lora, transfer
from transfuse.inject._lora import initial_factors
from transfuse.inject.parametric_rag import (
    AdapterHandle,
    AdapterStore,
    Augmentation,
    DocumentParameterizer,
    Given,
    LLMAugmenter,
    ParametricRAG,
    Triple,
    chat_prompt,
    cloze_prompt,
    extract_answer,
    merge_adapters,
    plain_prompt,
    plan,
)

DOCUMENTS = [
    Document("The mayor of Port Ellery is Ines Varro.", title="Port Ellery", id="a"),
    Document("The bridge over the river Ostrin was built by Oskar Tveld.", id="b"),
    Document("Paris is the capital of France.", id="c"),
    Document("Madrid is the capital of Spain.", id="d"),
]
TRIPLES = {
    "a": [
        Triple("Who is the mayor of Port Ellery", "Ines Varro"),
        Triple("Where is Varro mayor?", "Port Ellery"),
    ],
    "b": [Triple("Who built the bridge over the Ostrin", "Oskar Tveld")],
    "c": [Triple("What is the capital of France", "Paris")],
    "d": [Triple("What is the capital of Spain", "Madrid")],
}
QUESTIONS = [
    "who is the mayor of Port Ellery",
    "who built the bridge over Ostrin",
    "what is the capital of France",
    "the mayor of Ellery?",
]


def parameterizer(model, tokenizer, **settings):
    return DocumentParameterizer(model, tokenizer, Given(TRIPLES), **{"lr": 3e-3, "epochs": 2, **settings})


def make(model, tokenizer, folder):
    return parameterizer(model, tokenizer).encode(DOCUMENTS[:2], folder), DOCUMENTS[:2]


@pytest.fixture
def model(tiny_lm):
    return tiny_lm("llama", layers=2)


@pytest.fixture
def store(model, tiny_tokenizer, tmp_path):
    return parameterizer(model, tiny_tokenizer).encode(DOCUMENTS, tmp_path / "store")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def test_plan_order_by_hand():
    document = Document("original", title="T")
    triples = tuple(Triple(f"q{i}", f"a{i}", f"s{i}") for i in (1, 2, 3))
    code = plan(document, Augmentation(triples, ("rewrite",)))
    assert code == [
        (("T\noriginal",), "q1", "a1."),
        (("rewrite",), "q1", "a1."),
        (("T\noriginal",), "q2", "a2."),
        (("rewrite",), "q2", "a2."),
        ((), "q3", "a3."),
    ]
    product = plan(document, Augmentation(triples, ("rewrite",)), kind="product", cot=True)
    assert [(p[0], q, a) for p, q, a in product] == [
        (text, f"q{i}", f"s{i}.") for i in (1, 2, 3) for text in ("T\noriginal", "rewrite")
    ]
    for count, passages in ((1, 1), (2, 1), (4, 2), (5, 3)):
        made = plan(document, Augmentation(tuple(Triple(f"q{i}", "a") for i in range(count))))
        assert sum(bool(p) for p, _, _ in made) == passages
        assert len(made) == count


def test_answers_end_in_one_stop_and_questions_in_one_mark():
    document = Document("x")
    (sequence,) = plan(document, Augmentation((Triple("q", "  St. Petersburg. "),)))
    assert sequence[2] == "St. Petersburg."
    (sequence,) = plan(document, Augmentation((Triple("q", "yes", ""),)), cot=True)
    assert sequence[2] == "yes."
    for question in ("Who", "Who?", " Who? "):
        assert plain_prompt(question) == "Question: Who?\nAnswer: The answer is"
    assert (
        plain_prompt("Who", ["P.", "Q."], cot=True) == "Passage 1: P.\nPassage 2: Q.\nQuestion: Who?\nAnswer:"
    )
    assert cloze_prompt("The mayor is", ["P."]) == "P.\nThe mayor is"


def test_chat_prompt_uses_the_template_and_adds_no_second_begin(tiny_tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = chat_prompt(tokenizer, "Who", ["P."])
    assert text.startswith("<s><user>")
    assert text.endswith("Question: Who?<assistant>The answer is")
    assert "Passage 1: P.\n" in text
    assert chat_prompt(tokenizer, "Who", cot=True).endswith("<assistant>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = tokenizer(chat_prompt(tokenizer, "Who"))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("text", "short", "reasoned"),
    [
        ("Ines Varro. She was born", "Ines Varro", "Ines Varro"),
        ("He left, so the answer is: Paris\nQuestion", "He left", "Paris"),
        ("the answer is Oskar Tveld, the answer is Rome", "the answer is Oskar Tveld", "Oskar Tveld"),
        ("The answer is Oskar Tveld, who", "The answer is Oskar Tveld", "The answer is Oskar Tveld"),
        (" : Madrid", "Madrid", "Madrid"),
        ("\nMadrid", "Madrid", "Madrid"),
        ("Madrid the answer is", "Madrid the answer is", ""),
        ("", "", ""),
    ],
)
def test_extract_answer(text, short, reasoned):
    """What precedes the answer is cut off after reasoning only, and as it is spelt."""
    assert extract_answer(text) == short
    assert extract_answer(text, cot=True) == reasoned


def slow_delta(adapters, module, scale, factors):
    """sum_i w_i s B_i A_i in float64, entry by entry."""
    outputs, inputs = adapters[0][module][1].shape[0], adapters[0][module][0].shape[1]
    delta = torch.zeros(outputs, inputs, dtype=torch.float64)
    for weight, adapter in zip(factors, adapters):
        a, b = (t.double().tolist() for t in adapter[module])
        for o in range(outputs):
            for i in range(inputs):
                delta[o, i] += weight * scale * sum(b[o][r] * a[r][i] for r in range(len(a)))
    return delta


def random_adapters(shapes, count, rank=2):
    adapters = []
    for seed in range(count):
        one, other = (initial_factors(shapes, rank=rank, seed=s) for s in (seed, 100 + seed))
        outs = initial_factors({n: (o, i) for n, (i, o) in shapes.items()}, rank=rank, seed=200 + seed)
        adapters.append({n: (one[n][0] + other[n][0], outs[n][0].T.contiguous()) for n in shapes})
    return adapters


def test_rank_concatenation_is_the_sum_of_updates():
    adapters = random_adapters({"up": (5, 7), "down": (7, 5)}, 3)
    for factors in (None, [0.5, -2.0, 1.25]):
        merged = merge_adapters(adapters, scale=16.0, weights=factors)
        for module, (a, b) in merged.items():
            assert a.shape[0] == b.shape[1] == 6
            expected = slow_delta(adapters, module, 16.0, factors or [1.0] * 3)
            assert (b.double() @ a.double() - expected).abs().max() < 1e-5


def test_peft_agrees_with_our_merge(model):
    """PEFT's own `cat` of the same adapters, as a second implementation."""
    from peft import LoraConfig, get_peft_model

    shapes = {f"model.layers.{i}.mlp.down_proj": (96, 32) for i in range(2)}
    adapters = random_adapters(shapes, 3)
    ids = torch.tensor([[5, 6, 7, 8]])
    config = LoraConfig(r=2, lora_alpha=32, target_modules=["down_proj"])
    wrapped = get_peft_model(model, config, adapter_name="0")
    for name in ("1", "2"):
        wrapped.add_adapter(name, config)
    for i, adapter in enumerate(adapters):
        for module, (a, b) in adapter.items():
            layer = wrapped.base_model.model.get_submodule(module)
            layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = a, b
    factors = [1.0, 0.5, 2.0]
    wrapped.add_weighted_adapter(["0", "1", "2"], factors, "sum", combination_type="cat")
    wrapped.set_adapter("sum")
    theirs = wrapped(input_ids=ids).logits
    plain = wrapped.unload()
    from transfuse.inject._lora import LoraSlot

    with LoraSlot(plain, targets=["down_proj"], rank=6, scale=1.0) as slot:
        slot.fill(merge_adapters(adapters, scale=16.0, weights=factors))
        ours = plain(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - plain(input_ids=ids).logits).abs().max() > 1e-2


def test_attached_sum_is_the_model_with_changed_weights(model, store):
    """The whole path from files to logits, against weights edited in float64."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with store.apply(model, DOCUMENTS[:3]):
        attached = model(input_ids=ids).logits
    adapters = [store.get(document) for document in DOCUMENTS[:3]]
    with torch.no_grad():
        for module in adapters[0]:
            weight = model.get_submodule(module).weight
            delta = sum(16.0 * b.double() @ a.double() for a, b in (x[module] for x in adapters))
            weight.copy_((weight.double() + delta).float())
    assert (model(input_ids=ids).logits - attached).abs().max() < 1e-4


def test_loss_covers_every_token(model, tiny_tokenizer, tmp_path):
    """The first loss noted down equals the mean over all tokens of the plain model, by a loop."""
    document = Document("Quenby.", id="a")
    given = Given({"a": [Triple("Who", "Varro")]})
    made = DocumentParameterizer(model, tiny_tokenizer, given).encode([document], tmp_path / "s")
    ids = tiny_tokenizer("Passage 1: Quenby.\nQuestion: Who?\nAnswer: The answer is Varro.")["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for position in range(1, len(ids)):
        row = logits[position - 1].tolist()
        top = max(row)
        total -= row[ids[position]] - top - math.log(sum(math.exp(x - top) for x in row))
    header = made.read(document)[1]
    assert header["tokens"] == len(ids)
    assert header["first_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_all_documents_start_from_one_initialisation(model, tiny_tokenizer, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        _encode,
        "optimise",
        lambda parameters, loss, **_: seen.append([p.detach().clone() for p in parameters]) or [1.0],
    )
    made = parameterizer(model, tiny_tokenizer, seed=3).encode(DOCUMENTS, tmp_path / "s")
    assert len(seen) == 4
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    first = made.get(DOCUMENTS[0])
    assert all((b == 0).all() and a.abs().max() > 0 for a, b in first.values())
    initial = made.initial()
    assert initial is not None
    assert all(torch.equal(first[m][0], initial[m][0]) for m in first)
    bound = 1 / math.sqrt(32)
    a = initial["model.layers.0.mlp.gate_proj"][0]
    assert a.shape == (2, 32)
    assert a.abs().max() <= bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_encoding_is_repeatable_and_leaves_the_model_alone(model, tiny_tokenizer, tmp_path):
    model.train()
    before, state = weights(model), torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    one = parameterizer(model, tiny_tokenizer).encode(DOCUMENTS, tmp_path / "one")
    two = parameterizer(model, tiny_tokenizer).encode(DOCUMENTS[::-1], tmp_path / "two")
    assert unchanged(model, before)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    for document in DOCUMENTS:  # neither the order nor the company matters
        left, right = one.get(document), two.get(document)
        assert all(torch.equal(x, y) for m in left for x, y in zip(left[m], right[m], strict=True))
        header = one.read(document)[1]
        assert header["last_loss"] < header["first_loss"]


def nll(model, tokenizer, question, answer):
    return float(target_nll(model, tokenizer, [plain_prompt(question)], [answer])[0].mean())


def test_own_adapter_knows_its_document(model, tiny_tokenizer, tmp_path):
    made = parameterizer(model, tiny_tokenizer, epochs=30, lr=1e-2).encode(DOCUMENTS[:2], tmp_path / "s")
    for document in DOCUMENTS[:2]:
        triple = TRIPLES[document.id][0]
        closed = nll(model, tiny_tokenizer, triple.question, triple.answer)
        with made.apply(model, [document]):
            own = nll(model, tiny_tokenizer, triple.question, triple.answer)
        with made.apply(model, [document], scale=0.0):
            nothing = nll(model, tiny_tokenizer, triple.question, triple.answer)
        assert own < 0.75 * closed
        assert nothing == pytest.approx(closed, rel=1e-6)


def test_bfloat16_base_keeps_float32_factors(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama", layers=2).to(torch.bfloat16)
    made = parameterizer(model, tiny_tokenizer).encode(DOCUMENTS[:2], tmp_path / "s")
    assert {t.dtype for pair in made.get(DOCUMENTS[0]).values() for t in pair} == {torch.float32}
    with made.apply(model, DOCUMENTS[:2]):
        assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16


def test_gpt2_by_its_own_layer_names(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("gpt2", layers=2)
    made = parameterizer(model, tiny_tokenizer, targets=["c_fc"]).encode(DOCUMENTS[:1], tmp_path / "s")
    assert made.get(DOCUMENTS[0])["transformer.h.0.mlp.c_fc"][1].shape == (128, 2)
    plain = model(input_ids=torch.tensor([[5, 6]])).logits
    with made.apply(model, DOCUMENTS[:1]):
        assert (model(input_ids=torch.tensor([[5, 6]])).logits - plain).abs().max() > 1e-4


def test_an_interrupted_encoding_goes_on(model, tiny_tokenizer, tmp_path, monkeypatch):
    whole = parameterizer(model, tiny_tokenizer).encode(DOCUMENTS, tmp_path / "whole")
    real, calls, before = _encode.optimise, [], weights(model)

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(_encode, "optimise", dying)
    with pytest.raises(KeyboardInterrupt):
        parameterizer(model, tiny_tokenizer).encode(DOCUMENTS, tmp_path / "s")
    assert unchanged(model, before)
    assert len(AdapterStore(tmp_path / "s")) == 2
    seen = []
    resumed = parameterizer(model, tiny_tokenizer).encode(
        DOCUMENTS, tmp_path / "s", on_document=lambda done, of: seen.append((done, of))
    )
    assert len(calls) == 5  # two, the one that died, and the two that were missing
    assert seen == [(1, 2), (2, 2)]
    for document in DOCUMENTS:
        left, right = whole.get(document), resumed.get(document)
        assert all(torch.equal(x, y) for m in left for x, y in zip(left[m], right[m], strict=True))
    parameterizer(model, tiny_tokenizer).encode(DOCUMENTS, tmp_path / "s")
    assert len(calls) == 5


def test_other_questions_mean_encoding_again(model, tiny_tokenizer, tmp_path):
    made = parameterizer(model, tiny_tokenizer).encode(DOCUMENTS[:2], tmp_path / "s")
    old = made.get(DOCUMENTS[0])
    other = Given({**TRIPLES, "a": [Triple("Who leads Port Ellery", "Ines Varro")]})
    seen = []
    DocumentParameterizer(model, tiny_tokenizer, other, lr=3e-3, epochs=2).encode(
        DOCUMENTS[:2], made, on_document=lambda done, of: seen.append(of)
    )
    assert seen == [1]
    assert not torch.equal(
        old["model.layers.0.mlp.up_proj"][1], made.get(DOCUMENTS[0])["model.layers.0.mlp.up_proj"][1]
    )


def test_a_skipped_document_leaves_no_adapter_and_can_come_back(model, tiny_tokenizer, tmp_path):
    class Half(Given):
        def augment(self, documents):
            return [None if document.id == "a" else self._of(document) for document in documents]

        def keys(self, documents):
            return ["other"] * len(documents)

    first = Given(TRIPLES)
    made = DocumentParameterizer(model, tiny_tokenizer, first).encode(DOCUMENTS[:2], tmp_path / "s")
    DocumentParameterizer(model, tiny_tokenizer, Half(TRIPLES)).encode(DOCUMENTS[:2], made)
    assert list(made.skipped) == [DOCUMENTS[0].hash] and DOCUMENTS[0] not in made and DOCUMENTS[1] in made
    DocumentParameterizer(model, tiny_tokenizer, first).encode(DOCUMENTS[:2], made)
    assert not made.skipped and DOCUMENTS[0] in made


def test_a_store_need_not_be_writable_to_be_read(model, tiny_tokenizer, store, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with AdapterStore(store.folder).apply(model, DOCUMENTS[:1]) as handle:
        assert handle.active
    with pytest.raises(BadInput, match=r"store = .* cannot be written"):
        parameterizer(model, tiny_tokenizer).encode(DOCUMENTS, store.folder)


def test_a_store_belongs_to_one_model_initialisation_and_training(tiny_lm, model, tiny_tokenizer, store):
    with pytest.raises(IncompatibleModels, match="another base model"):
        parameterizer(tiny_lm("llama", layers=2, seed=1), tiny_tokenizer).encode(DOCUMENTS, store)
    with pytest.raises(IncompatibleModels, match="another initialisation"):
        parameterizer(model, tiny_tokenizer, seed=1).encode(DOCUMENTS, store)
    with pytest.raises(BadInput, match=r"epochs 2 \(now 3\), lr 0.003 \(now 0.001\)"):
        parameterizer(model, tiny_tokenizer, epochs=3, lr=1e-3).encode(DOCUMENTS, store)
    with pytest.raises(BadInput, match="prompt"):
        parameterizer(model, tiny_tokenizer, render=cloze_prompt).encode(DOCUMENTS, store)
    extra = Document("Rome is the capital of Italy.", id="e")
    given = Given({"e": [Triple("What is the capital of Italy", "Rome")]})
    DocumentParameterizer(
        model, tiny_tokenizer, given, lr=3e-3, epochs=2, initial=store.initial(), seed=9
    ).encode([extra], store)
    assert extra in store
    with pytest.raises(IncompatibleModels, match="is not the model that"):
        store.apply(tiny_lm("llama", layers=2, seed=1), DOCUMENTS[:1])


def test_an_initialisation_that_does_not_fit_is_refused_before_any_work(model, tiny_tokenizer, tmp_path):
    class Asked(Given):
        def augment(self, documents):
            raise AssertionError("asked")

    shapes = {name: (a.shape[1], b.shape[0]) for name, (a, b) in parameterizer(model, tiny_tokenizer).warm_up(
        TRIPLES["a"]).items()}  # fmt: skip
    wider = initial_factors(shapes, rank=4, seed=0)
    fewer = dict(list(initial_factors(shapes, rank=2, seed=0).items())[1:])
    for initial in (wider, fewer):
        encoder = DocumentParameterizer(model, tiny_tokenizer, Asked(TRIPLES), initial=initial)
        with pytest.raises(IncompatibleModels, match=r"^initial = .* layers at rank 2; give one"):
            encoder.encode(DOCUMENTS, tmp_path / "s")
    assert not (tmp_path / "s").exists()  # bound to such a start it would refuse every other


def test_warm_up_is_a_new_initialisation(model, tiny_tokenizer, store, tmp_path):
    base = parameterizer(model, tiny_tokenizer)
    warm = base.warm_up([Triple("What is the capital of Peru", "Lima"), Triple("What is 2 + 2", "4")])
    made = parameterizer(model, tiny_tokenizer, initial=warm).encode(DOCUMENTS[:1], tmp_path / "warm")
    assert made.manifest["init"] != store.manifest["init"]
    initial = made.initial()
    assert initial is not None
    assert all(torch.equal(initial[m][1], warm[m][1]) for m in warm)
    assert any(b.abs().max() > 0 for _, b in warm.values())


def test_warm_up_learns_to_stop(model, tiny_tokenizer, monkeypatch):
    """Its first loss by hand: the mean over prompt, answer and the end token. Documents' sequences lack that token."""
    losses = []
    monkeypatch.setattr(_encode, "optimise", lambda _, loss, **__: losses.append(loss().item()) or [1.0])
    base = parameterizer(model, tiny_tokenizer)
    base.warm_up([Triple("What is the capital of Peru", "Lima")])
    ids = tiny_tokenizer("Question: What is the capital of Peru?\nAnswer: The answer is Lima.")["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([[*ids, tiny_tokenizer.eos_token_id]])).logits[0].double().log_softmax(-1)
    each = [-float(scores[i, token]) for i, token in enumerate([*ids[1:], tiny_tokenizer.eos_token_id])]
    assert losses == [pytest.approx(sum(each) / len(each), rel=1e-5)]
    assert losses[0] != pytest.approx(sum(each[:-1]) / len(each[:-1]), rel=1e-4)
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(BadInput, match="end-of-text"):
        parameterizer(model, endless).warm_up([Triple("Who", "x")])


def test_damaged_and_foreign_files_are_named(model, store):
    path = store.path(DOCUMENTS[1])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match=path.name):
        store.apply(model, DOCUMENTS[:2])
    tensors, header = read_tensors(store.path(DOCUMENTS[0]))
    write_tensors(path, tensors, header)  # the adapter of another document under this name
    with pytest.raises(IncompatibleModels, match="another hash"):
        store.apply(model, DOCUMENTS[:2])
    for field in ("base", "init"):
        write_tensors(store.path(DOCUMENTS[0]), tensors, {**header, field: "0" * 64})
        with pytest.raises(IncompatibleModels, match=f"another {field}"):
            store.get(DOCUMENTS[0])
    write_tensors(store.path(DOCUMENTS[0]), {"x": torch.zeros(2)}, header)
    with pytest.raises(CorruptFile, match="low-rank factors"):
        store.get(DOCUMENTS[0])
    manifest = store.folder / "manifest.json"
    for text in ('{"format": 1', '{"format": 9}', "[]"):
        manifest.write_text(text)
        with pytest.raises(CorruptFile, match="manifest"):
            store.get(DOCUMENTS[2])


class Fixed:
    """Retrieves listed documents, whatever the question; names only the ones in it."""

    def __init__(self, documents, order):
        self.documents, self.order = documents, order

    def search(self, queries, k):
        if k > len(self.documents):
            raise BadInput("k", k, "exceeds", "use less")
        return [[Hit(self.documents[i], -rank) for rank, i in enumerate(self.order[q])][:k] for q in queries]


def test_modes_put_knowledge_where_they_say(model, tiny_tokenizer, store):
    index, seen = BM25(DOCUMENTS), {}
    for mode in ("parametric", "context", "combine"):
        rag = ParametricRAG(model, index, store, tiny_tokenizer, mode=mode, k=2)
        seen[mode] = rag.measure(
            QUESTIONS[:1], lambda prompts, _: [(prompts[0], float(model(torch.tensor([[5]])).logits.sum()))]
        )[0]
    plain = float(model(torch.tensor([[5]])).logits.sum())
    question = "Question: who is the mayor of Port Ellery?\nAnswer: The answer is"
    assert seen["parametric"][0] == question
    assert seen["context"][0].startswith(
        "Passage 1: Port Ellery\nThe mayor of Port Ellery is Ines Varro.\nPassage 2: "
    )
    assert seen["combine"][0] == seen["context"][0]
    assert seen["context"][0].endswith(question)
    assert seen["context"][1] == plain
    assert seen["parametric"][1] == seen["combine"][1] != plain


def test_batched_answers_are_the_single_ones(model, tiny_tokenizer, store):
    before = weights(model)
    for mode in ("parametric", "context", "combine"):
        rag = ParametricRAG(model, BM25(DOCUMENTS), store, tiny_tokenizer, mode=mode, k=2)
        together = rag.answers(QUESTIONS)
        assert [a.text for a in together] == [rag.answer(question).text for question in QUESTIONS]
        for question, answer in zip(QUESTIONS, together):
            hits = BM25(DOCUMENTS).search([question], 2)[0]
            assert list(answer.citations) == hits
            assert answer.trace["mode"] == mode
            assert answer.trace["adapters"] == (0 if mode == "context" else 2)
            json.dumps(answer.trace)
        assert rag.answers([]) == []
    assert unchanged(model, before)
    assert together[0].trace["prompt_tokens"] > 40


def test_answers_are_those_of_the_attached_model(model, tiny_tokenizer, store):
    rag = ParametricRAG(model, BM25(DOCUMENTS), store, tiny_tokenizer, k=1)
    (answer,) = rag.answers(QUESTIONS[:1], max_new_tokens=5)
    with store.apply(model, DOCUMENTS[:1]):
        expected = generate_texts(model, tiny_tokenizer, [plain_prompt(QUESTIONS[0])], max_new_tokens=5)
    assert answer.text == expected[0]
    assert (
        answer.text
        != generate_texts(model, tiny_tokenizer, [plain_prompt(QUESTIONS[0])], max_new_tokens=5)[0]
    )


def test_same_documents_share_a_batch_and_weights_follow_the_rank(model, tiny_tokenizer, store):
    retriever = Fixed(DOCUMENTS, {"p": [0, 1], "q": [1, 0], "r": [2, 3]})
    for factors, groups in ((None, [[0, 1], [2]]), ((1.0, 0.25), [[0], [1], [2]])):
        rag = ParametricRAG(
            model, retriever, store, tiny_tokenizer, k=2, weights=factors, render=cloze_prompt
        )
        calls = []

        def look(prompts, indices, calls=calls):
            calls.append(list(indices))
            return [float(model(torch.tensor([[5, 6]])).logits[0, -1, 0])] * len(prompts)

        p, q, r = rag.measure(["p", "q", "r"], look)
        assert calls == groups
        assert (p == q) == (factors is None)
        assert r not in (p, q)
        with store.apply(model, [DOCUMENTS[1], DOCUMENTS[0]], weights=factors):
            assert float(model(torch.tensor([[5, 6]])).logits[0, -1, 0]) == pytest.approx(q, abs=1e-5)


def test_a_document_that_stands_twice_is_added_once(model, tiny_tokenizer, store):
    """Its copy yields its place to the next document, however many copies there are."""
    copies = [Document(DOCUMENTS[0].text, title=DOCUMENTS[0].title, id=f"copy {i}") for i in range(5)]
    documents = [DOCUMENTS[0], *copies, *DOCUMENTS[1:]]
    retriever = Fixed(documents, {"p": [0, 1, 6, 2, 3, 4, 5, 7, 8], "q": [7, 6, 0, 1, 2, 3, 4, 5, 8]})
    rag = ParametricRAG(model, retriever, store, tiny_tokenizer, k=2, render=cloze_prompt)
    p, q = rag.retrieve(["p", "q"])
    assert [hit.document.id for hit in p] == ["a", "b"] and [hit.document.id for hit in q] == ["c", "b"]
    attached = rag.measure(["p"], lambda prompts, _: [model(torch.tensor([[5, 6]])).logits])[0]
    with store.apply(model, sorted(DOCUMENTS[:2], key=lambda d: d.hash)):
        assert torch.allclose(model(torch.tensor([[5, 6]])).logits, attached, atol=1e-6)
    with pytest.raises(BadInput, match="k = 5 exceeds the 4 different documents"):
        ParametricRAG(model, retriever, store, tiny_tokenizer, k=5).retrieve(["p"])


@pytest.mark.parametrize("allocations", [0, 1, 3])
def test_an_error_while_attaching_leaves_the_model_as_it_was(model, store, monkeypatch, allocations):
    model.train()
    model.model.layers[1].eval()
    next(model.parameters()).requires_grad_(False)
    before, own = weights(model), dict(model.named_modules())
    kept = [
        dict(vars(model)),
        [m.training for m in own.values()],
        [p.requires_grad for p in model.parameters()],
    ]
    zeros, left = torch.zeros, iter(range(allocations))

    def scarce(*args, **kwargs):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no memory")
        return zeros(*args, **kwargs)

    factors = store.merged(DOCUMENTS[:2])
    monkeypatch.setattr(_lora.torch, "zeros", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        AdapterHandle(model, factors, base="x", method="m")
    monkeypatch.undo()
    assert unchanged(model, before)
    assert all(module is own[name] for name, module in model.named_modules())
    now = [
        dict(vars(model)),
        [m.training for m in own.values()],
        [p.requires_grad for p in model.parameters()],
    ]
    assert now == kept
    with store.apply(model, DOCUMENTS[:1]):
        pass
    assert (
        now == kept
        and unchanged(model, before)
        and all(module is own[name] for name, module in model.named_modules())
    )


def test_an_error_while_answering_leaves_no_adapter(model, tiny_tokenizer, store):
    model.train()
    before = weights(model)
    rag = ParametricRAG(model, BM25(DOCUMENTS), store, tiny_tokenizer, k=2)

    def fail(prompts, indices):
        assert not model.training
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rag.measure(QUESTIONS, fail)
    assert unchanged(model, before)
    assert model.training
    store.path(DOCUMENTS[0]).write_bytes(b"short")
    with pytest.raises(CorruptFile):
        rag.answers(QUESTIONS[1:] + QUESTIONS[:1])
    assert unchanged(model, before)


def test_too_many_adapters_are_refused(model, tiny_tokenizer, tmp_path):
    documents = [Document(f"Town {i} lies by the river Ostrin.", id=str(i)) for i in range(6)]
    given = Given({str(i): [Triple(f"Where lies town {i}", "by the river")] for i in range(6)})
    made = DocumentParameterizer(model, tiny_tokenizer, given).encode(documents, tmp_path / "s")
    text = "The capital of Spain is Madrid."
    before, plain = weights(model), perplexity(model, tiny_tokenizer, text)
    with made.apply(model, documents):
        expected = perplexity(model, tiny_tokenizer, text) / plain
    assert abs(expected - 1) > 1e-4

    def ask(**settings):
        rag = ParametricRAG(model, BM25(documents), made, tiny_tokenizer, neutral_text=text, **settings)
        return rag.answer("which town").trace

    assert ask(k=6)["perplexity_ratio"] == pytest.approx(expected, rel=1e-5)
    assert ask(k=6, scale=0.0)["perplexity_ratio"] == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(BadInput, match="perplexity of neutral text"):
        ask(k=6, perplexity_limit=expected - 1e-3)
    assert unchanged(model, before)
    assert "perplexity_ratio" not in ask(k=5, perplexity_limit=1e-9)


def qa_json(*triples):
    return json.dumps({"questions": [{"question": q, "answer": a, "full_answer": f} for q, a, f in triples]})


def test_augmenter_asks_again_and_gives_up(caplog, model, tiny_tokenizer, tmp_path):
    tries = {}

    def answer(prompt):
        name = next(d.id for d in DOCUMENTS if d.text in prompt)
        if "Reply with JSON" not in prompt:
            return f" In other words: {name}. "
        tries[name] = tries.get(name, 0) + 1
        if name == "a":
            return qa_json(("q1", "a1", "s1."), ("q1", "again", ""), (" ", "x", ""), ("q2", "a2", "s2"))
        if name == "b":
            return "no json" if tries[name] < 3 else qa_json(("q", "a", "s"))
        if name == "c":
            return qa_json(("", "", ""))
        return qa_json(("q", "a", "s"))

    augmenter = LLMAugmenter(Scripted(answer), retries=2, questions=4)
    results = augmenter.augment(DOCUMENTS)
    assert results[0] == Augmentation(
        (Triple("q1", "a1", "s1."), Triple("q2", "a2", "s2")), ("In other words: a.",)
    )
    assert results[1] is not None
    assert results[2] is None
    assert tries == {"a": 1, "b": 3, "c": 3, "d": 1}

    made = DocumentParameterizer(model, tiny_tokenizer, augmenter).encode(DOCUMENTS, tmp_path / "s")
    assert made.skipped == {DOCUMENTS[2].hash: DOCUMENTS[2].text}
    assert "skipped" in caplog.text
    assert DOCUMENTS[2] not in made
    assert len(made) == 3
    # The next retrieved document takes the slot of the one that was skipped.
    retriever = Fixed(DOCUMENTS, {"q": [2, 1, 0, 3]})
    for mode in ("parametric", "context"):
        answer = ParametricRAG(model, retriever, made, tiny_tokenizer, mode=mode, k=2).answer("q")
        assert [hit.document.id for hit in answer.citations] == ["b", "a"]
    with pytest.raises(BadInput, match="k = 4"):
        ParametricRAG(model, retriever, made, tiny_tokenizer, k=4).answer("q")
    with pytest.raises(BadInput, match="no usable question at all"):
        DocumentParameterizer(model, tiny_tokenizer, augmenter).encode(DOCUMENTS[2:3], tmp_path / "none")


def test_augmenter_is_asked_for_what_is_missing_only(model, tiny_tokenizer, tmp_path):
    backend = Scripted(lambda prompt: qa_json(("q", "a", "s")))
    first = DocumentParameterizer(model, tiny_tokenizer, LLMAugmenter(backend, rewrites=0))
    made = first.encode(DOCUMENTS[:2], tmp_path / "s")
    assert len(backend.requests) == 2
    first.encode(DOCUMENTS, made)
    assert len(backend.requests) == 4


class Listening(Scripted):
    """Keeps the limit of every request."""

    def __init__(self, takes=True):
        super().__init__(lambda prompt: qa_json(("q", "a", "s")))
        self.heard, self.takes_top_k = [], takes

    def _answer(self, rows, options):
        self.heard += [options.top_k] * len(rows)
        return super()._answer(rows, options)


def test_augmenter_samples_from_the_fifty_likeliest():
    """A server is asked for a limit only where one was given: not every one has such a setting."""
    for takes, given, wanted in (
        (True, None, 50), (True, 7, 7), (True, 0, None), (False, None, None), (False, 7, 7),
    ):  # fmt: skip
        backend = Listening(takes)
        augmenter = LLMAugmenter(backend, top_k=given)
        assert augmenter.augment(DOCUMENTS[:1])[0] is not None
        assert backend.heard == [wanted, wanted]  # questions, rewrite
        other = LLMAugmenter(backend, top_k=9)
        assert augmenter.keys(DOCUMENTS[:1]) != other.keys(DOCUMENTS[:1])
    with pytest.raises(BadInput, match="top_k"):
        LLMAugmenter(Scripted([]), top_k=-1)


def test_given_from_questions():
    questions = [
        QA("Who leads", ("Varro", "Ines Varro"), ("a", "b")),
        QA("Who built", ("Tveld",), ("b",)),
    ]
    given = Given.from_qa(questions, {"b": ["In other words.", " "]})
    one, two = given.augment(DOCUMENTS[:2])
    assert one == Augmentation((Triple("Who leads", "Varro"),))
    assert two == Augmentation(
        (Triple("Who leads", "Varro"), Triple("Who built", "Tveld")), ("In other words.",)
    )
    nameless = Document("No id.")
    assert Given({nameless.hash: [Triple("q", "a")]}).augment([nameless])[0] == Augmentation(
        (Triple("q", "a"),)
    )


def test_bad_settings_and_documents(model, tiny_tokenizer, tmp_path):
    folder = tmp_path / "s"

    def encode(documents=DOCUMENTS, given=TRIPLES, **settings):
        DocumentParameterizer(model, tiny_tokenizer, Given(given), **settings).encode(documents, folder)

    for settings in (
        {"rank": 0}, {"epochs": 0}, {"max_length": 0}, {"lr": 0.0}, {"alpha": -1.0}, {"plan": "all"},
        {"epochs": 1.5}, {"rank": 2.0},
        {"alpha": math.inf}, {"targets": []}, {"targets": ["mlp"]}, {"targets": ["nothing"]},
        {"targets": "up_proj"}, {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(BadInput, match=next(iter(settings))):
            encode(**settings)
        if settings.keys() & {"rank", "epochs", "lr", "alpha", "seed"}:
            with pytest.raises(BadInput, match=next(iter(settings))):
                DocumentParameterizer(model, tiny_tokenizer, Given(TRIPLES), **settings).warm_up(TRIPLES["a"])
    with pytest.raises(BadInput, match="documents = "):
        encode([])
    with pytest.raises(BadInput, match=r"documents\[1\]: text"):
        encode([DOCUMENTS[0], Document("  ", id="b")])
    with pytest.raises(BadInput, match=r"documents\[0\].*max_length = 10"):
        encode(max_length=10)
    with pytest.raises(BadInput, match=r"exceeds max_length = 40"):  # the document fits, its sequences do not
        encode([Document("Paris. " * 4, id="a")], max_length=40)
    with pytest.raises(BadInput, match=r"max_length = 512"):  # the model's own limit
        encode([Document("Paris is big. " * 300, id="a")])
    with pytest.raises(BadInput, match=r"triples = 'b' has no question"):
        encode(given={"a": TRIPLES["a"]})
    with pytest.raises(BadInput, match="empty part"):
        encode(given={**TRIPLES, "b": [Triple("Who", " ")]})
    assert not folder.exists()
    encode([Document("Paris is big. " * 300, id="a")], truncate=True)
    assert len(AdapterStore(folder)) == 1


def test_an_augmenter_without_questions_is_an_error(model, tiny_tokenizer, tmp_path):
    class Empty(Given):
        def augment(self, documents):
            return [Augmentation(())] * len(documents)

    with pytest.raises(BadInput, match="at least one triple"):
        DocumentParameterizer(model, tiny_tokenizer, Empty(TRIPLES)).encode(DOCUMENTS, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    for settings in ({"questions": 0}, {"rewrites": -1}, {"retries": -1}):
        with pytest.raises(BadInput, match=next(iter(settings))):
            LLMAugmenter(Scripted([]), **settings)


def test_bad_requests_for_answers(model, tiny_tokenizer, store, tmp_path):
    def rag(**settings):
        return ParametricRAG(model, BM25(DOCUMENTS), settings.pop("store", store), tiny_tokenizer, **settings)

    for settings, named in (
        ({"mode": "both"}, "mode"), ({"store": None}, "store"), ({"k": 5}, "k"), ({"k": 0}, "k"),
        ({"batch_size": 0}, "batch_size"),
        ({"k": 2, "weights": [1.0]}, "weights"), ({"store": AdapterStore(tmp_path / "new")}, "is empty"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=named):
            rag(**settings).answer("who")
    assert rag(store=None, mode="context", k=1).answer("Varro").citations[0].document == DOCUMENTS[0]
    with pytest.raises(BadInput, match=r"questions|queries"):
        rag().answer(" ")
    unknown = Document("Lima is the capital of Peru.")
    late = ParametricRAG(model, BM25([*DOCUMENTS, unknown]), store, tiny_tokenizer, k=1)
    with pytest.raises(BadInput, match=r"Lima .*is not in the store"):
        late.answer("Peru Lima")
    answered = []
    with pytest.raises(BadInput, match=r"Lima .*is not in the store"):
        late.measure([*QUESTIONS, "Peru Lima"], lambda prompts, _: answered.append(prompts) or prompts)
    assert not answered  # a missing document is noticed first
    for length in (0, -1):
        with pytest.raises(BadInput, match=f"max_new_tokens = {length} is below 1"):
            rag().answer("who", max_new_tokens=length)
    with pytest.raises(BadInput, match="have no adapters"):
        store.apply(model, [])
    with pytest.raises(BadInput, match="weights"):
        store.apply(model, DOCUMENTS[:2], weights=[1.0])
    with pytest.raises(IncompatibleModels, match=r"adapters\[1\]"):
        merge_adapters(random_adapters({"a": (2, 2)}, 1) + random_adapters({"b": (2, 2)}, 1), scale=1.0)
    with store.apply(model, DOCUMENTS[:1]), pytest.raises((BadInput, IncompatibleModels)):
        store.apply(model, DOCUMENTS[:1])


def test_divergence_keeps_what_is_done(model, tiny_tokenizer, tmp_path):
    (poison,) = tiny_tokenizer("~")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    bad = Document("~", id="b")
    given = Given({"a": [Triple("Who", "x")], "b": [Triple("Who", "x")]})
    encoder = DocumentParameterizer(model, tiny_tokenizer, given)
    with pytest.raises(TrainingDiverged):
        encoder.encode([Document("good", id="a"), bad], tmp_path / "s")
    assert len(AdapterStore(tmp_path / "s")) == 1
    assert not hasattr(model, "peft_config")


def test_an_interrupted_job_asks_the_model_once(model, tiny_tokenizer, tmp_path, monkeypatch):
    """What the model wrote about the documents is kept beside the adapters."""
    asked = []

    def write(self, rows, options):
        asked.extend(rows)
        text = '{"questions": [{"question": "Who", "answer": "Ines", "full_answer": "It is Ines."}]}'
        return [completion(text, 1, 1, False, options) for _ in rows]

    monkeypatch.setattr(Local, "_answer", write)
    rows = [json.dumps({"id": document.id, "text": document.text}) for document in DOCUMENTS]
    (tmp_path / "documents.jsonl").write_text("\n".join(rows))
    settings = {"documents": tmp_path / "documents.jsonl", "method": None, "output": tmp_path / "made"}
    settings["scratch"] = tmp_path / "scratch"
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(
            DocumentParameterizer, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        transfer(model, tiny_tokenizer, **settings)
    assert len(asked) == 2 * len(DOCUMENTS)
    transfer(model, tiny_tokenizer, **settings)
    assert len(asked) == 2 * len(DOCUMENTS) and len(AdapterStore(tmp_path / "made" / "store")) == len(
        DOCUMENTS
    )
