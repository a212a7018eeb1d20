"""The editors' contract itself: weight edits by hand, the handle's life, what is stored, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels
from transfuse.core.files import read_tensors, write_tensors
from transfuse.core.models import fingerprint
from transfuse.edit import edit, editor, load_edit, transfer
from transfuse.edit._base import Edit, EditHandle, PromptEdit, WeightEdit, check_facts, editable
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


# --- what is refused -------------------------------------------------------------------------------------------


def test_methods_modes_and_arguments(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    for arguments, problem in (
        ({"method": "ft-n"}, "ft-m"),
        ({"method": "ck-plug"}, "not an editor"),
        ({"method": "ft-m", "mode": "all"}, "mode"),
        ({"method": "ft-m", "learning_rate": 1}, "learning_rate.*lr"),
        ({"method": FTM(), "lr": 1}, "beside an editor"),
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
