"""The editors' contract itself: weight edits by hand, the handle's life, what is stored, what is refused."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels
from transfuse.core.files import read_tensors, write_tensors
from transfuse.core.models import fingerprint
from transfuse.edit import edit, editor, load_edit, transfer
from transfuse.edit._base import Edit, EditHandle, Editor, PromptEdit, WeightEdit, check_facts, editable
from transfuse.edit._layers import block_name, down_projection
from transfuse.edit.ft_m import FTM

FACT = Fact("Spain", "The capital of Spain is", "Quenby")
DOWN = "model.layers.1.mlp.down_proj.weight"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- weight edits ----------------------------------------------------------------------------------------------


def test_low_rank_and_replaced_values(tiny_lm):
    model = tiny_lm("llama")
    old = model.get_parameter(DOWN).detach().clone()
    other = "model.layers.2.mlp.up_proj.weight"
    new = noise(*model.get_parameter(other).shape)
    left, right = noise(32, 2, seed=1), noise(2, 96, seed=2)
    change = WeightEdit(low_rank={DOWN: (left, right)}, replaced={other: new})
    change.attach(model)
    by_hand = torch.tensor(
        [[sum(left[i, r] * right[r, j] for r in range(2)) for j in range(96)] for i in range(32)]
    )
    assert (model.get_parameter(DOWN) - old - by_hand).abs().max() < 1e-5
    assert torch.equal(model.get_parameter(other), new)
    change.detach(model)
    assert torch.equal(model.get_parameter(DOWN), old)


def test_transposed_weights_take_the_transposed_product(tiny_lm):
    model = tiny_lm("gpt2")
    name = "transformer.h.1.mlp.c_proj.weight"  # Conv1D, [128, 32]
    old = model.get_parameter(name).detach().clone()
    left, right = noise(32, 1), noise(1, 128)
    change = WeightEdit(low_rank={name: (left, right)})
    change.attach(model)
    assert (model.get_parameter(name) - old - (left @ right).T).abs().max() < 1e-5


def test_bf16_rollback_is_bitwise_where_arithmetic_is_not(tiny_lm):
    model = tiny_lm("llama").to(torch.bfloat16)
    before = fingerprint(model)
    left, right = 1e3 * noise(32, 1), noise(1, 96)
    change = WeightEdit(low_rank={DOWN: (left, right)})
    change.attach(model)
    assert fingerprint(model) != before
    change.detach(model)
    assert fingerprint(model) == before


def test_foreign_edits_change_nothing(tiny_lm):
    model = tiny_lm("llama")
    before = fingerprint(model)
    good = {DOWN: noise(32, 96)}
    for bad, problem in (
        ({**good, "model.layers.9.mlp.down_proj.weight": noise(32, 96)}, "not a parameter"),
        ({**good, "model.layers.2.mlp.down_proj.weight": noise(32, 95)}, "does not fit"),
    ):
        with pytest.raises(IncompatibleModels, match=problem):
            WeightEdit(replaced=bad).attach(model)
        assert fingerprint(model) == before


def test_edits_on_one_weight_come_off_in_reverse(tiny_lm, tiny_tokenizer):
    """The lower of two handles refuses to be rolled back first, and can be afterwards."""
    model = tiny_lm("llama")
    before = fingerprint(model)
    low, high = (edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1) for _ in range(2))
    other = edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=2)
    both = fingerprint(model)
    with pytest.raises(BadInput, match="later edits on top of it; roll those back first"):
        low.rollback()
    assert low.active and fingerprint(model) == both
    for handle in (high, low, other):
        handle.rollback()
    assert fingerprint(model) == before
    kept = edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1)
    edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1)  # nobody can undo this one any more
    kept.rollback()
    assert fingerprint(model) == before


def test_an_edit_is_in_one_place_at_a_time(tiny_lm):
    one, two = tiny_lm("llama"), tiny_lm("llama", seed=1)
    before = fingerprint(one), fingerprint(two)
    change = WeightEdit(replaced={DOWN: noise(32, 96)})
    change.attach(one)
    for model in (one, two):
        with pytest.raises(BadInput, match="is in place already"):
            change.attach(model)
    change.detach(one)
    assert (fingerprint(one), fingerprint(two)) == before
    change.attach(two)
    change.detach(two)
    assert fingerprint(two) == before[1]


def test_a_failure_halfway_changes_nothing(tiny_lm):
    model = tiny_lm("llama")
    before = fingerprint(model)
    with torch.inference_mode():  # a tensor that nothing outside may change
        frozen = torch.nn.Parameter(torch.zeros(32, 96), requires_grad=False)
    model.model.layers[2].mlp.down_proj.weight = frozen
    mixed = fingerprint(model)
    change = WeightEdit(replaced={DOWN: noise(32, 96), DOWN.replace("1", "2"): noise(32, 96)})
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        change.attach(model)
    assert fingerprint(model) == mixed != before
    model.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 96))
    change.attach(model)  # it is free to be applied again


def test_weights_wrapped_by_an_adapter_since_are_still_put_back(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    old = model.get_parameter(DOWN).detach().clone()
    handle = edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))
    handle.rollback()
    assert torch.equal(model.model.layers[1].mlp.down_proj.base_layer.weight, old)
    with pytest.raises(BadInput, match=r"wrapped by an adapter; merge .*base_layer"):
        edit(model, tiny_tokenizer, FACT, method="ft-m", layer=1)
    with edit(
        model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1, module="mlp.down_proj.base_layer"
    ):
        assert not torch.equal(model.model.layers[1].mlp.down_proj.base_layer.weight, old)
    assert torch.equal(model.model.layers[1].mlp.down_proj.base_layer.weight, old)


def test_stored_and_restored(tmp_path):
    low = {DOWN: (noise(32, 2), noise(2, 96))}
    new = {"a.b::c": noise(3)}
    change = WeightEdit(low_rank=low, replaced=new)
    write_tensors(tmp_path / "e.safetensors", change.tensors(), {"meta": change.meta()})
    tensors, header = read_tensors(tmp_path / "e.safetensors")
    again = Edit.kinds["weights"].restore(tensors, header["meta"])
    assert torch.equal(again.low_rank[DOWN][0], low[DOWN][0])
    assert torch.equal(again.low_rank[DOWN][1], low[DOWN][1])
    assert torch.equal(again.replaced["a.b::c"], new["a.b::c"])


# --- the handle ------------------------------------------------------------------------------------------------


class Suffix(PromptEdit):
    """Adds a word to the prompt; knows whether it is in place."""

    kind = "test-suffix"

    def __init__(self, word, fails=False):
        self.word, self.fails, self.place = word, fails, []

    def attach(self, model):
        if self.fails:
            raise KeyboardInterrupt
        self.place.append("on")

    def detach(self, model):
        self.place.append("off")

    def tensors(self):
        return {"t": torch.zeros(3)}

    def meta(self):
        return {"word": self.word}

    @classmethod
    def restore(cls, tensors, meta):
        return cls(meta["word"])

    def rewrite(self, prompt):
        return f"{prompt} {self.word}"


def test_edits_are_undone_in_reverse_and_once(tiny_lm, tiny_tokenizer):
    order = []
    handle = EditHandle(tiny_lm("llama"), tiny_tokenizer, method="x")
    for word in "abc":
        change = Suffix(word)
        change.detach = lambda model, word=word: order.append(word)
        handle.add(change)
    assert handle.rewrite("p") == "p a b c" and handle.active
    handle.rollback()
    handle.rollback()
    assert order == ["c", "b", "a"] and not handle.active and handle.edits == ()
    assert handle.rewrite("p") == "p"


def test_what_is_added_after_a_rollback_is_rolled_back_too(tiny_lm, tiny_tokenizer):
    change = Suffix("a")
    handle = EditHandle(tiny_lm("llama"), tiny_tokenizer, method="x")
    handle.rollback()
    handle.add(change)
    assert handle.active
    handle.rollback()
    assert change.place == ["on", "off"] and not handle.active


def test_inside_inference_mode(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    before = fingerprint(model)
    with torch.inference_mode(), edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1):
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_context_manager_rolls_back_on_error(tiny_lm, tiny_tokenizer):
    change = Suffix("a")
    with pytest.raises(KeyError), EditHandle(tiny_lm("llama"), tiny_tokenizer, method="x") as handle:
        handle.add(change)
        raise KeyError
    assert change.place == ["on", "off"]


def test_a_failed_edit_is_not_added(tiny_lm, tiny_tokenizer):
    handle = EditHandle(tiny_lm("llama"), tiny_tokenizer, method="x")
    with pytest.raises(KeyboardInterrupt):
        handle.add(Suffix("a", fails=True))
    assert handle.edits == ()


def test_sequential_edits_see_each_other(tiny_lm, tiny_tokenizer):
    """The second edit starts from the weights the first left; rolling back returns to the beginning."""
    model = tiny_lm("llama")
    name = down_projection(model, 1) + ".weight"
    other = Fact("France", "The capital of France is", "Madrid")
    worker = FTM(layer=1, steps=2)
    before = fingerprint(model)
    with edit(model, tiny_tokenizer, [FACT, other], method=worker, mode="sequential") as handle:
        first, second = handle.edits
        last = model.get_parameter(name).detach().clone()
    assert fingerprint(model) == before
    first.attach(model)
    assert torch.equal(worker.fit(model, tiny_tokenizer, [other]).replaced[name], last)
    assert torch.equal(second.replaced[name], last)
    first.detach(model)
    with edit(model, tiny_tokenizer, [FACT, other], method=worker) as handle:
        assert len(handle.edits) == 1


def test_saving(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama")
    handle = edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1)
    assert handle.stored_bytes == 32 * 96 * 4
    folder = handle.save(tmp_path / "out" / "delta", measurements={"recall": 0.5})
    lineage = json.loads((folder / "transfuse.json").read_text())
    assert lineage["method"] == "ft-m" and lineage["measurements"] == {"recall": 0.5}
    assert lineage["arguments"]["steps"] == 1 and lineage["inputs"]["facts"][0]["target"] == "Quenby"
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".md", ".safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="folder"):
        handle.save(tmp_path / "file")
    handle.rollback()
    with pytest.raises(BadInput, match="rolled back"):
        handle.save(tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_an_editor_of_ones_own_is_saved_and_loaded(tiny_lm, tiny_tokenizer, tmp_path):
    """Its kind of edit is known: it need not be a method of the catalogue."""

    class Zero(Editor):
        def fit(self, model, tokenizer, facts):
            return WeightEdit(replaced={DOWN: torch.zeros(32, 96)})

    model = tiny_lm("llama")
    with edit(model, tiny_tokenizer, FACT, method=Zero()) as handle:
        folder = handle.save(tmp_path / "delta")
    with load_edit(folder, model, tiny_tokenizer):
        assert not model.get_parameter(DOWN).any()


def test_transfer_checks_the_folder_before_any_work(tiny_lm, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(FTM, "fit", lambda *_: pytest.fail("the model was edited"))
    (tmp_path / "out").write_text("")
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"subject": "Spain", "prompt": FACT.prompt, "target": "Quenby"}))
    with pytest.raises(BadInput, match=r"output.*is not a folder"):
        transfer(tiny_lm("llama"), tiny_tokenizer, facts=facts, method=FTM(), output=tmp_path / "out")


def test_transfer_writes_the_delta_and_restores(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama")
    before = fingerprint(model)
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"subject": "Spain", "prompt": FACT.prompt, "target": "Quenby"}))
    out = transfer(model, tiny_tokenizer, facts=facts, method=FTM(steps=1, layer=1), output=tmp_path / "out")
    assert fingerprint(model) == before
    with load_edit(out, model, tiny_tokenizer) as handle:
        assert fingerprint(model) != before
        assert (handle.method, [f.target for f in handle.facts]) == ("ft-m", ["Quenby"])
    assert fingerprint(model) == before


def test_folders_that_hold_no_edit(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama")
    with pytest.raises(BadInput, match="no saved edit"):
        load_edit(tmp_path, model, tiny_tokenizer)
    handle = edit(model, tiny_tokenizer, FACT, method="ft-m", steps=1, layer=1)
    folder = handle.save(tmp_path / "delta")
    handle.rollback()
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptFile):
        load_edit(folder, model, tiny_tokenizer)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_folder_that_lost_an_edit(tiny_lm, tiny_tokenizer, tmp_path, lost):
    model = tiny_lm("llama")
    other = Fact("France", "The capital of France is", "Madrid")
    with edit(
        model, tiny_tokenizer, [FACT, other], method=FTM(steps=1, layer=1), mode="sequential"
    ) as handle:
        folder = handle.save(tmp_path / "delta")
    before = fingerprint(model)
    (folder / f"edit-{lost:05d}.safetensors").unlink()
    with pytest.raises(CorruptFile, match="does not hold all of its edits"):
        load_edit(folder, model, tiny_tokenizer)
    write_tensors(folder / f"edit-{lost:05d}.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(CorruptFile, match=f"edit-{lost:05d}.* is not an edit's"):
        load_edit(folder, model, tiny_tokenizer)
    assert fingerprint(model) == before


# --- what is refused -------------------------------------------------------------------------------------------


def test_methods_modes_and_arguments(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    for arguments, problem in (
        ({"method": "ft-n"}, "ft-m"),
        ({"method": "ck-plug"}, "not an editor"),
        ({"method": "ft-m", "mode": "all"}, "mode"),
        ({"method": "ft-m", "learning_rate": 1}, "learning_rate.*lr"),
        ({"method": FTM(), "lr": 1}, "beside an editor"),
        ({"method": FTM}, "neither a slug nor an editor"),
        ({"method": "ft-m", "steps": 2.5}, "steps = 2.5 .* whole number"),
        ({"method": "rome", "prefixes": 2.5}, "prefixes = 2.5"),
        ({"method": "memit", "batch_size": 1.5}, "batch_size = 1.5"),
        ({"method": "lora", "rank": 2.5}, "rank = 2.5"),
        ({"method": "grace", "seed": 1.5}, "seed = 1.5"),
        ({"method": "ike", "k": 1.5}, "k = 1.5"),
    ):
        with pytest.raises(BadInput, match=problem):
            edit(model, tiny_tokenizer, FACT, **arguments)
    assert isinstance(editor("ft_m"), FTM)


def test_facts():
    for facts, named in (
        ([], "facts"),
        ([FACT, Fact("Spain", "Spain is", "", id="r2")], r"facts\[1\] \(r2\): target"),
        ([Fact("", "Spain is", "x")], "subject"),
        ([Fact("spain", "Spain is", "x")], "subject = 'spain' is not in the prompt"),
    ):
        with pytest.raises(BadInput, match=named):
            check_facts(facts)
    check_facts([FACT])


def test_weights_that_cannot_be_edited(tiny_lm):
    model = tiny_lm("llama")
    assert editable(model, DOWN) is model.get_parameter(DOWN)
    with pytest.raises(BadInput, match="not a parameter"):
        editable(model, "model.layers.1.mlp.down.weight")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(BadInput, match="shares its values with lm_head"):
        editable(model, "model.embed_tokens.weight")
    model.register_parameter(
        "codes", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    )
    with pytest.raises(BadInput, match=r"quantized \(torch.int8\)"):
        editable(model, "codes")


def test_packed_weights(tiny_lm, tiny_tokenizer):
    """Quantized by a module without a weight matrix, as HQQ's."""

    class Packed(torch.nn.Module):
        pass

    model = tiny_lm("llama")
    model.model.layers[1].mlp.down_proj = Packed()
    with pytest.raises(BadInput, match="is a Packed without a weight matrix; load the model unquantized"):
        edit(model, tiny_tokenizer, FACT, method="ft-m", layer=1)


def test_numpy_numbers_are_numbers(tiny_lm, tiny_tokenizer):
    how = {"steps": np.int64(1), "layer": np.int64(1), "lr": np.float32(1e-3)}
    with edit(tiny_lm("llama"), tiny_tokenizer, FACT, method="ft-m", **how) as handle:
        assert list(handle.edits[0].replaced) == [DOWN]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3"])
def test_layers_by_name(tiny_lm, architecture):
    model = tiny_lm(architecture, layers=3)
    name = down_projection(model, 2)
    assert name.startswith(block_name(model, 2))
    inner = 128 if architecture == "gpt2" else 96
    assert sorted(model.get_submodule(name).weight.shape) == [32, inner]
    explicit = name.removeprefix(block_name(model, 2) + ".")
    assert down_projection(model, 2, explicit) == name
    with pytest.raises(BadInput, match=explicit):
        down_projection(model, 2, "mlp.other")
