"""core.models, core.references: what loads, what is refused, and that a failed download leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from transfuse.core import models
from transfuse.core import wheels as fetching
from transfuse.core.errors import BadInput, CorruptFile, Unavailable
from transfuse.core.files import sha256_file
from transfuse.core.models import check_spec, fingerprint, load, load_tokenizer, resolve
from transfuse.core.references import REFERENCES, Reference, Wheel, cache_dir, cached_folder

FORK = multiprocessing.get_context("fork")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whatever the environment says, nothing here asks the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def below(folder):
    """Files and folders under `folder`, locks left out."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.name.endswith(".lock"))


# --- the reference model -----------------------------------------------------------------------------------


def test_reference_model_loads_in_under_three_seconds(smollm_path):
    seconds = []
    for _ in range(3):  # the fixture made it; processor time, and the best of three: machines are shared
        start = time.process_time()
        model, tokenizer = load("smollm2-135m")
        seconds.append(time.process_time() - start)
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3  # converting takes about 20
    assert not model.training and sum(p.numel() for p in model.parameters()) == 134515008
    assert model.dtype == (torch.bfloat16 if models._half_precision() else torch.float32)
    assert tokenizer.pad_token_id is not None
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]) == " Paris"


def test_reference_folder_is_bf16_safetensors(smollm_path):
    assert (
        smollm_path == cached_folder("smollm2-135m") == resolve("SmolLM2-135M") == check_spec("smollm2-135m")
    )
    assert {p.suffix for p in smollm_path.iterdir()} <= {".json", ".jinja", ".safetensors"}
    with safe_open(str(smollm_path / "model.safetensors"), framework="pt") as stream:
        dtypes = {stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}
    config = json.loads((smollm_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config


def test_reference_tokenizer_and_chat_template(smollm_path):
    tokenizer = load_tokenizer(smollm_path)
    text = "Ines Varro wrote: 東京, 1687.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    ends = tokenizer("<|im_start|>a<|im_end|>")["input_ids"]
    assert len(ends) == 3 and ends[2] == tokenizer.eos_token_id


def test_reference_model_can_be_saved_again(smollm_path, tmp_path):
    model, tokenizer = load(smollm_path, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before, after = load_file(smollm_path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_table_of_references():
    assert list(REFERENCES) == [each.name for each in REFERENCES.values()]
    for each in REFERENCES.values():
        assert each.task in models._CLASSES and each.kind in ("gguf", "folder")
        assert each.licence and each.origin and each.parameters > 0 and models._is_hub_id(each.hub)
        for checksum in (each.payload_sha256, *(wheel.sha256 for wheel in each.wheels)):
            assert re.fullmatch("[0-9a-f]{64}", checksum)
        assert each.download_bytes == sum(wheel.bytes for wheel in each.wheels) < 300e6
        assert cached_folder(each.name).name == f"{each.name}-{each.payload_sha256[:12]}"


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TRANSFUSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "transfuse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "transfuse"
    monkeypatch.setenv("TRANSFUSE_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    assert cached_folder("minilm").parent == tmp_path / "mine" / "models"


# --- folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_lm, tiny_tokenizer, tmp_path):
    """A model folder as `save_pretrained` leaves it, in float32."""
    path = tmp_path / "model"
    tiny_lm("llama", layers=2).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def test_folder_loads(folder, tiny_lm, tiny_tokenizer, monkeypatch):
    wanted = tiny_lm("llama", layers=2).state_dict()
    monkeypatch.setenv("HOME", str(folder.parent))
    for spec in (folder, str(folder), "~/model"):
        model, tokenizer = load(spec)
        assert not model.training and model.dtype == torch.float32
        assert all(torch.equal(wanted[name], value) for name, value in model.state_dict().items())
        assert tokenizer("Ines Varro")["input_ids"] == tiny_tokenizer("Ines Varro")["input_ids"]
    assert resolve(folder) == check_spec(folder) == folder


def test_folder_in_shards_loads(folder, tiny_lm):
    model = tiny_lm("llama", layers=2)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    found = load(folder).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    shards[0].unlink()
    for function in (load, check_spec):
        with pytest.raises(CorruptFile, match=rf"model' lacks {shards[0].name}; copy or download it again"):
            function(folder)


def test_an_index_cannot_reach_out_of_the_folder(folder, tiny_lm, tmp_path):
    (folder / "model.safetensors").unlink()
    tiny_lm("llama", layers=2).save_pretrained(folder, max_shard_size="50KB")
    index, (first, *_) = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    settings = json.loads(index.read_text())
    first.rename(tmp_path / first.name)
    for other in (f"../{first.name}", str(tmp_path / first.name)):
        names = {k: other if v == first.name else v for k, v in settings["weight_map"].items()}
        index.write_text(json.dumps({**settings, "weight_map": names}))
        with pytest.raises(CorruptFile, match=f"lacks {re.escape(other)}"):
            load(folder)


def test_task_and_config_overrides(folder):
    model, _ = load(folder, task="sequence-classification", num_labels=3)
    assert model.config.num_labels == 3 and type(model).__name__ == "LlamaForSequenceClassification"
    assert type(load(folder, task="encoder").model).__name__ == "LlamaModel"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto"])
def test_devices(folder, device):
    model, tokenizer = load(folder, device=device)
    ids = tokenizer("The capital", return_tensors="pt").to(model.device)
    assert model(**ids).logits.isfinite().all()
    assert device == "auto" or {p.device for p in model.parameters()} == {torch.device("cpu")}


def test_padding_token_falls_back_to_the_end_of_text(folder, tiny_tokenizer):
    assert load_tokenizer(folder).pad_token == "<pad>"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(folder).tokenizer.pad_token == "</s>"


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
def test_auto_widens_half_precision_where_it_is_slow(folder, tiny_lm, monkeypatch, stored, half):
    saved = tiny_lm("llama", layers=2).to(getattr(torch, stored))
    saved.save_pretrained(folder)
    monkeypatch.setattr(models, "_half_precision", lambda: half)
    narrow = stored in ("bfloat16", "float16")
    model = load(folder).model
    wanted = torch.float32 if narrow and not half else getattr(torch, stored)
    assert {p.dtype for p in model.parameters()} == {wanted}
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(wanted))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_dtype_asked_for_is_given(folder, monkeypatch, name):
    monkeypatch.setattr(models, "_half_precision", lambda: False)
    for dtype in (name, getattr(torch, name)):
        assert load(folder, dtype=dtype).model.dtype == getattr(torch, name)


def test_half_precision_is_a_question_with_an_answer():
    assert models._half_precision() in (True, False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "translation"}, "task = 'translation' is unknown; use one of causal-lm, sequence-classif"),
        ({"dtype": "int8"}, 'dtype = \'int8\' is unknown; use "auto", "float32", "bfloat16" or "float16"'),
        ({"dtype": None}, "dtype = None is unknown"),
        ({"device": "tpu"}, 'device = \'tpu\' is unknown; use "cpu", "cuda", "cuda:1" or "auto"'),
        ({"device": "cuda:x"}, "device = 'cuda:x' is unknown"),
        ({"device": "cuda"}, "device = 'cuda' is not available; use device=\"cpu\""),
        ({"device": torch.device("cuda", 3)}, "device = 'cuda:3' is not available"),
        ({"device": "mps"}, "device = 'mps' is not available"),
    ],
)
def test_options_are_checked_before_anything_is_fetched(monkeypatch, tmp_path, options, says):
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for function in (load, check_spec):
        if function is check_spec and "task" in options:
            continue
        with pytest.raises(BadInput, match=f"^{re.escape(says)}"):
            function("smollm2-135m", **options)
    assert not (tmp_path / "cache").exists()


def test_a_gpu_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_spec(folder, device="cuda:1") == check_spec(folder, device="cuda") == folder
    with pytest.raises(BadInput, match="device = 'cuda:2' is not available"):
        check_spec(folder, device="cuda:2")


@pytest.mark.parametrize("name", ["revision", "subfolder", "cache_dir", "token"])
def test_options_that_choose_other_files_are_refused(folder, name):
    with pytest.raises(BadInput, match=f"^{name} = 'x' chooses files elsewhere; fetch it .* give the folder"):
        load(folder, **{name: "x"})


@pytest.mark.parametrize("spec", [None, 3, "", torch.nn.Linear(1, 1)])
def test_what_names_no_model(spec):
    for function in (load, resolve):
        with pytest.raises(BadInput, match=r"^model = .* names no model; give a folder, a hub id or"):
            function(spec)


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_in_a_folder_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch, answer, capfd):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\n"
    (folder / "code.py").write_text(code)
    changed(
        folder, model_type="unheard-of", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or answer.strip())
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(folder)
    assert not asked and not mark.exists()


@pytest.mark.parametrize(
    "spec", ["~nobody-at-all/m", "smollm3", "a/b/c", "nobody/", "/no/such/folder", "./nothing", "gpt 2"]
)
def test_unknown_names_list_the_reference_models(spec):
    says = (
        "is neither a folder, a hub id nor a reference model; reference models are smollm2-135m, gemma3-270m"
    )
    for function in (load, load_tokenizer, resolve, check_spec, fingerprint):
        with pytest.raises(BadInput, match=rf"^model = '{re.escape(spec)}' {says}"):
            function(spec)


def test_files_instead_of_folders(folder, tmp_path):
    with pytest.raises(BadInput, match=r"is a file; give the folder that holds config\.json and") as caught:
        load(folder / "model.safetensors")
    assert not isinstance(caught.value, CorruptFile)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(
        CorruptFile, match=r"model\.pt' is not a model folder \(pickle files are never opened\)"
    ):
        load(tmp_path / "model.pt")


def test_folders_without_config_or_weights(folder, tmp_path):
    (folder / "config.json").rename(tmp_path / "config.json")
    for function in (load, resolve, load_tokenizer, fingerprint):
        with pytest.raises(BadInput, match=r"model' has no config\.json; give a transformers model folder"):
            function(folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model' has no \.safetensors weights; save the model with save_pret"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "last.ckpt"])
def test_pickles_are_never_opened(folder, tmp_path, name):
    mark = tmp_path / "mark"

    class Trap:
        def __reduce__(self):
            return Path.touch, (mark,)

    trap = pickle.dumps({"lm_head.weight": Trap()}, protocol=2)
    pickle.loads(trap)
    assert mark.exists()  # the trap works
    mark.unlink()
    (folder / name).write_bytes(trap)
    load(folder)  # beside safetensors it is ignored
    (folder / "model.safetensors").unlink()
    for function in (load, resolve, load_tokenizer, check_spec, fingerprint):
        with pytest.raises(
            CorruptFile, match=rf"has only pickle weights \({re.escape(name)}\), which are never"
        ):
            function(folder)
    with pytest.raises(CorruptFile, match="never opened"):
        load(folder / name)
    save_file({"unrelated": torch.zeros(1)}, folder / "adapter.safetensors")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(folder)
    assert not mark.exists()


def test_truncated_weights_are_named(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 5, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        for function in (load, check_spec):
            with pytest.raises(
                CorruptFile, match=r"model\.safetensors' is not readable .*; copy or download"
            ):
                function(folder)
    path.write_bytes(data)
    load(folder)


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text('{"model_type'),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "tokenizer.json").write_text('{"a'),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        lambda folder: changed(folder, model_type="unheard-of"),
        lambda folder: changed(folder, model_type="vit"),
        lambda folder: changed(folder, intermediate_size=64),
        lambda folder: changed(folder, hidden_size="wide"),
    ],
    ids=[
        "half config",
        "list",
        "half tokenizer",
        "empty tokenizer",
        "no tokenizer",
        "type",
        "task",
        "shape",
        "kind",
    ],
)
def test_damaged_folders_are_named(folder, damage):
    damage(folder)
    with pytest.raises(
        BadInput, match=r"^model = '.*model' cannot be loaded \(.+\); check the folder's files$"
    ):
        load(folder)


def test_missing_weights_are_never_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFile, match=f"lacks 1 weights \\({re.escape(gone)}\\)"):
        load(folder)
    for task in ("sequence-classification", "encoder"):
        with pytest.raises(CorruptFile, match=r"lacks 1 weights \(.*mlp\.down_proj\.weight\)"):
            load(folder, task=task)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load(folder, task="sequence-classification")  # but a head may be new


def test_weights_that_are_left_out_are_told(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(folder)
        load(folder, task="encoder")  # has no place for the head, as one expects
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"holds 1 weights \(model\.layers\.0\.self_attn\.q_proj\.bias\) that Llama"
    ):
        load(folder)


def test_adapters_are_told_from_models(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(load(folder).model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    with pytest.raises(
        BadInput, match=r"is an adapter, not a whole model; load its base model, then peft\.Peft"
    ):
        load(tmp_path / "a")


def test_pickles_in_the_parts_of_an_encoder_are_not_opened(tmp_path, monkeypatch):
    sentence = pytest.importorskip("sentence_transformers")
    folder = tmp_path / "encoder"
    shutil.copytree(resolve("minilm"), folder)
    modules = sentence.SentenceTransformer(str(folder))
    modules.append(sentence.models.Dense(384, 8))
    modules.save(str(folder))
    (part,) = folder.glob("*_Dense")
    assert models.load_encoder(folder).encode(["a"]).shape == (1, 8)
    torch.save(load_file(part / "model.safetensors"), part / "pytorch_model.bin")
    (part / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened a pickle file"))
    with pytest.raises(CorruptFile, match="_Dense' has only pickle weights"):
        models.load_encoder(folder)


def test_running_out_of_memory_is_not_blamed_on_the_folder(folder, monkeypatch):
    for error in (torch.OutOfMemoryError("x"), MemoryError("x"), KeyboardInterrupt()):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(type(error)) as caught:
            load(folder)
        assert caught.value is error


def test_the_terminal_stays_quiet(folder, capfd):
    from transformers.utils import logging

    for verbosity in (logging.INFO, logging.WARNING):
        logging.set_verbosity(verbosity)
        try:
            capfd.readouterr()
            load(folder)
            assert capfd.readouterr() == ("", "")
            assert logging.get_verbosity() == verbosity and logging.is_progress_bar_enabled()
        finally:
            logging.set_verbosity_warning()


# --- fingerprint -------------------------------------------------------------------------------------------


def test_fingerprint_of_a_folder(folder, tmp_path):
    wanted = fingerprint(folder)
    assert re.fullmatch("[0-9a-f]{64}", wanted) and wanted == fingerprint(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another")
    assert fingerprint(tmp_path / "copy") == wanted
    changed(tmp_path / "copy", rope_theta=5.0)
    assert fingerprint(tmp_path / "copy") != wanted
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fingerprint(folder) != wanted


def test_fingerprint_of_a_model(tiny_lm):
    wanted = fingerprint(tiny_lm("llama"))
    assert wanted == fingerprint(tiny_lm("llama")) == fingerprint(tiny_lm("llama").train())
    others = [
        tiny_lm("llama", seed=1),
        tiny_lm("qwen2"),
        tiny_lm("llama", layers=2),
        tiny_lm("llama").bfloat16(),
    ]
    one = tiny_lm("llama")
    with torch.no_grad():
        one.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-6
    assert len({wanted, *(fingerprint(model) for model in [*others, one])}) == 6
    assert fingerprint(tiny_lm("gpt2")) == fingerprint(tiny_lm("gpt2"))  # tied weights, number-like buffers


# --- hub ids -----------------------------------------------------------------------------------------------


def test_hub_id_offline():
    for function in (load, load_tokenizer, resolve, check_spec):
        with pytest.raises(Unavailable) as caught:
            function("nobody/no-model")
        text = str(caught.value)
        assert text.startswith(
            "model = 'nobody/no-model' is not in the local cache and the hub did not answer ("
        )
        assert text.endswith(
            "check the name and the network, or use a reference model: " + ", ".join(REFERENCES)
        )
        assert "\n" not in text and len(text) < 500


def test_hub_id_in_the_cache(folder, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("someone/model") == folder
    ((name, patterns),) = asked
    assert name == "someone/model" and "*.safetensors" in patterns
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in patterns)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(CorruptFile, match="only pickle weights"):
        resolve("someone/model")


# --- reference models from small wheels --------------------------------------------------------------------


def write_wheel(folder, name, members):
    """An installable wheel with `members`, {path: bytes}."""
    path, info = (
        folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl",
        f"{name.replace('-', '_')}-1.0.dist-info",
    )
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def write_gguf(path, tokenizer):
    """A random llama of two layers with the tiny tokenizer and a chat template."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    for name, value in (
        ("context_length", 512), ("embedding_length", 32), ("block_count", 2), ("feed_forward_length", 64),
        ("head_count", 4), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("rope_dimension_count", 8),
        ("rope_freq_base", 10000.0), ("vocab_size", len(tokens)), ("tokenizer_model", "gpt2"),
        ("token_list", tokens), ("token_types", [3] * 3 + [1] * (len(tokens) - 3)),
        ("token_merges", [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]),
        ("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 0), ("chat_template", TEMPLATE),
    ):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        block = {
            "attn_norm": (32,),
            "ffn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
        }
        block |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


@pytest.fixture
def shop(tmp_path, monkeypatch, tiny_lm, tiny_tokenizer):
    """An empty cache, two small reference models ("tiny-gguf" in two parts, "tiny-folder"), and pip replaced.

    `shop.pip` is what stands for `subprocess.run`; `shop.asked` counts the wheels it was asked for.
    """
    wheels, scratch = tmp_path / "wheels", tmp_path / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    arrays = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)
    data = (tmp_path / "tiny.gguf").read_bytes()
    cut = len(data) // 3
    made = tmp_path / "made"
    tiny_lm("llama", layers=2).save_pretrained(made)
    tiny_tokenizer.save_pretrained(made)
    members = {f"tiny_folder/model/{p.name}": p.read_bytes() for p in made.iterdir()}
    contents = {
        "tiny-part1": {"tiny_part1/data/x.part00": data[:cut]},
        "tiny-part2": {"tiny_part2/data/x.part01": data[cut:]},
        "tiny-folder": {
            **members,
            "tiny_folder/__init__.py": b"",
            "tiny_folder/model/1_Pooling/config.json": b"{}",
        },
    }
    pins = {}
    for name, files in contents.items():
        file = write_wheel(wheels, name, files)
        pins[name] = Wheel(name, "1.0", sha256_file(file), file.stat().st_size, next(iter(files)))
    pins["tiny-folder"] = replace(pins["tiny-folder"], member="tiny_folder/model/")
    common = {"hub": "nobody/tiny", "parameters": 1, "licence": "none", "origin": "this test"}
    for reference in (
        Reference("tiny-gguf", "causal-lm", "gguf", (pins["tiny-part1"], pins["tiny-part2"]),
                  hashlib.sha256(data).hexdigest(), **common),
        Reference("tiny-folder", "causal-lm", "folder", (pins["tiny-folder"],),
                  sha256_file(made / "model.safetensors"), **common),
    ):  # fmt: skip
        monkeypatch.setitem(REFERENCES, reference.name, reference)
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    state = SimpleNamespace(
        wheels=wheels,
        cache=tmp_path / "cache",
        scratch=scratch,
        asked=[],
        arrays=arrays,
        gguf=data,
        made=made,
    )

    def pip(command, **_):
        name, version = command[-1].split("==")
        state.asked.append(name)
        file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        shutil.copy(wheels / file, Path(command[command.index("--dest") + 1]) / file)
        return SimpleNamespace(returncode=0, stderr="", stdout="")

    state.pip = pip
    monkeypatch.setattr(fetching, "subprocess", SimpleNamespace(run=lambda *a, **k: state.pip(*a, **k)))
    return state


BOTH = pytest.mark.parametrize("name", ["tiny-gguf", "tiny-folder"])


def nothing_left(shop):
    return below(shop.cache) in ([], ["models"]) and below(shop.scratch) == []


def test_gguf_parts_are_joined_and_converted(shop, tiny_tokenizer):
    model, tokenizer = load("tiny-gguf", dtype="bfloat16")
    assert shop.asked == ["tiny-part1", "tiny-part2"]
    folder = cached_folder("tiny-gguf")
    assert below(shop.cache / "models") == sorted(
        [folder.name, *(f"{folder.name}/{name}" for name in below(folder))]
    )
    assert below(shop.scratch) == [] and {p.suffix for p in folder.iterdir()} <= {
        ".json",
        ".jinja",
        ".safetensors",
    }
    found = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down"),
        ("model.layers.0.self_attn.o_proj", "blk.0.attn_output"),
    ):
        assert torch.equal(found[f"{ours}.weight"], torch.from_numpy(shop.arrays[theirs]).bfloat16())
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert str(shop.scratch) not in "".join(p.read_text() for p in folder.glob("*.json"))
    text = "Who built the bridge? Ünal, in 1687."
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert chat == "<s>user: Who?</s>"
    assert load("tiny-gguf").tokenizer.pad_token == "<pad>" and len(shop.asked) == 2  # once
    model.save_pretrained(shop.scratch / "again")
    assert load_file(shop.scratch / "again" / "model.safetensors").keys() == found.keys()


def test_folder_wheels_are_unpacked(shop):
    folder = resolve("Tiny-Folder")
    assert below(folder) == sorted(["1_Pooling", "1_Pooling/config.json", *below(shop.made)])
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in shop.made.iterdir())
    load("tiny-folder")
    assert shop.asked == ["tiny-folder"] and below(shop.scratch) == []


def test_pip_does_the_downloading(shop, monkeypatch):
    """The real pip, with the user's settings: a folder of wheels, then no index that answers."""
    import subprocess

    monkeypatch.setattr(fetching, "subprocess", subprocess)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # discard port: refused
    says = "^tiny-folder==1.0 could not be downloaded (ERROR: No matching distribution found for tiny-folder==1.0)"
    with pytest.raises(Unavailable, match=re.escape(says[1:])) as caught:
        load("tiny-folder")
    assert str(caught.value).endswith("that pip works in this environment, or give a local folder")
    assert nothing_left(shop)
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert load("tiny-folder").model.dtype == torch.float32


@BOTH
def test_failed_downloads(shop, name):
    good = shop.pip
    shop.pip = lambda *_, **__: SimpleNamespace(
        returncode=1, stderr="note\nERROR: a\nERROR: no route\nx", stdout=""
    )
    with pytest.raises(
        Unavailable, match=r"==1\.0 could not be downloaded \(ERROR: no route\); check the network"
    ):
        load(name)
    assert nothing_left(shop)
    shop.pip = lambda *_, **__: SimpleNamespace(returncode=-9, stderr="", stdout="")
    with pytest.raises(Unavailable, match=r"could not be downloaded \(pip failed\)"):
        resolve(name)
    assert nothing_left(shop)
    shop.pip = good
    load(name)


def test_second_part_missing(shop):
    (shop.wheels / "tiny_part2-1.0-py3-none-any.whl").rename(shop.wheels / "away")
    good = shop.pip

    def pip(command, **options):
        if "part2" in command[-1]:
            return SimpleNamespace(returncode=1, stderr="ERROR: gone", stdout="")
        return good(command, **options)

    shop.pip = pip
    with pytest.raises(Unavailable, match=r"^tiny-part2==1\.0 could not be downloaded \(ERROR: gone\)"):
        load("tiny-gguf")
    assert nothing_left(shop)
    (shop.wheels / "away").rename(shop.wheels / "tiny_part2-1.0-py3-none-any.whl")
    shop.pip = good
    load("tiny-gguf")


def test_the_hub_is_the_second_choice(shop, monkeypatch):
    shop.pip = lambda *_, **__: SimpleNamespace(returncode=1, stderr="", stdout="")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: {"nobody/tiny": shop.made}[name]
    )
    assert resolve("tiny-gguf") == shop.made
    assert nothing_left(shop)


@BOTH
def test_wheel_with_another_checksum(shop, name, monkeypatch):
    reference = REFERENCES[name]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    last = reference.wheels[-1]
    file = next(shop.wheels.glob(f"{last.name.replace('-', '_')}-*.whl"))
    good = file.read_bytes()
    for bad in (good + b"\0", good[:-1], b""):
        file.write_bytes(bad)
        digest = hashlib.sha256(bad).hexdigest()
        says = f"wheel = '{file.name}' has SHA-256 {digest[:16]}..., not {last.sha256[:16]}...; check your package"
        with pytest.raises(CorruptFile, match=f"^{re.escape(says)}"):
            load(name)
        assert nothing_left(shop)
    file.write_bytes(good)
    load(name)


@BOTH
def test_payload_with_another_checksum(shop, name, monkeypatch):
    good = REFERENCES[name]
    monkeypatch.setitem(REFERENCES, name, replace(good, payload_sha256="0" * 64))
    says = f"^model = '{name}' has SHA-256 {good.payload_sha256[:16]}..., not {'0' * 16}..."
    with pytest.raises(CorruptFile, match=says.replace(".", r"\.")):
        load(name)
    assert nothing_left(shop)
    monkeypatch.setitem(REFERENCES, name, good)
    load(name)


@pytest.mark.parametrize(
    ("error", "wanted", "says"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            Unavailable,
            "{}: the disk is full; free space or",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            Unavailable,
            "{}: the disk is full",
        ),
        (OSError(errno.EROFS, "Read-only"), BadInput, "path = '{}' cannot be written; choose a folder"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("half-way"), RuntimeError, "half-way"),
        (MemoryError(), MemoryError, None),
    ],
)
@BOTH
def test_conversion_that_breaks_off(shop, monkeypatch, name, error, wanted, says):
    """Some files are written, then the disk is full, or the user presses ctrl-c."""
    seen = []

    def broken(*arguments):
        made = arguments[-1]
        (made / "config.json").write_text("{}")
        (made / "model.safetensors").write_bytes(b"half")
        seen.append(made)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert" if name == "tiny-gguf" else "_unpack", broken)
        target = re.escape(str(cached_folder(name)))
        with pytest.raises(wanted, match=says and says.replace("{}", target)):
            load(name)
    assert len(seen) == 1 and not seen[0].exists()
    assert nothing_left(shop)
    load(name)
    assert cached_folder(name).is_dir()


@pytest.mark.parametrize(
    "step", ["save_pretrained of the model", "save_pretrained of the tokenizer", "scratch"]
)
def test_full_disk_inside_the_conversion(shop, monkeypatch, step):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "scratch":
            patch.setattr(shutil, "copyfileobj", full)
        else:
            kind = (
                transformers.PreTrainedModel
                if step.endswith("model")
                else transformers.PreTrainedTokenizerBase
            )
            patch.setattr(kind, "save_pretrained", full)
        with pytest.raises(Unavailable, match="the disk is full; free space or choose another folder"):
            load("tiny-gguf")
    assert nothing_left(shop)
    load("tiny-gguf")


def test_cache_that_is_no_folder(shop, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="cannot be written; choose a folder you can write to"):
        load("tiny-folder")
    assert shop.asked == []


def test_killed_half_way(shop):
    """SIGKILL leaves no folder under the final name, and the lock goes with the process."""

    def run():
        def die(reference, wheels, work, made):
            (made / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)

        models._convert = die
        resolve("tiny-gguf")

    child = FORK.Process(target=run)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert not cached_folder("tiny-gguf").exists()
    load("tiny-gguf")


def test_processes_asking_at_once_make_it_once(shop, tmp_path):
    log, gate, good = tmp_path / "log", FORK.Barrier(3), shop.pip

    def pip(command, **options):
        with open(log, "a") as stream:
            stream.write(f"{command[-1]}\n")
        time.sleep(0.2)  # long enough for the others to arrive
        return good(command, **options)

    shop.pip = pip

    def ask():
        gate.wait(20)
        folder = resolve("tiny-folder")
        sys.exit(0 if (folder / "model.safetensors").stat().st_size > 1000 else 3)

    children = [FORK.Process(target=ask) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert log.read_text().split() == ["tiny-folder==1.0"]
    assert below(shop.cache / "models")[0] == cached_folder("tiny-folder").name
    assert not [name for name in below(shop.cache) if name.endswith((".tmp", ".old"))]
