"""Taps: capture gives what the module saw, replace changes what the model uses, and all is restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from transfuse.core import taps
from transfuse.core.errors import BadInput
from transfuse.core.taps import capture, contiguous_head, decoder_layers, match, replace, replay, skip, watch

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma3"]


def batch_of(side="left"):
    ids = torch.randint(3, 400, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :2] = 0
    if side == "right":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def counting(model):
    """Forward hooks that count block calls; returns (counts, handles)."""
    counts = dict.fromkeys(decoder_layers(model), 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    return counts, [model.get_submodule(n).register_forward_hook(count(n)) for n in counts]


class Chain(nn.Module):
    """x -> 2x -> 2x + 3 (as a tuple) -> its first element squared."""

    def __init__(self):
        super().__init__()
        self.twice, self.shift, self.square = Double(), Shift(), Square()

    def forward(self, x):
        return self.square(value=self.shift(self.twice(x))[0])


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Shift(nn.Module):
    def forward(self, x):
        return x + 3, "rest"


class Square(nn.Module):
    def forward(self, value):
        return value**2


def test_capture_gives_what_each_module_saw_and_returned():
    x = torch.tensor([1.0, -2.0])
    with capture(chain := Chain(), ["twice", "sh*", "square"]) as out:
        chain(x)
    assert {k: v.tolist() for k, v in out.items()} == {
        "twice": [2, -4],
        "shift": [5, -1],
        "square": [25, 1],
    }
    assert out.tuples == {"shift"}
    with capture(chain, "*", inputs=True) as seen:
        chain(x)
    assert {k: v.tolist() for k, v in seen.items()} == {
        "twice": [1, -2],
        "shift": [2, -4],
        "square": [5, -1],
    }


def test_capture_keeps_the_latest_call_and_the_graph_only_when_asked():
    x = torch.tensor([1.0], requires_grad=True)
    chain = Chain()
    with capture(chain, "twice") as plain, capture(chain, "twice", grad=True) as graph:
        chain(torch.zeros(1))
        chain(x)
    assert plain["twice"].item() == graph["twice"].item() == 2
    assert not plain["twice"].requires_grad
    (gradient,) = torch.autograd.grad(graph["twice"].sum(), x)
    assert gradient.item() == 2


def test_replace_output_and_input_keep_the_rest_of_a_tuple():
    x = torch.tensor([1.0, -2.0])
    chain = Chain()
    with replace(chain, {"shift": lambda t: t * 10}):
        assert chain(x).tolist() == [2500, 100]
        assert chain.shift(x)[1] == "rest"
    with replace(chain, {"shift": lambda t: t * 10}, inputs=True):
        assert chain(x).tolist() == [23**2, 37**2]
    with replace(chain, {"square": torch.zeros_like}, inputs=True):  # given by keyword
        assert chain(x).tolist() == [0, 0]
    assert chain(x).tolist() == [25, 1]


def test_nested_contexts_compose_in_the_order_of_entry_and_unwind():
    chain, x = Chain(), torch.tensor([1.0])
    with replace(chain, {"twice": lambda t: t + 1}):
        with replace(chain, {"twice": lambda t: t * 100}):
            with capture(chain, "twice") as seen:
                chain(x)
            assert seen["twice"].item() == 300  # (2 + 1) * 100: the outer change first
        assert chain(x).item() == 36
    assert chain(x).item() == 25
    assert hooks(chain) == 0


@pytest.mark.parametrize("kind", ["capture", "replace", "replay"])
def test_everything_is_restored_after_an_error(tiny_lm, kind):
    model = tiny_lm("llama")
    blocks = list(model.model.layers)
    before = model(**batch_of()).logits
    context = {
        "capture": lambda: capture(model, "model.layers.*", stop=True),
        "replace": lambda: replace(model, {"model.layers.1": lambda t: t * 0}),
        "replay": lambda: replay(model, "model.layers.2", torch.zeros(3, 9, 32)),
    }[kind]
    with pytest.raises(ZeroDivisionError), context():
        _ = 1 / 0
    assert hooks(model) == 0
    assert list(model.model.layers) == blocks
    assert torch.equal(model(**batch_of()).logits, before)


def test_an_error_inside_the_forward_pass_leaves_nothing_behind(tiny_lm):
    model = tiny_lm("gpt2")
    with pytest.raises(RuntimeError), replace(model, {"transformer.h.1": lambda t: t[..., :3]}):
        model(**batch_of())
    assert hooks(model) == 0
    model(**batch_of())


def test_patterns_select_in_order_and_a_miss_names_the_nearest(tiny_lm):
    model = tiny_lm("llama")
    assert match(model, "model.layers.*.mlp") == [f"model.layers.{i}.mlp" for i in range(4)]
    assert match(model, "model.layers.[12]") == ["model.layers.1", "model.layers.2"]
    with pytest.raises(BadInput, match=r"did you mean 'model\.layers\.1\.mlp'"):
        match(model, "model.layers.1.mlb")
    with pytest.raises(BadInput, match="named_modules"):
        match(model, "0")


def test_a_module_in_two_places_is_found_once_by_either_name():
    model = nn.ModuleDict({"one": Double(), "two": Shift()})
    model["three"] = model["one"]
    assert match(model, "three") == ["three"]
    assert match(model, "*") == ["one", "two"]
    with replace(model, {"t*": lambda y: y + 100}):  # two and three
        assert model["one"](torch.tensor(1.0)) == 102
        assert model["two"](torch.tensor(1.0)) == (104, "rest")


def test_records_are_read_and_changed(tiny_lm):
    model, batch = tiny_lm("llama"), batch_of()
    plain = model(**batch).logits
    with replace(model, {"model": lambda hidden: 2 * hidden}), capture(model, "model") as seen:
        doubled = model(**batch, output_hidden_states=True)
    assert torch.equal(doubled.logits, model.lm_head(seen["model"])) and not torch.equal(
        doubled.logits, plain
    )
    assert len(doubled.hidden_states) == 5
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_meet_hooks_that_came_later(tiny_lm, in_place):
    model, batch, name = tiny_lm("llama", layers=2), batch_of(), "model.layers.0.mlp"
    with torch.no_grad():
        with replace(model, {name: torch.zeros_like}):
            expected = model(**batch).logits
        compiled = torch.compile(model, backend="eager")
        if in_place:
            model.compile(backend="eager")
        plain = compiled(**batch).logits
        with replace(model, {name: torch.zeros_like}), capture(model, name) as seen:
            assert torch.equal(compiled(**batch).logits, expected)
        assert not seen[name].any()
        heard = []
        with watch(model.get_submodule(name), heard.append):
            assert torch.equal(compiled(**batch).logits, plain)
        assert len(heard) == 1
        assert torch.equal(compiled(**batch).logits, plain)
    torch.compiler.reset()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_compiled_code_runs_again_when_the_last_tap_is_gone(tiny_lm, order, monkeypatch):
    monkeypatch.setattr(taps, "_EAGER", [])  # edits that other tests have left in place
    model, batch, name = tiny_lm("llama", layers=2), batch_of(), "model.layers.0.mlp"
    compiled, runs = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *a: runs.append(1) or graph(*a)

    fast = torch.compile(model, backend=backend)
    with torch.no_grad(), torch.compiler.set_stance("default"):
        plain = fast(**batch).logits
        both = [replace(model, {name: torch.zeros_like}), capture(model, name)]
        for tap in both:
            tap.__enter__()
        for number in order:
            del runs[:]
            fast(**batch)
            assert not runs
            both[number].__exit__(None, None, None)
        assert torch.equal(fast(**batch).logits, plain) and runs
    torch.compiler.reset()


def test_blocks_of_models_with_several_stacks():
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {"vocab_size": 60, "num_hidden_layers": 3, "num_key_value_heads": 2, **size}
    for depth in (3, 5):  # a tower beside the language model, as deep or deeper
        vision = {
            "model_type": "clip_vision_model",
            "num_hidden_layers": depth,
            "image_size": 8,
            "patch_size": 4,
            **size,
        }
        config = AutoConfig.for_model(
            "llava", vision_config=vision, text_config={"model_type": "llama", **text}, image_token_id=3
        )
        model = AutoModelForImageTextToText.from_config(config)
        assert decoder_layers(model) == [f"model.language_model.layers.{i}" for i in range(3)]
    hybrid = AutoConfig.for_model("jamba", **{**text, "num_hidden_layers": 8}, mamba_dt_rank=4)
    model = AutoModelForCausalLM.from_config(hybrid)
    assert len({type(block) for block in model.model.layers}) == 2
    assert decoder_layers(model) == [f"model.layers.{i}" for i in range(8)]
    experts = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **text))
    for block in experts.model.layers:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    assert decoder_layers(experts) == [f"model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_layers(tiny_lm, architecture):
    model = tiny_lm(architecture)
    root = "transformer.h" if architecture == "gpt2" else "model.layers"
    assert decoder_layers(model) == [f"{root}.{i}" for i in range(4)]
    with pytest.raises(BadInput, match="no stack of blocks"):
        decoder_layers(Chain())


def test_stop_runs_nothing_above(tiny_lm):
    model = tiny_lm("llama")
    counts, handles = counting(model)
    with capture(model, ["model.layers.0", "model.layers.1"], stop=True) as seen:
        assert seen.run(**batch_of()) is None
        assert seen.run(**batch_of()) is None  # can be used again
    for handle in handles:
        handle.remove()
    assert list(counts.values()) == [2, 2, 0, 0] or list(counts.values()) == [2, 1, 0, 0]
    assert set(seen) == {"model.layers.0", "model.layers.1"}
    full = model(**batch_of(), output_hidden_states=True).hidden_states
    assert torch.equal(seen["model.layers.1"], full[2])


def test_stop_ends_only_passes_of_its_own_run(tiny_lm):
    model = tiny_lm("llama")
    with (
        capture(model, "model.layers.0", stop=True) as low,
        capture(model, "model.layers.3", stop=True) as high,
    ):
        assert low.run(**batch_of()) is None
        assert set(low) == {"model.layers.0"} and not high
        assert high.run(**batch_of()) is None  # the lower one does not end it
        assert set(high) == {"model.layers.3"}
        assert model(**batch_of()).logits.shape == (3, 9, 400)  # a plain call runs to its end
    assert hooks(model) == 0


def test_stop_with_nothing_left_to_see_ends_again_after_an_error(tiny_lm):
    model = tiny_lm("llama")
    with capture(model, "model.layers.1", stop=True) as seen:
        with pytest.raises(TypeError):
            seen.run(input_ids="no tensor")
        assert model(**batch_of()).logits.shape == (3, 9, 400)
        assert seen.run(**batch_of()) is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_replayed_logits_equal_full_ones(tiny_lm, architecture, index, side):
    model, batch = tiny_lm(architecture), batch_of(side)
    layer = decoder_layers(model)[index]
    with torch.no_grad():
        with capture(model, layer, inputs=True) as seen:
            full = model(**batch).logits
        counts, handles = counting(model)
        with replay(model, layer, seen[layer]):
            again = model(**batch).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(again, full)
    assert list(counts.values()) == [0] * index + [1] * (4 - index)


def test_replay_takes_changed_states_and_gradients_flow_to_them(tiny_lm):
    model, batch = tiny_lm("llama"), batch_of()
    with capture(model, "model.layers.2", inputs=True) as seen:
        model(**batch)
    delta = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with replay(model, "model.layers.2", seen["model.layers.2"] + delta):
        replayed = model(**batch).logits
    with replace(model, {"model.layers.1": lambda t: t + delta}):
        replaced = model(**batch).logits
    assert torch.equal(replayed, replaced)
    (ours,) = torch.autograd.grad(replayed.square().mean(), delta, retain_graph=True)
    (theirs,) = torch.autograd.grad(replaced.square().mean(), delta)
    assert torch.allclose(ours, theirs, atol=1e-7) and ours.abs().max() > 0


def test_replay_nests(tiny_lm):
    model, batch = tiny_lm("qwen2"), batch_of()
    with capture(model, ["model.layers.1", "model.layers.3"], inputs=True) as seen:
        full = model(**batch).logits
    with replay(model, "model.layers.1", seen["model.layers.1"]):
        with replay(model, "model.layers.3", seen["model.layers.3"]):
            assert torch.equal(model(**batch).logits, full)
        assert torch.equal(model(**batch).logits, full)
    assert torch.equal(model(**batch).logits, full)


def test_a_block_may_be_skipped_more_than_once(tiny_lm):
    model, batch = tiny_lm("llama"), batch_of()
    blocks = list(model.model.layers)
    with skip(model, [0]):
        once = model(**batch).logits
        with skip(model, [0]), skip(model, [0, 1]):
            assert decoder_layers(model) == [f"model.layers.{i}" for i in range(4)]
            assert model.model.layers[0].self_attn is blocks[0].self_attn
        assert torch.equal(model(**batch).logits, once)
    assert list(model.model.layers) == blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replay_of_a_suffix_on_a_cached_prefix(tiny_lm, architecture):
    """The first tokens come from a cache: only the suffix of the upper blocks is computed."""
    model, batch = tiny_lm(architecture), batch_of()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    layer, cut = decoder_layers(model)[2], 5
    with torch.no_grad(), capture(model, layer, inputs=True) as seen:
        cache = DynamicCache()
        full = model(**{**batch, "use_cache": True}, position_ids=positions, past_key_values=cache).logits
        hidden = seen[layer]
    prefix = DynamicCache()
    for i, entry in enumerate(cache.layers):
        prefix.update(entry.keys[:, :, :cut], entry.values[:, :, :cut], i)
    with torch.no_grad(), replay(model, layer, hidden[:, cut:]):
        suffix = model(
            input_ids=batch["input_ids"][:, cut:], attention_mask=batch["attention_mask"],
            position_ids=positions[:, cut:], past_key_values=prefix, use_cache=True,
        ).logits  # fmt: skip
    assert torch.allclose(suffix, full[:, cut:], atol=1e-5 * float(full.abs().max()))


def test_replay_refuses_what_is_not_a_block(tiny_lm):
    with (
        pytest.raises(BadInput, match="not a block"),
        replay(tiny_lm("llama"), "model.layers.0.mlp", torch.zeros(1)),
    ):
        pass


def test_skipped_blocks_show_their_attributes_and_take_tuples():
    """An architecture whose loop reads `block.kind` and takes the first element of a tuple."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.kind = nn.Linear(2, 2), "full"

        def forward(self, hidden, scale=1.0):
            return (self.linear(hidden) * scale,)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                assert block.kind == "full" and block.linear.weight.shape == (2, 2)
                x = block(x, scale=2.0)[0]
            return x

    torch.manual_seed(0)
    stack, x = Stack(), torch.randn(4, 2)
    with capture(stack, "blocks.2", inputs=True) as seen, capture(stack, "blocks.*") as out:
        full = stack(x)
    assert "blocks.0" in out.tuples
    with replay(stack, "blocks.2", seen["blocks.2"], tupled="blocks.0" in out.tuples):
        assert torch.equal(stack(x), full)


def test_the_head_reads_contiguous_states(tiny_lm):
    model = tiny_lm("llama").requires_grad_(False)
    ids, read = torch.arange(12).reshape(3, 4) + 3, []
    head = model.get_output_embeddings()
    plain = model(ids, logits_to_keep=2).logits
    with watch(head, lambda given: read.append(given["input"].is_contiguous())):
        model(ids, logits_to_keep=2)
        with contiguous_head(model):
            with watch(head, lambda given: read.append(given["input"].is_contiguous())):
                torch.testing.assert_close(model(ids, logits_to_keep=2).logits, plain)
            with pytest.raises(BadInput), contiguous_head(model):
                match(model, "nothing")
    assert read == [False, False, True]  # the outer watch sees what the hook before it is given
    assert not head._forward_pre_hooks
    with contiguous_head(nn.Linear(2, 2)) as nothing:
        assert nothing is None
