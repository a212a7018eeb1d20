"""core.fused: the head and a loss per token, chunked, against whole logits and autograd."""

from __future__ import annotations

import peft
import pytest
import torch
from conftest import make_tiny

from transfuse.core.divergence import kl_terms
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.fused import Head, fused_sums, head_of


def terms(student, teacher, **columns):
    """Forward KL and, beside it, the cross-entropy with labels; weighted together."""
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    kd = kl_terms(log_p, log_q)
    ce = -log_q.gather(-1, columns["labels"].unsqueeze(-1)).squeeze(-1)
    return {"loss": 0.7 * kd + 0.3 * ce, "kd": kd, "ce": ce}


def problem(n=300, d=16, v=50, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(n, d).requires_grad_(), "weight": draw(v, d).requires_grad_(),
        "bias": draw(v).requires_grad_(), "states": draw(n, 2 * d), "their": draw(v, 2 * d),
        "labels": torch.randint(0, v, (n,), generator=g),
    }  # fmt: skip


def whole(p, softcap=None, scale=1.0):
    """The same with all logits at once, by autograd."""

    def logits(h, w, b=None):
        z = torch.nn.functional.linear(h, w, b) * scale
        return z if softcap is None else torch.tanh(z / softcap) * softcap

    found = terms(logits(p["hidden"], p["weight"], p["bias"]), p["states"] @ p["their"].T, labels=p["labels"])
    return {name: value.sum() for name, value in found.items()}


def fused(p, softcap=None, scale=1.0, **options):
    head = Head(p["weight"], p["bias"], softcap, scale)
    return fused_sums(
        terms,
        p["hidden"],
        head,
        teacher=(p["states"], Head(p["their"])),
        columns={"labels": p["labels"]},
        **options,
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 50 * 100, 2**26])
def test_values_and_gradients_are_those_of_whole_logits(softcap, chunk_bytes):
    p = problem()
    expected, found = whole(p, softcap, 0.5), fused(p, softcap, 0.5, chunk_bytes=chunk_bytes)
    assert found.keys() == expected.keys() and next(iter(found)) == "loss"
    learnt = [p["hidden"], p["weight"], p["bias"]]
    slopes = torch.autograd.grad(3.0 * expected["loss"], learnt)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(3.0 * found["loss"], learnt), slopes, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_what_takes_no_gradient_gets_none():
    p = problem()
    for frozen in ("hidden", "weight", "bias"):
        q = {**p, frozen: p[frozen].detach()}
        learnt = [q[name] for name in ("hidden", "weight", "bias") if name != frozen]
        for ours, theirs in zip(
            torch.autograd.grad(fused(q)["loss"], learnt),
            torch.autograd.grad(whole(q)["loss"], learnt),
            strict=True,
        ):
            assert torch.allclose(ours, theirs, atol=1e-10)
    assert not fused(p)["kd"].requires_grad
    with torch.no_grad():
        assert torch.allclose(fused(p)["loss"], whole(p)["loss"])


def test_it_is_differentiated_once():
    p = problem(n=70)
    loss = fused(p)["loss"]
    torch.autograd.grad(loss, p["hidden"], retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, p["hidden"])


def test_there_is_no_second_derivative():
    p = problem(n=70)
    factor = torch.ones((), dtype=p["hidden"].dtype, requires_grad=True)
    (first,) = torch.autograd.grad(fused(p)["loss"] * factor, p["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()  # a gradient penalty would reach the factor only


def test_bfloat16_is_rounded_in_the_products_only():
    p = problem(n=500, dtype=torch.bfloat16)
    exact = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if value.is_floating_point()
        else value
        for name, value in p.items()
    }
    ours, theirs = fused(p, chunk_bytes=1), whole(exact)
    assert float(ours["loss"].detach()) == pytest.approx(float(theirs["loss"].detach()), rel=5e-3)
    learnt = ("hidden", "weight", "bias")
    slopes = torch.autograd.grad(ours["loss"], [p[name] for name in learnt])
    for slope, right in zip(
        slopes, torch.autograd.grad(theirs["loss"], [exact[n] for n in learnt]), strict=True
    ):
        assert slope.dtype == torch.bfloat16
        assert float((slope.double() - right).norm() / right.norm()) < 1e-2


def test_float16_gradients_do_not_overflow_before_they_are_scaled():
    """A mean over many tokens of large states, as under loss scaling: their sum is beyond float16."""
    p = problem(n=4000, d=4, v=8, dtype=torch.float16)
    p["hidden"] = (p["hidden"].detach() + 60).requires_grad_()
    exact = {
        n: t.detach().double().requires_grad_() for n, t in p.items() if n in ("hidden", "weight", "bias")
    }

    def cross_entropy(logits, reference, labels):
        return {"loss": torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")}

    head, labels = Head(p["weight"], p["bias"]), {"labels": p["labels"]}
    ours = fused_sums(cross_entropy, p["hidden"], head, columns=labels, chunk_bytes=1)["loss"] / 4000
    logits = exact["hidden"] @ exact["weight"].T + exact["bias"]
    theirs = torch.nn.functional.cross_entropy(logits, p["labels"])
    rights = torch.autograd.grad(theirs, [exact["weight"], exact["bias"]])
    assert (4000 * rights[0]).abs().max() > torch.finfo(torch.float16).max
    slopes = torch.autograd.grad(ours, [p["weight"], p["bias"]])
    for slope, right in zip(slopes, rights, strict=True):
        assert slope.dtype == torch.float16
        assert float((slope.double() - right).norm() / right.norm()) < 2e-2


def test_no_tokens_and_whole_teacher_logits():
    p = problem()
    logits = p["states"] @ p["their"].T
    head = Head(p["weight"], p["bias"])
    found = fused_sums(terms, p["hidden"], head, teacher=logits, columns={"labels": p["labels"]})
    assert torch.allclose(found["loss"], whole(p)["loss"])
    none = {name: value[:0] if name in ("hidden", "states", "labels") else value for name, value in p.items()}
    empty = fused(none)
    assert float(empty["loss"]) == 0.0
    assert float(torch.autograd.grad(empty["loss"], p["weight"])[0].abs().sum()) == 0.0


def test_a_cut_vocabulary():
    p = problem()
    short = fused_sums(
        terms, p["hidden"], Head(p["weight"], p["bias"], rows=40),
        teacher=(p["states"], Head(p["their"], rows=40)), columns={"labels": p["labels"] % 40},
    )  # fmt: skip
    q = {
        **p,
        "weight": p["weight"][:40],
        "bias": p["bias"][:40],
        "their": p["their"][:40],
        "labels": p["labels"] % 40,
    }
    assert torch.allclose(short["loss"], whole(q)["loss"])
    assert float(torch.autograd.grad(short["loss"], p["weight"])[0][40:].abs().sum()) == 0.0


def test_misfits():
    p = problem()
    head = Head(p["weight"])
    with pytest.raises(IncompatibleModels, match="50"):
        fused_sums(terms, p["hidden"], head, teacher=(p["states"], Head(p["their"][:40])))
    with pytest.raises(BadInput, match="labels"):
        fused_sums(
            terms, p["hidden"], head, teacher=p["states"] @ p["their"].T, columns={"labels": p["labels"][:3]}
        )
    with pytest.raises(BadInput, match="teacher"):
        fused_sums(terms, p["hidden"], head, teacher=(p["states"][:3], Head(p["their"])))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3"])
def test_heads_of_real_architectures(architecture):
    model = make_tiny(architecture, layers=2)
    head = head_of(model)
    ids = torch.randint(3, 400, (2, 7))
    states = model.base_model(input_ids=ids).last_hidden_state
    assert torch.allclose(head(states), model(input_ids=ids).logits, atol=1e-4)


def test_heads_of_models_with_adapters():
    config = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(
        make_tiny("llama", layers=2), peft.LoraConfig(target_modules=["q_proj"], **config)
    )
    head, ids = head_of(model), torch.randint(3, 400, (2, 7))
    states = model.get_base_model().model(input_ids=ids).last_hidden_state
    assert torch.allclose(head(states), model(input_ids=ids).logits, atol=1e-4)
    on_head = peft.LoraConfig(target_modules=["lm_head"], **config)
    assert head_of(peft.get_peft_model(make_tiny("llama", layers=2), on_head)) is None


def test_a_softcap_is_found_and_an_unknown_head_is_left_alone():
    model = make_tiny("llama", layers=1)
    model.config.final_logit_softcapping = 30.0  # llama does not apply it: the comparison finds out
    assert head_of(model) is None
    assert head_of(torch.nn.Linear(2, 2)) is None


def test_compiled_terms_agree(monkeypatch):
    """With the back end that needs no C++ compiler."""
    whole_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: whole_compile(f, backend="aot_eager", **options)
    )
    p = problem(n=200, dtype=torch.float32)
    found = [fused(p, chunk_bytes=4 * 50 * 90, compile=compile) for compile in (True, False)]
    assert float(found[0]["loss"].detach()) == pytest.approx(float(found[1]["loss"].detach()), rel=1e-5)
    slopes = [torch.autograd.grad(each["loss"], p["weight"])[0] for each in found]
    assert torch.allclose(*slopes, atol=1e-4)
