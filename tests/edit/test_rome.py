"""ROME against an independent float64 implementation, its constraint, and what it must survive."""

from __future__ import annotations

import pytest
import torch
from conftest import SENTENCES
from reference_edits import Reference

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput, TrainingDiverged
from transfuse.core.generate import generate_texts, target_matches
from transfuse.core.taps import capture
from transfuse.core.tensors import Factor
from transfuse.edit import _statistics, edit, load_edit
from transfuse.edit._contexts import rows_of, subject_end, subject_token
from transfuse.edit._layers import down_projection
from transfuse.edit._objective import Objective
from transfuse.edit._sites import find_sites
from transfuse.edit._values import editing, search
from transfuse.edit.rome import ROME, rome_update

FACT = Fact("Port Ellery", "The mayor of Port Ellery is", "Oskar Tveld")
PREFIXES = ("", "It was said. ", "In Quenby the bridge. ")
HOW = {"lr": 0.5, "steps": 6, "weight_decay": 1e-3, "kl_factor": 0.0625, "clamp": 4.0, "stop_below": 0.05}
SMALL = {"layer": 1, "statistics": SENTENCES, "tokens": 400, "ridge": 0.05, "prefixes": 2, **HOW}


def make(**changes):
    """An editor for tiny models and what it is asked to write."""
    return ROME(**{**SMALL, **changes}), [FACT]


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


def weights(model, layer=1):
    name = down_projection(model, layer)
    return model.get_parameter(f"{name}.weight").detach()


def test_update_maps_the_key_to_the_value_and_moves_others_least():
    noise = torch.Generator().manual_seed(3)
    w, k, v = (torch.randn(*shape, generator=noise, dtype=torch.float64) for shape in ((5, 7), (7,), (5,)))
    x = torch.randn(40, 7, generator=noise, dtype=torch.float64) * torch.arange(1, 8)
    c = x.T @ x / 40
    u, scale = rome_update(w, k, v, Factor(c))
    assert torch.allclose((w + torch.outer(scale, u)) @ k, v, atol=1e-12)
    assert u.norm().item() == pytest.approx(1)
    inverse = torch.linalg.inv(c) @ k
    assert torch.allclose(u, inverse / inverse.norm(), atol=1e-12)
    # Among all matrices with W' k = v this one disturbs the old keys least: E ||(W' - W) x||^2 is smallest.
    ours = (torch.outer(scale, u) @ x.T).square().sum()
    plain, plain_scale = rome_update(w, k, v)
    assert torch.allclose(plain, k / k.norm(), atol=1e-12)
    assert torch.allclose((w + torch.outer(plain_scale, plain)) @ k, v, atol=1e-12)
    assert ours < (torch.outer(plain_scale, plain) @ x.T).square().sum()
    free = torch.randn(7, generator=noise, dtype=torch.float64)
    free = free - (free @ k) / (k @ k) * k  # any other solution differs by a change that is 0 on k
    other = torch.outer(scale, u) + 0.1 * torch.outer(scale, free)
    assert ours < (other @ x.T).square().sum()


def test_update_refuses_a_zero_key():
    with pytest.raises(BadInput, match="no direction"):
        rome_update(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize(
    ("covariance", "variant"),
    [(True, {}), (False, {}), (True, {"kl": "forward"}), (True, {"at_prompt": True})],
)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_agrees_with_the_float64_loops(tiny_lm, tiny_tokenizer, architecture, covariance, variant):
    model = exact(tiny_lm(architecture, layers=3))
    reference = Reference(model, tiny_tokenizer, PREFIXES, SENTENCES, ridge=0.05)
    ids = tiny_tokenizer(FACT.prompt)["input_ids"]
    assert torch.allclose(model(torch.tensor([ids])).logits[0], reference.forward(ids), atol=1e-5)
    before = weights(model).clone()
    heavy = {**HOW, "kl_factor": 2.0}  # so that its direction shows
    editor, facts = make(statistics=SENTENCES if covariance else None, **{**heavy, **variant})
    editor.fit(model, tiny_tokenizer, facts).attach(model)
    reference.rome(FACT, 1, {**heavy, **variant}, covariance, variant.get("at_prompt", False))
    wanted = reference.weights[reference.name.format(1)]
    change = (wanted - before).abs().max()
    assert change > 1e-2  # there is something to compare
    assert (weights(model) - wanted).abs().max() <= 1e-5 * change


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3"])
def test_the_edited_layer_gives_the_value_for_the_key(tiny_lm, tiny_tokenizer, architecture):
    model = tiny_lm(architecture)
    (site,) = find_sites(model, [1])
    with editing(model):
        found = search(
            model, tiny_tokenizer, [[FACT]], site, site, prefixes=PREFIXES, objective=Objective(**HOW)
        )
    editor, facts = make()
    editor.fit(model, tiny_tokenizer, facts).attach(model)
    made = site.matrix(model) @ found.keys[0]
    bias = site.bias(model)
    value = made if bias is None else made + bias
    wanted = (found.start + found.delta)[0]
    assert found.delta.norm() > 0.1
    assert (value - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_search_finds_what_whole_forward_passes_confirm(tiny_lm, tiny_tokenizer, architecture):
    """The loss after three updates, computed by plain full passes, is what the fourth evaluation reports."""
    from transfuse.core.taps import replace

    model = exact(tiny_lm(architecture))
    for layer in (0, 1, 2):
        (site,) = find_sites(model, [layer])

        def run(steps, site=site):
            how = Objective(
                **{**HOW, "steps": steps, "stop_below": 0.0, "weight_decay": 0.0, "kl_factor": 0.0}
            )
            with editing(model):
                return search(model, tiny_tokenizer, [[FACT]], site, site, prefixes=PREFIXES, objective=how)

        found, reported = run(3), float(run(4).losses[0])
        losses = []
        for row in rows_of(tiny_tokenizer, FACT, PREFIXES):

            def put(value, row=row, delta=found.delta[0]):
                value = value.clone()
                value[:, row.position] += delta.to(value.dtype)
                return value

            with torch.no_grad(), replace(model, {site.module: put}):
                logits = model(torch.tensor([row.ids])).logits[0, -len(row.answer) :].log_softmax(-1)
            losses.append(-sum(logits[k, t] for k, t in enumerate(row.answer)) / len(row.answer))
        assert float(sum(losses) / len(losses)) == pytest.approx(reported, rel=1e-6)
        assert abs(reported - float(run(1).losses[0])) > 1e-3


def test_padding_side_of_the_tokenizer_does_not_matter(tiny_lm, tiny_tokenizer):
    import copy

    model = tiny_lm("llama")
    results = []
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.padding_side = side
        editor, facts = make()
        results.append(editor.fit(model, tokenizer, facts).tensors())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_rows_padded_together_give_what_each_gives_alone(tiny_lm, tiny_tokenizer):
    """Keys and values of a batch of unequal contexts are those of single, unpadded passes."""
    for architecture in ("llama", "gpt2", "gemma3"):
        model = tiny_lm(architecture)
        (site,) = find_sites(model, [2])
        with editing(model):
            found = search(
                model, tiny_tokenizer, [[FACT]], site, site, prefixes=PREFIXES, objective=Objective(**HOW)
            )
        keys = []
        for row in rows_of(tiny_tokenizer, FACT, PREFIXES):
            with torch.no_grad(), capture(model, site.module, inputs=True) as seen:
                model(torch.tensor([row.ids]))
            keys.append(seen[site.module][0, row.position])
        assert torch.allclose(found.keys[0], torch.stack(keys).mean(0), atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Port Ellery has a mayor called", "Port Ellery"),  # at the beginning
        ("The mayor of Port Ellery is", "Port Ellery"),  # with a space before it
        ("Paris is not Paris, and Paris is", "Paris"),  # three times: the last
        ("The café Zoë's owner is", "Zoë"),  # bytes of several tokens, and a suffix
        ("Ask about Varro", "Varro"),  # at the very end
        ("a a a a", "a"),
        ("Varro's C++ is C+", "C+"),
    ],
)
def test_the_subject_token_is_the_last_of_its_last_occurrence(tiny_tokenizer, prompt, subject):
    fact = Fact(subject, prompt, "Ines")
    for row, prefix in zip(rows_of(tiny_tokenizer, fact, PREFIXES), PREFIXES, strict=True):
        text = prefix + prompt
        stop = len(prefix) + prompt.rindex(subject) + len(subject)
        assert tiny_tokenizer.decode(row.ids[: row.position + 1]).startswith(text[:stop])
        assert not tiny_tokenizer.decode(row.ids[: row.position]).startswith(text[:stop])
        assert tiny_tokenizer.decode(row.ids + row.answer[-1:]) == f"{text} Ines"
        assert tiny_tokenizer.decode(row.answer) == " Ines"


@pytest.mark.parametrize(
    ("prompt", "subject", "before"),
    [
        ("The Ostrin of the Ostrinian plain is", "Ostrin", "The Ostrin"),  # not within a longer word
        ("Quenby, then Quenbyshire and NewQuenby", "Quenby", "Quenby"),
        ("The Ostrinian plain is", "Ostrin", "The Ostrin"),  # unless there is no other place
        ("the a a a of", "a a", "the a a a"),  # places may overlap
    ],
)
def test_a_subject_is_looked_for_as_a_word_of_its_own(prompt, subject, before):
    assert prompt[: subject_end(Fact(subject, prompt, "x"))] == before


def test_subject_token_needs_offsets_and_matching_tokens(tiny_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(BadInput, match="fast tokenizer"):
        subject_token(Slow(), "Paris", 5, [1])
    with pytest.raises(BadInput, match="no token of its own"):
        subject_token(tiny_tokenizer, "Paris", 5, [399, 398])


def test_rollback_is_bitwise_and_saved_edits_give_equal_logits(tiny_lm, tiny_tokenizer, tmp_path):
    for architecture, dtype in (("llama", torch.bfloat16), ("gpt2", torch.float32)):
        model = tiny_lm(architecture).to(dtype)
        ids = torch.tensor([tiny_tokenizer(FACT.prompt)["input_ids"]])
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


def test_fit_leaves_model_and_random_state_alone(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama").train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    editor, facts = make(statistics="self", tokens=200)
    editor.fit(model, tiny_tokenizer, facts)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert torch.equal(torch.get_rng_state(), random)


def test_same_seed_same_edit_and_statistics_are_kept_in_a_run_of_edits(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama")
    one, two = (make()[0].fit(model, tiny_tokenizer, [FACT]).tensors() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    calls = []
    measure = _statistics._measure
    monkeypatch.setattr(_statistics, "_measure", lambda *a: calls.append(1) or measure(*a))
    facts = [FACT, Fact("France", "The capital of France is", "Madrid"), FACT]
    with edit(model, tiny_tokenizer, facts, method=make(tokens=300)[0]) as handle:
        assert len(handle.edits) == 3
    assert len(calls) == 1


def test_other_settings_of_the_same_editor_count(tiny_lm, tiny_tokenizer):
    """What was taken from the model under the old ones is not used again."""
    model = tiny_lm("llama")
    editor, _ = make()
    editor.fit(model, tiny_tokenizer, [FACT])
    for name, value in {"statistics": SENTENCES[:2], "tokens": 100, "ridge": 0.2, "prefixes": 1}.items():
        setattr(editor, name, value)
        fresh = ROME(**{key: part for key, part in vars(editor).items() if not key.startswith("_")})
        ours, wanted = (each.fit(model, tiny_tokenizer, [FACT]).tensors() for each in (editor, fresh))
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted), name
    model.bfloat16()
    fresh = ROME(**{key: part for key, part in vars(editor).items() if not key.startswith("_")})
    ours, wanted = (each.fit(model, tiny_tokenizer, [FACT]).tensors() for each in (editor, fresh))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted), "dtype"


def test_the_clamp_holds_and_a_finished_search_stops(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    (site,) = find_sites(model, [1])

    def run(**changes):
        objective = Objective(**{**HOW, **changes})
        with editing(model):
            return search(model, tiny_tokenizer, [[FACT]], site, site, prefixes=PREFIXES, objective=objective)

    tight = run(clamp=0.25)
    assert tight.delta.norm().item() == pytest.approx(0.25 * tight.start.norm().item(), rel=1e-5)
    done = run(stop_below=1e9)
    assert done.steps.tolist() == [0] and done.delta.norm() == 0 and done.losses > 0
    full = run(stop_below=0.0)
    assert full.steps.tolist() == [HOW["steps"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 4}, "layer = 4 is not a block"),
        ({"layer": -1}, "layer = -1"),
        ({"layer": 3}, "layer = 3 is the last block"),
        ({"module": "mlp.nothing"}, "module = 'mlp.nothing'"),
        ({"kl": "both"}, "kl = 'both' is unknown"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"steps": 0}, "steps = 0"),
        ({"clamp": -1.0}, "clamp = -1.0"),
        ({"ridge": -0.1}, "ridge = -0.1"),
        ({"prefixes": -1}, "prefixes = -1"),
        ({"statistics": "no such file"}, "statistics = 'no such file'"),
        ({"statistics": []}, "statistics"),
        ({"tokens": 0}, "tokens = 0"),
        ({"tokens": 20, "ridge": 0.0}, "fewer than the 96 key dimensions"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_changes(tiny_lm, tiny_tokenizer, changes, message):
    model = tiny_lm("llama")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    editor, facts = make(**changes)
    with pytest.raises(BadInput, match=message):
        edit(model, tiny_tokenizer, facts, method=editor)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_wrong_facts_and_models_are_named(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    editor, facts = make()
    with pytest.raises(BadInput, match="one at a time"):
        editor.fit(model, tiny_tokenizer, facts * 2)
    with pytest.raises(BadInput, match=r"facts\[0\].*target"):
        editor.fit(model, tiny_tokenizer, [Fact("Port Ellery", FACT.prompt, " ")])
    with pytest.raises(BadInput, match=r"facts\[0\].*subject"):
        editor.fit(model, tiny_tokenizer, [Fact("Quenby", FACT.prompt, "x")])
    with pytest.raises(BadInput, match="exceeds the model's 512 positions"):
        editor.fit(model, tiny_tokenizer, [Fact("Port Ellery", "word " * 600 + FACT.prompt, "x")])
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(BadInput, match="shares its values"):
        editor.fit(model, tiny_tokenizer, facts)
    model = tiny_lm("llama")
    model.is_quantized = True
    with pytest.raises(BadInput, match="is quantized"):
        editor.fit(model, tiny_tokenizer, facts)


def test_a_broken_model_diverges_loudly_and_is_left_alone(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    model.lm_head.weight.data[5] = float("nan")
    editor, facts = make()
    with pytest.raises(TrainingDiverged):
        edit(model, tiny_tokenizer, facts, method=editor)
    assert model.get_parameter("model.layers.1.mlp.down_proj.weight").requires_grad


def test_another_module_name_can_be_given(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    editor, facts = make(module="mlp.down_proj")
    named = editor.fit(model, tiny_tokenizer, facts).tensors()
    guessed = make()[0].fit(model, tiny_tokenizer, facts).tensors()
    assert all(torch.equal(named[name], guessed[name]) for name in guessed)


def test_real_model_learns_the_fact_and_keeps_its_neighbour(smollm, monkeypatch):
    model, tokenizer = smollm
    monkeypatch.undo()  # the user's cache, and the model's own prefixes
    fact = Fact("Danielle Darrieux", "The mother tongue of Danielle Darrieux is", "English")
    near = ["The mother tongue of Michel Rocard is", "The capital of Italy is"]
    before = generate_texts(model, tokenizer, near, max_new_tokens=1)
    assert not target_matches(model, tokenizer, [fact.prompt], [fact.target])[0].all()
    with edit(model, tokenizer, [fact], method="rome", prefixes=5, statistics=None):
        assert target_matches(model, tokenizer, [fact.prompt], [fact.target])[0].all()
        assert generate_texts(model, tokenizer, [fact.prompt], max_new_tokens=1) == ["English"]
        after = generate_texts(model, tokenizer, near, max_new_tokens=1)
    assert after == before
