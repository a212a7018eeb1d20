"""What every editor holds. Each is found in the catalogue; its own test file says how to make one.

`tests/edit/test_<name>.py` defines `make(**changes)` -> `(editor, facts)`: an editor quick enough for tiny models and
at least one fact it changes something for.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from transfuse import catalogue
from transfuse.core.data import Fact
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels
from transfuse.core.generate import generate_texts, target_nll
from transfuse.core.models import fingerprint
from transfuse.edit import edit, editor, load_edit
from transfuse.edit._base import Editor, PromptEdit, WeightEdit

METHODS = catalogue.methods(family="edit")
TESTS = Path(__file__).resolve().parents[1] / "edit"
OTHER = Fact("France", "The capital of France is", "Madrid")


def test_the_family_is_found():
    assert {m.slug for m in METHODS} >= {"rome", "memit", "ft-l", "ft-m", "lora", "grace", "ike"}


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


@pytest.fixture
def make(described, tmp_path_factory, monkeypatch):
    """The method's own way to make a small instance; statistics are cached per session, not in the user's cache."""
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make


def state(model):
    """All that an edit could leave behind."""
    return {
        "weights": fingerprint(model),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "attributes": sorted(vars(model)),
        "config": model.config.to_dict(),
    }


def asked(model, tokenizer, handle, facts, **options):
    """NLL of the facts' targets, asked as the handle says."""
    prompts = [fact.prompt if handle is None else handle.rewrite(fact.prompt) for fact in facts]
    return target_nll(model, tokenizer, prompts, [fact.target for fact in facts], **options)


def test_the_page_is_true(described, make):
    worker, facts = make()
    assert isinstance(worker, Editor) and facts
    assert described.reversible
    assert type(worker) is catalogue.get(described.slug)
    defaults = editor(described.slug)  # every argument has a default
    assert vars(defaults).keys() == vars(worker).keys()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_edit_save_load_and_roll_back(described, make, tiny_lm, tiny_tokenizer, tmp_path, architecture, mode):
    model = tiny_lm(architecture)
    worker, facts = make()
    facts = [*facts[:1], OTHER]
    before = state(model)
    plain = asked(model, tiny_tokenizer, None, facts)
    with edit(model, tiny_tokenizer, facts, method=worker, mode=mode) as handle:
        assert handle.model is model and handle.method == described.slug
        edited = asked(model, tiny_tokenizer, handle, facts)
        assert not torch.equal(torch.cat(edited), torch.cat(plain))
        assert described.context == isinstance(handle.edits[0], PromptEdit)
        assert described.context == (handle.rewrite(OTHER.prompt) != OTHER.prompt)
        assert model.dtype == torch.float32 and not any(m.training for m in model.modules())
        folder = handle.save(tmp_path / "delta")
    assert state(model) == before
    assert torch.equal(torch.cat(asked(model, tiny_tokenizer, None, facts)), torch.cat(plain))
    assert not list(folder.glob("model*.safetensors"))  # a delta, not a model

    again = tiny_lm(architecture)
    with load_edit(folder, again, tiny_tokenizer) as handle:
        assert handle.facts == facts
        assert torch.equal(torch.cat(asked(again, tiny_tokenizer, handle, facts)), torch.cat(edited))
    assert state(again) == before
    with pytest.raises(IncompatibleModels, match="not the model this edit was made on"):
        load_edit(folder, tiny_lm(architecture, seed=1), tiny_tokenizer)
    stored = min(folder.glob("edit-*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-5] if stored.stat().st_size > 2000 else b"\x80\x04pickle")
    with pytest.raises(CorruptFile):
        load_edit(folder, again, tiny_tokenizer)
    assert state(again) == before


def test_the_same_again(make, tiny_lm, tiny_tokenizer):
    """No hidden randomness: two fits give the same tensors, whatever the global random state."""
    worker, facts = make()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(worker.fit(tiny_lm("llama"), tiny_tokenizer, facts[:1]))
    first, second = (made.tensors() for made in found)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert found[0].meta() == found[1].meta()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(make, tiny_lm, tiny_tokenizer, dtype):
    model = tiny_lm("llama").to(dtype)
    model.set_attn_implementation("sdpa")  # eager attention of float64 models gives NaN in padded batches
    worker, facts = make()
    before = state(model)
    plain = torch.cat(asked(model, tiny_tokenizer, None, facts))
    with edit(model, tiny_tokenizer, facts, method=worker) as handle:
        edited = torch.cat(asked(model, tiny_tokenizer, handle, facts))
        assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {dtype}
    assert edited.isfinite().all() and not torch.equal(edited, plain)
    assert state(model) == before


def test_padding_and_batches_do_not_matter(make, tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    worker, facts = make()
    facts = [*facts, OTHER, Fact("a", "a", "question")]
    tiny_tokenizer.padding_side = "left"
    try:
        with edit(model, tiny_tokenizer, facts[:-1], method=worker) as handle:
            together = asked(model, tiny_tokenizer, handle, facts)
            apart = asked(model, tiny_tokenizer, handle, facts, batch_size=1)
            prompts = [handle.rewrite(fact.prompt) for fact in facts]
            texts = generate_texts(model, tiny_tokenizer, prompts, max_new_tokens=8)
            alone = generate_texts(model, tiny_tokenizer, prompts, max_new_tokens=8, batch_size=1)
        left = worker.fit(model, tiny_tokenizer, facts[:1]).tensors()
    finally:
        tiny_tokenizer.padding_side = "right"
    torch.testing.assert_close(torch.cat(together), torch.cat(apart), rtol=1e-3, atol=1e-3)
    assert texts == alone
    right = worker.fit(model, tiny_tokenizer, facts[:1]).tensors()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_model_in_training_mode_stays_there(make, tiny_lm, tiny_tokenizer):
    model = tiny_lm("gpt2").train()  # with dropout of its own
    worker, facts = make()
    before = state(model)
    made = worker.fit(model, tiny_tokenizer, facts[:1]).tensors()
    assert state(model) == before
    calm = worker.fit(model.eval(), tiny_tokenizer, facts[:1]).tensors()
    assert all(torch.equal(made[name], calm[name]) for name in made)


def test_bad_facts_are_refused_before_any_work(make, tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama")
    worker, facts = make()
    good = facts[0]
    before = state(model)

    def forward(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(model), "forward", forward)
    for bad, named in (
        (replace(good, target=" ", id="f1"), r"f1|target"),
        (replace(good, subject="Nobody", id="f1"), r"subject.*Nobody"),
    ):
        with pytest.raises(BadInput, match=named):
            worker.check(model, tiny_tokenizer, [good, bad])
        with pytest.raises(BadInput, match=named):
            edit(model, tiny_tokenizer, [good, bad], method=worker)
        with pytest.raises(BadInput, match=named):
            worker.fit(model, tiny_tokenizer, [good, bad])
    with pytest.raises(BadInput, match="facts"):
        edit(model, tiny_tokenizer, [], method=worker)
    assert state(model) == before


def test_an_error_midway_leaves_the_model(make, tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama")
    worker, facts = make()
    before = state(model)
    if isinstance(worker.fit(model, tiny_tokenizer, facts[:1]), PromptEdit):
        fails = "_nearest"
        monkeypatch.setattr(type(worker), fails, lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        calls, real = [], type(model).forward

        def forward(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        edit(model, tiny_tokenizer, [facts[0], OTHER], method=worker, mode="sequential")
    monkeypatch.undo()
    assert state(model) == before


def test_weight_edits_touch_only_what_they_name(make, tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    worker, facts = make()
    made = worker.fit(model, tiny_tokenizer, facts)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    made.attach(model)
    changed = {name for name, p in model.named_parameters() if name in old and not torch.equal(p, old[name])}
    assert changed == ({*made.low_rank, *made.replaced} if isinstance(made, WeightEdit) else set())
    made.detach(model)
