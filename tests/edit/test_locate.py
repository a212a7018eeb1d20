"""Causal tracing against one pass at a time, and on a real model's own facts."""

from __future__ import annotations

import pytest
import torch
from edit.test_architectures import build

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput
from transfuse.core.taps import decoder_layers
from transfuse.core.training import generator
from transfuse.edit import _locate, locate
from transfuse.edit._layers import down_projection

FACTS = [
    Fact("Port Ellery", "The mayor of Port Ellery is", "Oskar"),
    Fact("France", "The capital of France is", "Madrid", ground_truth="Paris"),
    Fact("Ostrin", "Ostrin is a", "river"),
]
SPANS = [" Port Ellery", " France", "Ostrin"]


@pytest.fixture
def knows(monkeypatch):
    """Pretend that the model's own answers are those of the facts, but for the numbers given."""

    def set_(*unknown):
        def matches(model, tokenizer, prompts, targets, **_):
            return [torch.tensor([i not in unknown]) for i in range(len(prompts))]

        monkeypatch.setattr(_locate, "target_matches", matches)

    return set_


def _rows(out):
    """A module's output as `[1, T, width]`."""
    first = out[0] if isinstance(out, tuple) else out
    return first.view(1, -1, first.shape[-1])


def slowly(model, tokenizer, facts, *, kind, window, noise, samples, seed):
    """Row by row: corrupt, restore, read off the answer's probability."""
    blocks = decoder_layers(model)
    names = [down_projection(model, i) for i in range(len(blocks))]
    places = [model.get_submodule(n) for n in (names if kind == "mlp" else blocks)]
    rows = []
    for fact, span in zip(facts, SPANS, strict=True):
        answer = fact.ground_truth or fact.target
        ids = tokenizer(f"{fact.prompt} {answer}")["input_ids"]
        count = len(ids) - len(tokenizer(fact.prompt)["input_ids"])
        subject = tokenizer(span)["input_ids"]
        begin = next(i for i in range(len(ids)) if ids[i : i + len(subject)] == subject)
        rows.append((ids, count, begin, begin + len(subject)))
    table = model.get_input_embeddings()
    deviation = noise * torch.cat([table(torch.tensor(i[a:b])) for i, _, a, b in rows]).std().item()
    random = generator(seed)

    def run(ids, count, hooks):
        handles = [m.register_forward_hook(f) for m, f in hooks]
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        return sum(logits[k - 1, ids[k]] for k in range(len(ids) - count, len(ids))).exp().item()

    means = []
    for ids, count, begin, end in rows:
        clean = {}

        def keep(i, clean=clean, end=end):
            return lambda m, a, out: clean.__setitem__(i, _rows(out)[0, end - 1].clone())

        whole = run(ids, count, [(m, keep(i)) for i, m in enumerate(places)])
        all_noise = torch.randn(samples, end - begin, table.weight.shape[1], generator=random)
        effect = []
        for j in [*range(len(places)), None]:
            total = 0.0
            for s in range(samples):

                def corrupt(m, a, out, s=s, begin=begin, end=end, all_noise=all_noise):
                    out = out.clone()
                    out[0, begin:end] += deviation * all_noise[s]
                    return out

                def put(i, clean=clean, end=end):
                    def hook(m, a, out):
                        new = _rows(out).clone()
                        new[0, end - 1] = clean[i]
                        return (new, *out[1:]) if isinstance(out, tuple) else new.view(out.shape)

                    return hook

                span = [] if j is None else range(j - window // 2, j - (-window // 2))  # 2: j - 1 and j
                inside = [i for i in span if 0 <= i < len(places)]
                total += run(ids, count, [(table, corrupt), *((places[i], put(i)) for i in inside)])
            effect.append(total / samples)
        means.append([e - effect[-1] for e in effect[:-1]] + [whole - effect[-1]])
    return torch.tensor(means, dtype=torch.float64).mean(0).tolist()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "window"), [("mlp", 1), ("mlp", 2), ("mlp", 3), ("mlp", 4), ("hidden", 1)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "opt"])
def test_agrees_with_one_pass_at_a_time(tiny_lm, tiny_tokenizer, knows, architecture, kind, window):
    knows()
    model = tiny_lm(architecture) if architecture in ("llama", "gpt2") else build(architecture, layers=4)
    how = {"kind": kind, "window": window, "noise": 2.0, "samples": 2, "seed": 4}
    wanted = slowly(model, tiny_tokenizer, FACTS, **how)
    assert max(map(abs, wanted)) > 1e-5
    for batch_size in (64, 3):
        found = locate(model, tiny_tokenizer, FACTS, batch_size=batch_size, **how)
        assert found.layers == pytest.approx(wanted[:-1], abs=1e-6, rel=1e-3)
        assert found.total == pytest.approx(wanted[-1], abs=1e-6, rel=1e-3)
    assert (found.used, found.skipped) == (3, 0)
    assert found.best == max(range(4), key=lambda i: wanted[i])


def test_all_bytes_of_the_subject_are_corrupted(tiny_tokenizer):
    """A first character of two bytes, each a token of its own."""
    ids, first, last, answer = _locate._encode(tiny_tokenizer, Fact("Žižka", "Now Žižka", "fought"), "fought")
    assert tiny_tokenizer.decode(ids[first : last + 1]).strip() == "Žižka"
    assert tiny_tokenizer.decode(answer) == " fought"


def test_unknown_facts_are_counted_and_hooks_are_gone(tiny_lm, tiny_tokenizer, knows):
    model = tiny_lm("llama").train()
    knows(1)
    found = locate(model, tiny_tokenizer, FACTS, samples=1)
    assert (found.used, found.skipped) == (2, 1) and len(found.layers) == 4
    assert model.training and not any(m._forward_hooks for m in model.modules())
    knows(0, 1, 2)
    with pytest.raises(BadInput, match="none that the model knows"):
        locate(model, tiny_tokenizer, FACTS, samples=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "attention"}, "kind = 'attention'"),
        ({"window": 0}, "window = 0"),
        ({"samples": 0}, "samples = 0"),
        ({"samples": 2.5}, "samples = 2.5 .* whole number"),
        ({"noise": 0.0}, "noise = 0.0"),
        ({"module": "mlp.none"}, "module = 'mlp.none'"),
    ],
)
def test_wrong_arguments_are_named(tiny_lm, tiny_tokenizer, changes, message):
    with pytest.raises(BadInput, match=message):
        locate(tiny_lm("llama"), tiny_tokenizer, FACTS, **changes)
    with pytest.raises(BadInput, match="facts"):
        locate(tiny_lm("llama"), tiny_tokenizer, [])


def test_a_real_model_recalls_in_its_lower_half(smollm):
    """Restoring the last block's MLP at the subject cannot bring anything back; the early ones do."""
    model, tokenizer = smollm
    facts = [
        Fact("France", "The capital of France is", "Paris"),
        Fact("Japan", "The capital of Japan is", "Tokyo"),
        Fact("Bill Gates", "Bill Gates is the founder of", "Microsoft"),
    ]
    found = locate(model, tokenizer, facts, samples=2)
    assert found.used >= 2 and found.total > 0.05
    assert found.best < 15
    assert abs(found.layers[-1]) < 0.2 * found.layers[found.best]
