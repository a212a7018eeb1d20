"""The merge as a whole: adapters, vocabularies, tied and integer tensors, what is refused, memory."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import transfuse
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable, Unavailable
from transfuse.core.shards import Checkpoint
from transfuse.core.training import generator
from transfuse.merge import merge
from transfuse.merge._methods import Linear


def moved(model, seed, scale=0.1):
    model, random = copy.deepcopy(model), generator(seed)
    for parameter in model.parameters():
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=random))
    return model


def adapter(base, seed, **options):
    """A PEFT model with a LoRA whose factors are all random."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    model, random = get_peft_model(copy.deepcopy(base), LoraConfig(**options)), generator(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def states_match(found, model, atol=1e-5):
    own = model.state_dict()
    return all(torch.allclose(tensor, own[name], atol=atol) for name, tensor in found.items())


# --- adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    ids=["plain", "rslora", "patterns", "saved-head", "embedding", "transposed"],
)
def test_an_adapter_is_its_product_on_the_base(tiny_lm, tmp_path, architecture, options):
    """As folder, as PEFT model and as "base+adapter" it counts as what PEFT merges it into."""
    base = tiny_lm(architecture, layers=1)
    model = adapter(base, 3, **options)
    folder, under = save(model, tmp_path / "adapter"), save(base, tmp_path / "base")
    wanted = copy.deepcopy(model).merge_and_unload()
    for given in (folder, model):
        found = merge(base=under, models=[given], method="task_arithmetic", scaling=1.0)
        assert states_match(found, wanted)
    assert states_match(merge(models=[f"{under}+{folder}"]), wanted)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(under)}))
    assert states_match(merge(models=[folder]), wanted)


def random_lora(model, seed=7):
    random = generator(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


def products_of(model, adapter_name):
    """By weight's name, what PEFT's layers add to it."""
    return {
        f"{place.removeprefix('base_model.model.')}.weight": layer.get_delta_weight(adapter_name).detach()
        for place, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and adapter_name in layer.lora_A
    }


def added(found, base):
    own = base.state_dict()
    return {name: found[name] - own[name] for name in found if not torch.equal(found[name], own[name])}


def same_changes(found, wanted):
    return set(found) == set(wanted) and all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)


@pytest.mark.parametrize("kind", ["second", "only", "transformers", "inside"])
def test_the_active_adapter_in_memory_counts(tiny_lm, kind):
    """Whatever its name: a second one, the only one, one that transformers put in, PEFT's from within."""
    base = tiny_lm("llama", layers=1)
    if kind == "transformers":
        model = copy.deepcopy(base)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="sql")
    else:
        first = "default" if kind == "second" else "sql"
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]), first)
    if kind == "second":
        model.add_adapter("sql", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        model.set_adapter("sql")
    wanted = products_of(random_lora(model), "sql")
    given = model.base_model.model if kind == "inside" else model
    assert same_changes(added(merge(models=[given], base=base), base), wanted)


def test_several_active_adapters_are_refused(tiny_lm):
    base = tiny_lm("llama", layers=1)
    model = adapter(base, 3)
    model.add_adapter("sql", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "sql"])
    with pytest.raises(BadInput, match=r"\['default', 'sql'\] are active and not one adapter"):
        merge(models=[model], base=base)


def test_a_base_that_carries_adapters_is_refused(tiny_lm):
    base = tiny_lm("llama", layers=1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for given in (base, model):
        with pytest.raises(BadInput, match=r"base = .* has adapters of PEFT in its layers"):
            merge(models=[model], base=given)


def test_each_layer_says_whether_it_is_stored_transposed(tiny_lm, tmp_path):
    """PEFT writes one flag for all layers, that of the last: here it is wrong for the square matrices."""
    base = tiny_lm("gpt2", layers=1)
    base.lm_head = torch.nn.Linear(32, 400, bias=False)
    base.config.tie_word_embeddings = False
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["attn.c_proj", "mlp.c_proj", "lm_head"])
    )
    wanted = products_of(random_lora(model), "default")
    folder, under = save(model, tmp_path / "adapter"), save(base, tmp_path / "base")
    assert not json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]
    for given, on in ((model, base), (model, under), (folder, base), (folder, under)):
        assert same_changes(added(merge(models=[given], base=on), base), wanted)
    config = json.loads((under / "config.json").read_text())
    (under / "config.json").write_text(json.dumps({**config, "architectures": ["Of another library"]}))
    with pytest.raises(NotApplicable, match=r"attn\.c_proj\.weight.* is square"):
        merge(models=[folder], base=under)


def test_a_square_matrix_on_a_state_that_may_be_transposed_is_refused(tiny_lm, tmp_path):
    base = tiny_lm("gpt2", layers=1)
    options = {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    folder = save(adapter(base, 3, **options), tmp_path / "adapter")
    with pytest.raises(NotApplicable, match="is square"):
        merge(models=[folder], base=base.state_dict())
    llama = tiny_lm("llama", layers=1)
    folder = save(adapter(llama, 3, target_modules=["q_proj"]), tmp_path / "plain")
    assert same_changes(
        added(merge(models=[folder], base=llama.state_dict()), llama),
        added(merge(models=[folder], base=llama), llama),
    )


def test_an_embedding_that_leaves_its_tied_head_is_refused(tiny_lm, tmp_path):
    base = tiny_lm("llama", layers=1)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = adapter(base, 3, **options)
    for given in (model, save(model, tmp_path / "adapter")):
        with pytest.raises(NotApplicable, match=r"embed_tokens\.weight.* the head tied to it is not"):
            merge(models=[given], base=base)
    model = adapter(base, 3, ensure_weight_tying=True, **options)
    found, ids = merge(models=[model], base=base), torch.arange(1, 9)[None]
    tied = copy.deepcopy(base)
    tied.load_state_dict(found, strict=False)
    assert torch.allclose(tied(ids).logits, model(ids).logits, atol=1e-4)


def test_two_adapters_merge_at_product_level(tiny_lm, tmp_path):
    """The sum of products, not the product of sums."""
    base = tiny_lm("llama", layers=1)
    models = [adapter(base, seed) for seed in (1, 2)]
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    found = merge(base=base, models=folders, method="task_arithmetic", scaling=0.5)
    name = "model.layers.0.self_attn.q_proj.weight"
    layers = [m.base_model.model.model.layers[0].self_attn.q_proj for m in models]
    products = [1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
    assert torch.allclose(found[name], base.state_dict()[name] + 0.5 * sum(products), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"use_dora": True}, NotApplicable, "DoRA"),
        ({"peft_type": "IA3"}, NotApplicable, "is not a LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, NotApplicable, "changed the base"),
        ({"init_lora_weights": "lora_ga"}, NotApplicable, "changed the base"),
        ({"kasa_config": {"a": 1}}, NotApplicable, "changed the base"),
        ({"lora_bias": True}, NotApplicable, "biases of its own"),
        ({"layer_replication": [[0, 1]]}, NotApplicable, "repeats layers"),
    ],
)
def test_adapters_that_are_no_products_are_refused(tiny_lm, tmp_path, change, error, says):
    base = tiny_lm("llama", layers=1)
    folder = save(adapter(base, 3), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=says):
        merge(base=base, models=[folder], method="task_arithmetic")


def test_an_adapter_of_another_base_is_refused(tiny_lm, tmp_path):
    folder = save(adapter(tiny_lm("llama", layers=2), 3), tmp_path / "adapter")
    with pytest.raises(IncompatibleModels, match=r"layers\.1\."):
        merge(base=tiny_lm("llama", layers=1), models=[folder], method="task_arithmetic")
    with pytest.raises(IncompatibleModels, match=r"down_proj\.weight.* is \(32, 96\) in the adapter"):
        merge(base=tiny_lm("llama", layers=2, hidden=48), models=[folder], method="task_arithmetic")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "1.mlp.down_proj.lora_B" not in k},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(CorruptFile, match="lora_B"):
        merge(base=tiny_lm("llama", layers=2), models=[folder], method="task_arithmetic")
    with pytest.raises(BadInput, match="pass base="):
        merge(models=[adapter(tiny_lm("llama", layers=1), 3)])


# --- vocabularies, tied and integer tensors ----------------------------------------------------------------


@pytest.fixture
def grown(tiny_lm, tiny_tokenizer, tmp_path):
    """A base of 400 tokens, and fine-tunes of 403 and of 390."""
    base = tiny_lm("llama", layers=1)
    more, fewer = moved(base, 1), moved(base, 2)
    more.resize_token_embeddings(403, mean_resizing=False)
    fewer.resize_token_embeddings(390, mean_resizing=False)
    models = {"base": base, "more": more, "fewer": fewer}
    return models, {name: save(m, tmp_path / name, tiny_tokenizer) for name, m in models.items()}


def test_other_vocabularies_are_refused_by_name(grown):
    _, folders = grown
    with pytest.raises(
        IncompatibleModels, match=r'(embed_tokens|lm_head)\.weight.*403 tokens.*vocabulary="base"'
    ):
        merge(base=folders["base"], models=[folders["more"]], method="ties")


def test_the_tokens_of_the_base_can_be_kept(grown, tmp_path):
    models, folders = grown
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    out = merge(
        base=folders["base"], models=[folders["more"], folders["fewer"]], method="task_arithmetic", scaling=0.5,
        vocabulary="base", output=tmp_path / "out",
    )  # fmt: skip
    found, base = Checkpoint(out), models["base"].state_dict()
    for name in names:
        more = models["more"].state_dict()[name][:400]
        fewer = torch.cat([models["fewer"].state_dict()[name], base[name][390:]])
        wanted = base[name] + 0.5 * (more - base[name]) + 0.5 * (fewer - base[name])
        assert torch.allclose(found.tensor(name), wanted, atol=1e-6)
    assert transfuse.load(out).model.config.vocab_size == 400
    plan = merge(
        base=folders["base"], models=[folders["more"]], method="ties", vocabulary="base", dry_run=True
    )
    assert plan.fitted["lm_head.weight"] == [403] and "403" in str(plan)


def test_tokens_with_other_numbers_are_refused(grown, tmp_path):
    _, folders = grown
    file = folders["more"] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[50:52]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(IncompatibleModels, match="is token"):
        merge(base=folders["base"], models=[folders["more"]], method="ties", vocabulary="base")


def test_tied_embeddings_are_one_tensor(tiny_lm, tmp_path):
    """Stored once or twice, in memory or on disk, a tied head is merged once and stays tied."""
    base = tiny_lm("gemma3", layers=1)
    models = [moved(base, seed) for seed in (1, 2)]
    assert base.config.tie_word_embeddings
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((base, *models))]
    twice = load_file(folders[1] / "model.safetensors")
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
    save_file(twice, folders[1] / "model.safetensors", metadata={"format": "pt"})
    found = merge(base=folders[0], models=folders[1:], method="task_arithmetic")
    assert "lm_head.weight" not in found
    wanted = merge(base=base, models=models, method="task_arithmetic")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_integer_buffers_are_taken_over(tmp_path):
    states = [{"w": torch.full((3, 2), float(i)), "position_ids": torch.arange(4) + i} for i in range(3)]
    found = merge(
        base=states[0], models=states[1:], method="task_arithmetic", scaling=1.0, output=tmp_path / "out"
    )
    tensors = Checkpoint(found)
    assert torch.equal(tensors.tensor("position_ids"), torch.arange(4))
    assert torch.equal(tensors.tensor("w"), torch.full((3, 2), 3.0))


def test_excluded_tensors_stay_as_they_are(tiny_lm):
    base = tiny_lm("llama", layers=1)
    model = moved(base, 1)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(7, 32))  # another head does not matter then
    found = merge(base=base, models=[model], method="task_arithmetic", exclude=["lm_head", r"norm\.weight$"])
    own = base.state_dict()
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, own[name])}
    assert changed == {n for n in own if "lm_head" not in n and not n.endswith("norm.weight")}
    with pytest.raises(BadInput, match="regular expression"):
        merge(base=base, models=[model], method="task_arithmetic", exclude=["("])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_in_and_out(tiny_lm, tmp_path, dtype):
    base = tiny_lm("llama", layers=1)
    models = [moved(base, 1).to(torch.bfloat16), moved(base, 2).to(torch.float16)]
    out = merge(base=base, models=models, method="linear", dtype=dtype, output=tmp_path / "out")
    found = Checkpoint(out)
    name = "model.norm.weight"
    assert {info.dtype for info in found.infos.values()} == {getattr(torch, dtype)}
    wanted = sum(m.state_dict()[name].double() for m in models) / 2
    assert torch.equal(found.tensor(name), wanted.float().to(getattr(torch, dtype)))
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


# --- refusals ----------------------------------------------------------------------------------------------


def test_other_architectures_name_the_tensor(tiny_lm):
    base = tiny_lm("llama", layers=2)
    with pytest.raises(IncompatibleModels, match=r"models\[1\].*model\.layers\.1\."):
        merge(base=base, models=[base, tiny_lm("llama", layers=1)], method="ties")
    with pytest.raises(IncompatibleModels, match=r"models\[0\].*model\.layers\.2\."):
        merge(base=base, models=[tiny_lm("llama", layers=3)], method="ties")
    with pytest.raises(IncompatibleModels, match=r"is \[400, 48\] in"):
        merge(base=base, models=[tiny_lm("llama", layers=2, hidden=48)], method="ties")
    with pytest.raises(IncompatibleModels):
        merge(base=base, models=[tiny_lm("gpt2", layers=2)], method="ties")


def test_bad_input_is_refused_before_anything_is_written(tiny_lm, tmp_path):
    base = tiny_lm("llama", layers=1)
    place = tmp_path / "out"
    for named, options in {
        "base = None": {"method": "ties"},
        "not a list": {"models": "smollm2-135m"},
        "no model": {"models": [3]},
        "is no tensor": {"models": [{"a": 1}]},
        "dtype": {"dtype": "int8"},
        "vocabulary": {"vocabulary": "union"},
        "shard_bytes": {"shard_bytes": 0},
        "shard_bytes = '5GB' is not a count": {"shard_bytes": "5GB"},
        "exclude = 'classifier' is not a list": {"exclude": "classifier"},
        "exclude = None is not a list": {"exclude": None},
        "exclude = 3 is not text": {"exclude": ["norm", 3]},
        "weights = 'ab' is text": {"method": Linear(weights="ab")},
        r"weights\[0\] = nan is not a finite": {"weights": [math.nan]},
        r"t = nan is not a finite": {"method": "slerp", "t": math.nan},
        "neither a folder": {"models": ["no such model"]},
    }.items():
        with pytest.raises(BadInput, match=named):
            merge(**{"models": [base], "output": place, **options})
    assert list(tmp_path.iterdir()) == []
    place.mkdir()
    (place / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        merge(models=[base], output=place)
    assert [p.name for p in place.iterdir()] == ["mine.txt"]


def test_quantised_and_odd_dtypes_are_refused(tiny_lm, tmp_path):
    folder = save(tiny_lm("llama", layers=1), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(NotApplicable, match="quantised"):
        merge(models=[folder])
    small = {"w": torch.ones(2).to(torch.float8_e4m3fn)}
    with pytest.raises(BadInput, match="float8_e4m3fn"):
        merge(models=[small])
    with pytest.raises(BadInput, match=r"w = 'torch\.complex64' is a dtype that is not merged"):
        merge(models=[{"w": torch.ones(2, dtype=torch.complex64)}])
    odd = {"w": torch.ones(2), "i": torch.ones(2, dtype=torch.uint16)}
    assert torch.equal(merge(models=[odd])["i"], odd["i"])
    with pytest.raises(BadInput, match=r"i = 'torch\.uint16' is a dtype that is not written"):
        merge(models=[odd], output=tmp_path / "odd")
    with pytest.raises(BadInput, match=r"w: torch\.int64"):
        merge(models=[{"w": torch.ones(2)}, {"w": torch.ones(2).long()}])


@pytest.mark.parametrize("exclude", [(), ["w"]], ids=["merged", "kept"])
def test_numbers_too_large_for_float16_are_refused(tmp_path, exclude):
    large = {"w": torch.tensor([6e4, 1.0])}
    base = {"w": torch.zeros(2, dtype=torch.float16)}
    given = {"base": base, "models": [{"w": large["w"].half()}], "method": "task_arithmetic", "scaling": 2.0}
    if exclude:
        given = {"models": [{"w": 2 * large["w"]}], "dtype": "float16", "exclude": exclude}
    with pytest.raises(BadInput, match=r"w = 1200\d\d\.0 is too large for float16; pass dtype=\"bfloat16\""):
        merge(**given, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert merge(**{**given, "dtype": "bfloat16"})["w"].isfinite().all()
    infinite = {"w": torch.tensor([math.inf, 1.0])}
    assert merge(models=[infinite], dtype="float16")["w"].tolist() == [math.inf, 1.0]


@pytest.mark.parametrize(
    "method",
    ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"],
)
def test_float64_models_are_merged_in_float64(method):
    """With changes of 1e-9 at 1, nothing would be left of them in float32."""
    random = generator(0)
    base, *models = (
        {"w": 1 + 1e-9 * torch.randn(40, generator=random, dtype=torch.float64)} for _ in range(3)
    )
    options = {} if method in ("linear", "slerp") else {"base": base, "scaling": 1.0}
    density = {} if method in ("linear", "slerp", "task_arithmetic") else {"density": 1.0}
    found = merge(models=models, method=method, **options, **density)["w"]
    one, two = ((model["w"] - base["w"]) for model in models)
    agree = torch.where(one * two > 0, (one + two) / 2, torch.where(one.abs() > two.abs(), one, two))
    wanted = {"linear": (one + two) / 2, "slerp": (one + two) / 2, "ties": agree, "dare_ties": agree}
    assert found.dtype == torch.float64
    assert torch.allclose(found - base["w"], wanted.get(method, one + two), rtol=1e-5, atol=1e-15)


def test_an_error_on_the_way_leaves_nothing(tiny_lm, tmp_path, monkeypatch):
    base = tiny_lm("llama", layers=1)
    broken = moved(base, 1)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        merge(base=base, models=[broken], method="ties", output=tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("U", (), {"free": 10})())
    with pytest.raises(Unavailable, match="are free"):
        merge(models=[base], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_models(tmp_path):
    """Three checkpoints of 96 MB each merge in less memory than they have."""
    tensors = {f"layers.{i}.weight": (3000, 1000) for i in range(16)}
    for number in range(3):
        state = {k: torch.full(shape, number, dtype=torch.bfloat16) for k, shape in tensors.items()}
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    code = (
        "import resource, sys, torch\nfrom transfuse.merge import merge\n"
        "merge(models=[{'w': torch.ones(2, 2)}] * 2)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"places = [{str(tmp_path)!r} + '/' + str(i) for i in range(3)]\n"
        f"merge(models=places, output={str(tmp_path / 'out')!r})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Each of three maps may keep 32 MB before they are given back; the models are 288 MB.
    assert int(done.stdout) * 1024 < 150e6
