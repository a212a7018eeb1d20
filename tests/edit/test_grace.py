"""GRACE: the codebook's rules on keys made by hand, values against Adam by hand, and where values stand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from edit.test_ft_m import FACTS, exact, sure
from transformers import DynamicCache

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.generate import encode_pair, generate_texts, pad_batch, target_matches, target_nll
from transfuse.core.training import generator
from transfuse.edit import edit, load_edit
from transfuse.edit._codebook import Met
from transfuse.edit.grace import FOREVER, GRACE, Codebook, carry, grow, nearest

OTHERS = ["A question: who built the bridge", "The capital of France is", "New facts move"]


def make(**changes):
    """An editor for tiny models and what it is asked to write."""
    return GRACE(**{"layer": 2, "eps": 0.05, "steps": 20, "lr": 0.5, **changes}), FACTS


def book_of(*entries):
    """A codebook of (key, radius, label) with width-1 values numbered from 1."""
    keys = torch.tensor([key for key, _, _ in entries], dtype=torch.float32)
    radii = torch.tensor([radius for _, radius, _ in entries], dtype=torch.float32)
    values = torch.arange(1.0, len(entries) + 1)[:, None]
    spans = torch.full((len(entries),), 3)
    return Codebook(keys, values, radii, spans, tuple(tuple(label) for _, _, label in entries))


def added(book, key, label, eps=1.0, span=3):
    return grow(book, torch.tensor(key, dtype=torch.float32), label, eps=eps, span=span)


# --- the codebook's rules --------------------------------------------------------------------------------------


def test_the_first_entry():
    book, entry, fresh = added(Codebook.empty(2, 1), [0.0, 0.0], [5], eps=0.5, span=7)
    assert (entry, fresh, book.labels) == (0, True, ((5,),))
    assert book.radii.tolist() == [0.5] and book.spans.tolist() == [7]
    assert book.keys.tolist() == [[0.0, 0.0]] and book.values.tolist() == [[0.0]]


def test_far_away_makes_a_new_entry():
    old = book_of(([0, 0], 1.0, [5]))
    book, entry, fresh = added(old, [0.0, 2.001], [6])  # just beyond eps + radius
    assert (entry, fresh) == (1, True)
    assert book.radii.tolist() == [1.0, 1.0]
    assert book.labels == ((5,), (6,))
    assert book.keys.tolist() == [[0, 0], [0, pytest.approx(2.001)]]
    assert old.radii.tolist() == [1.0] and len(old) == 1  # the old one is not changed


def test_the_same_target_widens():
    book, entry, fresh = added(book_of(([0, 0], 1.0, [5, 6])), [0.0, 1.75], [5, 6])
    assert (entry, fresh, len(book)) == (0, False, 1)
    assert book.radii.tolist() == [1.75]
    book, *_ = added(book, [0.5, 0.0], [5, 6])
    assert book.radii.tolist() == [1.75]  # never narrower


def test_another_target_splits():
    book, entry, fresh = added(book_of(([0, 0], 1.0, [5])), [0.0, 1.5], [6])
    assert (entry, fresh) == (1, True)
    assert book.radii[1].item() == pytest.approx(0.75)
    assert book.radii[0].item() == pytest.approx(0.75 - 1e-5, abs=1e-7)
    assert book.labels == ((5,), (6,))
    assert book.keys.tolist() == [[0, 0], [0, 1.5]]  # keys and labels in one order


def test_labels_are_compared_token_by_token():
    """[2, 4] and [3, 3] have one mean, and are not one label."""
    _, entry, fresh = added(book_of(([0, 0], 1.0, [2, 4])), [0.0, 0.5], [3, 3])
    assert (entry, fresh) == (1, True)
    _, entry, fresh = added(book_of(([0, 0], 1.0, [2, 4])), [0.0, 0.5], [4, 2])
    assert (entry, fresh) == (1, True)


def test_the_same_prompt_with_another_target_takes_over():
    book, entry, fresh = added(book_of(([0, 0], 1.0, [5]), ([9, 9], 1.0, [7])), [0.0, 0.0], [6, 6], span=2)
    assert (entry, fresh, len(book)) == (0, True, 2)
    assert book.labels == ((6, 6), (7,))
    assert book.values.tolist() == [[0.0], [2.0]]
    assert book.spans.tolist() == [2, 3]
    assert book.radii.tolist() == [1.0, 1.0]


def test_the_nearest_entry_decides():
    book, entry, _ = added(book_of(([0, 0], 5.0, [5]), ([3, 0], 0.5, [6])), [2.0, 0.0], [6])
    assert entry == 1 and book.radii.tolist() == [5.0, 1.0]


def test_nearest_is_exact_at_zero():
    keys = torch.randn(100, 64, generator=generator(0)) * 50
    distance, index = nearest(keys, keys.view(4, 25, 64))
    assert torch.equal(index, torch.arange(100).view(4, 25))
    assert (distance == 0).all()
    queries = torch.randn(30, 64, generator=generator(1))
    slow = [[math.dist(q, k) for k in keys.tolist()] for q in queries.tolist()]
    distance, index = nearest(keys, queries)
    for row, d, i in zip(slow, distance.tolist(), index.tolist()):
        assert i == row.index(min(row))
        assert d == pytest.approx(min(row), rel=1e-5)


def slow_carry(hit, index, spans, entry=-1, age=0):
    """One row, token by token."""
    out = []
    for h, i in zip(hit, index):
        entry, age = (i, 0) if h else (entry, age + 1)
        out.append(entry if entry >= 0 and age < spans[entry] else -1)
    return out


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 1, 5], [0, 12]])
def test_carry_is_the_loop_and_can_be_cut_anywhere(cuts):
    draw = generator(3)
    hit = torch.rand(40, 12, generator=draw) < 0.2
    index = torch.randint(0, 3, (40, 12), generator=draw)
    spans = torch.tensor([1, 3, FOREVER])
    met, parts, start = None, [], 0
    for cut in filter(None, cuts):
        entry, met = carry(hit[:, start : start + cut], index[:, start : start + cut], spans, met)
        parts.append(entry)
        start += cut
    wanted = [slow_carry(h, i, spans.tolist()) for h, i in zip(hit.tolist(), index.tolist())]
    assert torch.cat(parts, 1).tolist() == wanted
    assert isinstance(met, Met)


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_values_agree_with_adam_by_hand(tiny_lm, tiny_tokenizer, architecture):
    """Whole passes of one row, the module's output overwritten from the last prompt token on."""
    model = exact(tiny_lm(architecture))
    made = GRACE(layer=2, steps=3, lr=0.5, seed=7).fit(model, tiny_tokenizer, FACTS)
    assert made.touched == (0, 1)
    for i, fact in enumerate(FACTS):
        prompt, target = encode_pair(tiny_tokenizer, fact.prompt, fact.target)
        value = torch.rand(32, generator=generator(7 + i)).requires_grad_()
        m, v = torch.zeros(32), torch.zeros(32)
        slow, k, keys = copy.deepcopy(model), len(prompt) - 1, []
        module = slow.get_submodule(made.module)
        for count in (1, 2, 3):

            def put(module, args, output, k=k, value=value, keys=keys):
                keys.append(args[0][0, k].detach())
                return torch.cat([output[:, :k], value.double().expand(1, output.shape[1] - k, -1)], dim=1)

            hook = module.register_forward_hook(put)
            logits = slow(torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0, -len(target) :]
            hook.remove()
            loss = sum(torch.logsumexp(row, 0) - row[t] for row, t in zip(logits, target)) / len(target)
            (gradient,) = torch.autograd.grad(loss, value)
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            step = 0.5 * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
            value = (value - step).detach().requires_grad_()
        assert (made.values[i] - value).abs().max() < 1e-4
        assert (made.keys[i] - keys[0]).norm() < 1e-5


def test_one_at_a_time_is_all_at_once(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    editor, facts = make()
    with edit(model, tiny_tokenizer, facts, method=editor) as batch:
        together = batch.edits[-1].book
    with edit(model, tiny_tokenizer, facts, method=editor, mode="sequential") as sequential:
        apart = sequential.edits[-1].book
    assert together.labels == apart.labels and torch.equal(together.keys, apart.keys)
    assert torch.equal(together.radii, apart.radii)
    torch.testing.assert_close(together.values, apart.values, rtol=1e-3, atol=1e-3)


def test_near_prompts_with_one_target_share_an_entry(tiny_lm, tiny_tokenizer):
    model = sure(tiny_lm("llama"))
    one = Fact("Port Ellery", "The mayor of Port Ellery", "the")
    twin = Fact("Port Ellery", "Who is the mayor of Port Ellery? It is", "the")
    editor, _ = make(eps=50.0, steps=60)
    with edit(model, tiny_tokenizer, [one, twin], method=editor) as handle:
        (made,) = handle.edits
        assert len(made.book) == 1 and made.book.radii.item() == 50.0
        hits = target_matches(model, tiny_tokenizer, [one.prompt, twin.prompt], [twin.target] * 2)
        assert all(h.all() for h in hits)
    # Apart: the second edit finds a value that need not give its target, and trains it on.
    with edit(model, tiny_tokenizer, [one, twin], method=editor, mode="sequential") as handle:
        first, second = handle.edits
        assert len(second.keys) == 0 and second.before == 1
        (hits,) = target_matches(model, tiny_tokenizer, [twin.prompt], [twin.target])
        assert hits.all()
        handle.rollback()
    assert first.book is None and second.book is None


def test_editing_a_prompt_again_takes_over(tiny_lm, tiny_tokenizer):
    model = sure(tiny_lm("llama"))
    again = Fact(FACTS[0].subject, FACTS[0].prompt, "the")
    editor, _ = make(steps=60)
    with edit(model, tiny_tokenizer, [FACTS[0], again], method=editor, mode="sequential") as handle:
        assert len(handle.edits[-1].book) == 1
        (hits,) = target_matches(model, tiny_tokenizer, [again.prompt], [again.target])
        assert hits.all()


# --- in the forward pass ---------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def edited(request, tiny_lm, tiny_tokenizer):
    """A model with both facts in its codebook, and what it computed before."""
    model = sure(tiny_lm(request.param))
    editor, facts = make(steps=60)
    tokens = [tiny_tokenizer(text, return_tensors="pt")["input_ids"] for text in OTHERS]
    before = [model(ids).logits for ids in tokens]
    with edit(model, tiny_tokenizer, facts, method=editor) as handle:
        yield model, tokens, before, handle


def test_unrelated_prompts_are_bitwise_unchanged(edited, tiny_tokenizer):
    model, tokens, before, _ = edited
    for ids, old in zip(tokens, before):
        assert torch.equal(model(ids).logits, old)


def test_edited_prompts_in_any_batch(edited, tiny_tokenizer):
    model, *_, handle = edited
    prompts = [f.prompt for f in FACTS] + OTHERS
    targets = [f.target for f in FACTS] + ["nothing", "Paris", "on"]
    one = target_nll(model, tiny_tokenizer, prompts, targets, batch_size=1)
    all_ = target_nll(model, tiny_tokenizer, prompts, targets, batch_size=8)
    for a, b in zip(one, all_):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    handle.rollback()
    plain = target_nll(model, tiny_tokenizer, prompts, targets)
    assert torch.cat(one[:2]).mean() < 0.9 * torch.cat(plain[:2]).mean()
    for a, b in zip(one[2:], plain[2:]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_right_padding_gives_the_same_logits(edited, tiny_tokenizer):
    model, *_ = edited
    rows = [[*p, *t] for p, t in (encode_pair(tiny_tokenizer, f.prompt, f.target) for f in FACTS)]
    ids, mask = pad_batch(rows, 0, side="right")
    padded = model(input_ids=ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            padded[i, : len(row)], model(torch.tensor([row])).logits[0], rtol=1e-3, atol=1e-3
        )


def test_generation_with_and_without_cache_and_teacher_forcing_agree(edited, tiny_tokenizer):
    model, *_ = edited
    prompts = [f.prompt for f in FACTS] + OTHERS
    together = generate_texts(model, tiny_tokenizer, prompts, max_new_tokens=12)
    assert together == generate_texts(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=1)
    for prompt, text in zip(prompts, together):
        ids = tiny_tokenizer(prompt, return_tensors="pt")["input_ids"]
        plain = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)
        new = plain[0, ids.shape[1] :]
        assert tiny_tokenizer.decode(new, skip_special_tokens=True).lstrip(" ") == text
        forced = model(plain).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
        assert torch.equal(forced, new)


def test_a_cache_the_model_made_itself(edited, tiny_tokenizer):
    """Prompt in one call, the target token by token in others: as in one pass. Then a fresh, short prompt."""
    model, *_ = edited
    prompt, target = encode_pair(tiny_tokenizer, FACTS[0].prompt, FACTS[0].target)
    whole = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 :]
    out = model(torch.tensor([prompt]), use_cache=True)
    parts = [out.logits[0, -1]]
    for token in target:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits[0, -1])
    torch.testing.assert_close(torch.stack(parts), whole, rtol=1e-3, atol=1e-3)
    lone = model(torch.tensor([[target[0]]])).logits
    handle = edited[3]
    handle.rollback()
    assert torch.equal(lone, model(torch.tensor([[target[0]]])).logits)


@torch.no_grad()
def test_caches_that_are_shared_copied_cut_and_repeated(edited, tiny_tokenizer):
    """Every pass goes on from what its own cache holds, whatever ran in between."""
    model, *_ = edited
    prompt, target = encode_pair(tiny_tokenizer, FACTS[0].prompt, FACTS[0].target)
    head, rest, other = prompt[:2], prompt[2:], [7, 8, 9]

    def run(ids, cache, rows=1):
        return model(torch.tensor([ids] * rows), past_key_values=cache, use_cache=True).logits[:, -1]

    def agrees(found, *parts):
        whole = (
            model(torch.tensor([[token for part in parts for token in part]]))
            .logits[:, -1]
            .expand(len(found), -1)
        )
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)

    prefix, met = DynamicCache(), DynamicCache()
    run(head, prefix)
    one, two = copy.deepcopy(prefix), copy.deepcopy(prefix)  # a prefix shared by two questions
    agrees(run(rest, one), prompt)
    agrees(run(other, two), head, other)
    run(prompt, met)
    copied, repeated, cut = (copy.deepcopy(met) for _ in range(3))
    run(other, DynamicCache())
    agrees(run(target, copied), prompt, target)
    repeated.batch_repeat_interleave(3)
    agrees(run(target, repeated, rows=3), prompt, target)
    cut.crop(-len(rest))
    agrees(run(other, cut), head, other)
    ours = model(torch.tensor([prompt]), use_cache=True).past_key_values  # two that the model made itself
    model(torch.tensor([[5] * len(prompt)]), use_cache=True)
    agrees(run(target, ours), prompt, target)


def test_several_edits_in_one_text(edited, tiny_tokenizer):
    """A later key takes over from an earlier one."""
    model, *_, handle = edited
    book = handle.edits[-1].book
    text = FACTS[0].prompt + " Oskar Tveld. " + FACTS[1].prompt
    ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
    module = model.get_submodule(handle.edits[-1].module)
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(ids)
    start = len(tiny_tokenizer(FACTS[0].prompt)["input_ids"]) - 1
    assert not any(torch.equal(row, book.values[0]) for row in seen[0][:start])
    assert torch.equal(seen[0][start], book.values[0])
    # The second prompt stands after other text here: its key differs, and the first value goes on.
    assert torch.equal(seen[0][-1], book.values[0])


@pytest.mark.parametrize(
    ("replacement", "reach"), [("replace_last", 9), ("replace_target", None), ("replace_key", 1)]
)
def test_how_far_a_value_reaches(tiny_lm, tiny_tokenizer, replacement, reach):
    model = tiny_lm("llama")
    editor, _ = make(replacement=replacement, steps=2)
    prompt, target = encode_pair(tiny_tokenizer, FACTS[0].prompt, FACTS[0].target)
    with edit(model, tiny_tokenizer, FACTS[:1], method=editor) as handle:
        seen = []
        hook = model.get_submodule(handle.edits[0].module).register_forward_hook(
            lambda module, args, output: seen.append(output[0])
        )
        model(torch.tensor([[*prompt, 7, 8, 9, 10, 11, 12, 13, 14]]))
        hook.remove()
        value = handle.edits[0].book.values[0]
        stands = [torch.equal(row, value) for row in seen[0]]
    length = reach or len(target)
    assert stands == [len(prompt) - 1 <= i < len(prompt) - 1 + length for i in range(len(prompt) + 8)]


def test_base_model_alone_is_edited_too(edited, tiny_tokenizer):
    """The body without its head (as perplexity calls it) sees its own arguments, not those of an older pass."""
    model, *_ = edited
    long = tiny_tokenizer(OTHERS[0] + FACTS[0].prompt, return_tensors="pt")["input_ids"]
    model(long)
    ids = tiny_tokenizer(FACTS[0].prompt, return_tensors="pt")["input_ids"]
    hidden = model.base_model(input_ids=ids)[0]
    assert torch.equal(model.get_output_embeddings()(hidden), model(ids).logits)


# --- storage and failures --------------------------------------------------------------------------------------


def test_sequential_edits_are_stored_as_differences(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama")
    editor, facts = make(steps=3)
    with edit(model, tiny_tokenizer, facts, method=editor, mode="sequential") as handle:
        book = handle.edits[-1].book
        assert [len(e.keys) for e in handle.edits] == [1, 1]
        handle.save(tmp_path / "delta")
        assert handle.stored_bytes < 2 * 4 * (96 + 32) + 200
    with load_edit(tmp_path / "delta", model, tiny_tokenizer) as handle:
        again = handle.edits[-1].book
    for a, b in zip(
        (book.keys, book.values, book.radii, book.spans), (again.keys, again.values, again.radii, again.spans)
    ):
        assert torch.equal(a, b)
    assert book.labels == again.labels


def test_edits_are_applied_and_undone_in_order(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    editor, facts = make(steps=1)
    first = editor.fit(model, tiny_tokenizer, facts[:1])
    first.attach(model)
    second = editor.fit(model, tiny_tokenizer, facts[1:])
    second.attach(model)
    with pytest.raises(BadInput, match="roll those back first"):
        first.detach(model)
    second.detach(model)
    first.detach(model)
    with pytest.raises(IncompatibleModels, match="order"):
        second.attach(model)
    assert not model.get_submodule(first.module)._forward_hooks


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"eps": 0}, "eps"),
        ({"lr": -1}, "lr"),
        ({"steps": -1}, "steps"),
        ({"replacement": "replace_all"}, "replacement"),
        ({"layer": 9}, "layer"),
        ({"module": "mlp.nothing"}, "module"),
    ],
)
def test_bad_hyperparameters(tiny_lm, tiny_tokenizer, changes, named):
    editor, facts = make(**changes)
    with pytest.raises(BadInput, match=named):
        edit(tiny_lm("llama"), tiny_tokenizer, facts, method=editor)
