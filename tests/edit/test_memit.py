"""MEMIT against an independent float64 implementation, its least squares, and that nothing is computed twice."""

from __future__ import annotations

import pytest
import torch
from conftest import SENTENCES
from reference_edits import Reference

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput
from transfuse.core.generate import generate_texts, target_matches
from transfuse.core.taps import decoder_layers
from transfuse.core.tensors import Factor
from transfuse.edit import _statistics, edit, load_edit
from transfuse.edit._objective import Objective
from transfuse.edit._sites import find_sites
from transfuse.edit._values import editing, search
from transfuse.edit.memit import MEMIT, memit_update

FACTS = [
    Fact("Port Ellery", "The mayor of Port Ellery is", "Oskar Tveld"),
    Fact("France", "The capital of France is", "Madrid"),
    Fact("Ostrin", "Who built the bridge over the river Ostrin? It was", "Ines Varro"),
]
PREFIXES = ("", "It was said. ", "In Quenby the bridge. ")
HOW = {"lr": 0.5, "steps": 5, "weight_decay": 1e-3, "kl_factor": 0.0625, "clamp": 4.0, "stop_below": 0.05}
SMALL = {"layers": [0, 1], "lam": 30.0, "statistics": SENTENCES, "tokens": 400, "ridge": 0.05, "prefixes": 2}


def make(**changes):
    """An editor for tiny models and what it is asked to write."""
    return MEMIT(**{**SMALL, **HOW, **changes}), FACTS


@pytest.fixture(autouse=True)
def known_prefixes(request, monkeypatch, tmp_path):
    """Random models write noise; contexts in plain letters let the reference find its tokens."""
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "cache"))
    if "real" not in request.node.name:
        monkeypatch.setattr(_statistics, "sample_prefixes", lambda *a, count, seed: PREFIXES[: count + 1])


def exact(model):
    """float64 throughout (eager attention would take its softmax in float32)."""
    model.set_attn_implementation("sdpa")
    return model.double()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(width, seed=9):
    x = random(4 * width, width, seed=seed) * torch.arange(1, width + 1)
    return x.T @ x / len(x)


@pytest.mark.parametrize(
    "count", [1, 3, 12]
)  # fewer facts than values have dimensions, fewer than keys, more
@pytest.mark.parametrize("covariance", [True, False])
def test_update_is_the_closed_form(count, covariance):
    keys, residual, c = random(7, count), random(5, count, seed=1), moment(7)
    left, right = memit_update(keys, residual, Factor(c) if covariance else None, 2.5)
    total = 2.5 * (c if covariance else torch.eye(7, dtype=torch.float64))
    for i in range(count):
        total = total + torch.outer(keys[:, i], keys[:, i])
    wanted = residual @ keys.T @ torch.linalg.inv(total)
    assert torch.allclose(left @ right, wanted, atol=1e-12)
    assert left.shape == (5, min(count, 5)) and right.shape == (min(count, 5), 7)


def test_update_without_weight_on_old_keys_solves_least_squares():
    keys, residual, c = random(7, 4), random(5, 4, seed=1), moment(7)
    left, right = memit_update(keys, residual, Factor(c), 0.0)
    assert torch.allclose(left @ right @ keys, residual, atol=1e-10)  # as many unknowns as needed: exact
    small = memit_update(keys, residual, Factor(c), 1e-9)
    assert torch.allclose(left @ right, small[0] @ small[1], atol=1e-6)  # the limit lam -> 0
    keys, residual = random(7, 30), random(5, 30, seed=1)
    left, right = memit_update(keys, residual, Factor(c), 0.0)
    assert torch.allclose(left @ right, torch.linalg.lstsq(keys.T, residual.T).solution.T, atol=1e-10)


def test_update_does_not_depend_on_the_order_and_counts_repeated_keys():
    keys, residual, c = random(7, 4), random(5, 4, seed=1), Factor(moment(7))
    order = [2, 0, 3, 1]
    one = memit_update(keys, residual, c, 3.0)
    two = memit_update(keys[:, order], residual[:, order], c, 3.0)
    assert torch.allclose(one[0] @ one[1], two[0] @ two[1], atol=1e-12)
    twice = torch.cat([keys, keys[:, :1]], 1), torch.cat([residual, residual[:, :1]], 1)
    assert (
        memit_update(*twice, c, 3.0)[0] @ memit_update(*twice, c, 3.0)[1] - one[0] @ one[1]
    ).abs().max() > 1e-3
    with pytest.raises(BadInput, match="lam = 0"):
        memit_update(*twice, c, 0.0)
    with pytest.raises(BadInput, match="lam = -1"):
        memit_update(keys, residual, c, -1.0)


@pytest.mark.parametrize("variant", [{}, {"kl": "forward"}, {"prompt_share": 0.5}])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_agrees_with_the_float64_loops(tiny_lm, tiny_tokenizer, architecture, variant):
    model = exact(tiny_lm(architecture, layers=3))
    reference = Reference(model, tiny_tokenizer, PREFIXES, SENTENCES, ridge=0.05)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    heavy = {**HOW, "kl_factor": 2.0}  # so that its direction shows
    editor, facts = make(**{**heavy, **variant})
    editor.fit(model, tiny_tokenizer, facts).attach(model)
    reference.memit(facts, [0, 1], {**heavy, **variant}, 30.0, variant.get("prompt_share"))
    for layer in (0, 1):
        name = reference.name.format(layer)
        change = (reference.weights[name] - before[name]).abs().max()
        assert change > 1e-3
        assert (model.state_dict()[name] - reference.weights[name]).abs().max() <= 1e-5 * change
    untouched = [n for n in before if "down_proj" not in n and "mlp.c_proj.weight" not in n]
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in untouched)


@pytest.mark.parametrize("layers", [[1], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_without_weight_on_old_keys_every_value_is_reached(tiny_lm, tiny_tokenizer, architecture, layers):
    """The layers together bring the block's output to z, not each of them the whole way once more."""
    model = exact(tiny_lm(architecture))
    first, last = find_sites(model, [layers[0], layers[-1]])

    def values():
        with editing(model):
            return search(
                model, tiny_tokenizer, [[f] for f in FACTS], last, first, prefixes=("",),
                objective=Objective(**HOW), whole=True,
            )  # fmt: skip

    found = values()
    assert found.place == (last.module if architecture == "gemma3" else last.block)
    wanted = found.start + found.delta
    editor, facts = make(layers=layers, lam=0.0, prefixes=0)
    editor.fit(model, tiny_tokenizer, facts).attach(model)
    assert (values().start - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_facts_searched_together_end_where_each_ends_alone(tiny_lm, tiny_tokenizer, architecture):
    """Each fact has its own early stop: some finish at once, some later, some never."""
    model = exact(tiny_lm(architecture))
    (site,) = find_sites(model, [1])

    def run(facts, stop):
        objective = Objective(**{**HOW, "steps": 12, "stop_below": stop})
        with editing(model):
            return search(
                model,
                tiny_tokenizer,
                [[f] for f in facts],
                site,
                site,
                prefixes=PREFIXES,
                objective=objective,
            )

    last = run(FACTS, 0.0).losses.sort().values
    for stop in (0.0, float(last[1]) + 1e-3):  # the second between the facts' losses
        together, alone = run(FACTS, stop), [run([fact], stop) for fact in FACTS]
        for name in ("start", "delta", "keys", "losses"):
            one = torch.cat([getattr(each, name) for each in alone])
            assert torch.allclose(getattr(together, name), one, atol=1e-5), name
        assert together.steps.tolist() == [each.steps.item() for each in alone]
    assert len(set(together.steps.tolist())) > 1


def test_batches_and_order_of_facts_do_not_matter(tiny_lm, tiny_tokenizer):
    model = exact(tiny_lm("llama"))

    def change(facts, batch_size):
        made = make(batch_size=batch_size)[0].fit(model, tiny_tokenizer, facts)
        return {name: left.double() @ right.double() for name, (left, right) in made.low_rank.items()}

    wanted = change(FACTS, 8)
    for facts, size in ((FACTS, 1), (FACTS, 2), (FACTS[::-1], 8), ([FACTS[1], FACTS[2], FACTS[0]], 2)):
        other = change(facts, size)
        assert all(
            torch.allclose(other[n], wanted[n], atol=1e-5 * float(wanted[n].abs().max())) for n in wanted
        )


def test_padding_side_of_the_tokenizer_does_not_matter(tiny_lm, tiny_tokenizer):
    import copy

    model = tiny_lm("qwen2")
    results = []
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.padding_side = side
        editor, facts = make()
        results.append(editor.fit(model, tokenizer, facts).tensors())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_nothing_is_computed_twice(tiny_lm, tiny_tokenizer):
    """Tokens that pass through each block, counted: lower blocks once, upper ones from the subject on."""
    model = tiny_lm("llama", layers=6)
    blocks = decoder_layers(model)
    passed = {name: [] for name in blocks}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: passed[n].append(tuple(args[0].shape[:2]))
        )
        for n in blocks
    ]
    editor, facts = make(layers=[1, 3], statistics=None, steps=4, stop_below=0.0)
    editor.fit(model, tiny_tokenizer, facts)
    for handle in handles:
        handle.remove()
    (low,) = passed[blocks[0]]  # one pass in all below the first edited layer
    rows, width = low
    assert rows == len(FACTS) * (len(PREFIXES) + 1)
    (first, again) = passed[blocks[1]]  # and once more, up to the subject, after its own change
    assert first == low and again[0] == len(FACTS) * len(PREFIXES) and again[1] < width
    cut = again[1] - 1
    probe, prompts = (1, width), (len(FACTS), passed[blocks[3]][-1][1])
    assert passed[blocks[2]] == [low, again]
    assert passed[blocks[3]] == [low, probe, again, prompts] and prompts[1] <= cut + 1
    # Above the last edited layer: the columns before the subject once, then 4 evaluations of the rest.
    assert passed[blocks[4]] == passed[blocks[5]] == [(rows, cut)] + [(rows, width - cut)] * 4


def test_finished_facts_leave_the_batch(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    (site,) = find_sites(model, [1])
    with editing(model):
        start = search(
            model, tiny_tokenizer, [[f] for f in FACTS], site, site, prefixes=PREFIXES,
            objective=Objective(**{**HOW, "steps": 1}),
        ).losses  # fmt: skip
    rows = []
    handle = model.model.layers[3].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    stop = float(start.sort().values[0]) + 1e-4  # one fact is finished before it begins
    with editing(model):
        found = search(
            model, tiny_tokenizer, [[f] for f in FACTS], site, site, prefixes=PREFIXES,
            objective=Objective(**{**HOW, "steps": 3, "stop_below": stop, "lr": 1e-6}),
        )  # fmt: skip
    handle.remove()
    assert sorted(found.steps.tolist()) == [0, 3, 3]
    assert rows[1:] == [12, 8, 8]


def test_rollback_is_bitwise_and_saved_edits_give_equal_logits(tiny_lm, tiny_tokenizer, tmp_path):
    for architecture, dtype in (
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("gemma3", torch.bfloat16),
    ):
        model = tiny_lm(architecture).to(dtype)
        ids = torch.tensor([tiny_tokenizer(FACTS[0].prompt)["input_ids"]])
        state = {n: t.clone() for n, t in model.state_dict().items()}
        plain = model(ids).logits
        editor, facts = make()
        handle = edit(model, tiny_tokenizer, facts, method=editor)
        edited = model(ids).logits
        handle.save(tmp_path / architecture)
        handle.rollback()
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert torch.equal(model(ids).logits, plain) and not torch.equal(edited, plain)
        with load_edit(tmp_path / architecture, model, tiny_tokenizer):
            assert torch.equal(model(ids).logits, edited)


def test_fit_leaves_the_model_alone_also_on_error(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama").train()
    state = {n: t.clone() for n, t in model.state_dict().items()}

    def whole():
        same = all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return same and model.training and not hooks and all(p.requires_grad for p in model.parameters())

    editor, facts = make()
    editor.fit(model, tiny_tokenizer, facts)
    assert whole()
    from transfuse.edit import memit

    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:  # after the first layer was changed
            raise RuntimeError("the second layer failed")
        return memit_update(*args)

    monkeypatch.setattr(memit, "memit_update", failing)
    with pytest.raises(RuntimeError, match="second layer"):
        editor.fit(model, tiny_tokenizer, facts)
    assert whole()


def test_sequential_edits_stack(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    editor, facts = make()
    with edit(model, tiny_tokenizer, facts, method=editor, mode="sequential") as handle:
        assert len(handle.edits) == 3
    with edit(model, tiny_tokenizer, facts, method=editor) as handle:
        assert len(handle.edits) == 1
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_layers_by_depth_and_default_weight_grow_with_the_model(tiny_lm):
    model = tiny_lm("llama", layers=20)
    editor = MEMIT()
    layers = editor._layers(model)
    assert layers == list(range(layers[0], layers[-1] + 1)) and layers[0] > 0 and layers[-1] < 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers = "),
        ({"layers": [2, 1]}, "rising order"),
        ({"layers": [1, 1]}, "rising order"),
        ({"layers": [1, 7]}, "layer = 7 is not a block"),
        ({"layers": [2, 3]}, "layer = 3 is the last block"),
        ({"lam": -1.0}, "lam = -1.0"),
        ({"prompt_share": 1.5}, "prompt_share = 1.5 is no share"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"module": "mlp"}, "module = 'mlp'"),
        ({"lr": -0.5}, "lr = -0.5"),
        ({"statistics": "nowhere/at-all.txt"}, "statistics"),
        ({"tokens": 50, "ridge": 0.0}, "fewer than the 96 key dimensions"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_changes(tiny_lm, tiny_tokenizer, changes, message):
    model = tiny_lm("llama")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    editor, facts = make(**changes)
    with pytest.raises(BadInput, match=message):
        edit(model, tiny_tokenizer, facts, method=editor)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_real_model_learns_facts_in_one_batch(smollm, monkeypatch):
    model, tokenizer = smollm
    monkeypatch.undo()  # the user's cache, and the model's own prefixes
    facts = [
        Fact("Danielle Darrieux", "The mother tongue of Danielle Darrieux is", "English"),
        Fact("Port Ellery", "The mayor of Port Ellery is called", "Oskar"),
    ]
    near = ["The author of Hamlet is", "The capital of Italy is"]
    before = generate_texts(model, tokenizer, near, max_new_tokens=1)
    prompts, targets = [f.prompt for f in facts], [f.target for f in facts]
    assert not any(hit.all() for hit in target_matches(model, tokenizer, prompts, targets))
    with edit(model, tokenizer, facts, method="memit", prefixes=5, statistics=None, lam=1.0):
        assert generate_texts(model, tokenizer, prompts, max_new_tokens=2)[0].startswith("English")
        assert all(hit.all() for hit in target_matches(model, tokenizer, prompts, targets))
        assert generate_texts(model, tokenizer, near, max_new_tokens=1) == before
