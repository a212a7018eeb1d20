"""Covariance of keys against explicit sums, its cache, and text by the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SENTENCES
from tokenizers import pre_tokenizers

from transfuse.core.errors import BadInput, CorruptFile
from transfuse.core.taps import capture, decoder_layers
from transfuse.edit import _statistics
from transfuse.edit._contexts import sample_ids, sample_prefixes
from transfuse.edit._layers import down_projection
from transfuse.edit._statistics import covariance


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def sums(model, tokenizer, texts, layer, *, limit=10**9, window=64):
    """E[k k^T], one window and one token at a time."""
    name, total, count = down_projection(model, layer), 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for i in range(0, len(ids), window):
            row = ids[i : i + window][: limit - count]
            if row:
                with torch.no_grad(), capture(model, name, inputs=True) as seen:
                    model(torch.tensor([row]))
                for key in seen[name][0].double():
                    total = total + torch.outer(key, key)
                    count += 1
    return total / count, count


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3"])
def test_equals_the_sum_over_tokens(tiny_lm, tiny_tokenizer, architecture, monkeypatch):
    model = tiny_lm(architecture)
    texts = [*SENTENCES, "word and " * 100]
    monkeypatch.setattr(_statistics, "_BATCH", 2)  # several batches of unequal rows
    found = covariance(model, tiny_tokenizer, [2, 0], text=texts, tokens=5000)
    assert list(found) == [2, 0]
    for layer, (matrix, count) in found.items():
        wanted, tokens = sums(model, tiny_tokenizer, texts, layer)
        assert count == tokens and matrix.dtype == torch.float32
        assert torch.allclose(matrix.double(), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_reads_as_many_tokens_as_asked(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama")
    whole = sum(len(tiny_tokenizer(t)["input_ids"]) for t in SENTENCES)
    for tokens, wanted in ((1, 1), (50, 50), (whole, whole), (10**6, whole)):
        matrix, count = covariance(model, tiny_tokenizer, [1], text=SENTENCES, tokens=tokens)[1]
        assert count == wanted
        assert torch.allclose(
            matrix.double(), sums(model, tiny_tokenizer, SENTENCES, 1, limit=tokens)[0], atol=1e-4
        )
    file = tmp_path / "text.txt"
    file.write_text(SENTENCES[0], encoding="utf-8")
    from_file = covariance(model, tiny_tokenizer, [1], text=str(file))[1]
    from_list = covariance(model, tiny_tokenizer, [1], text=SENTENCES[:1], cache=False)[1]
    assert torch.equal(from_file.matrix, from_list.matrix)


def test_one_pass_serves_all_layers_and_runs_nothing_above_them(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    calls = dict.fromkeys(decoder_layers(model), 0)
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: calls.__setitem__(n, calls[n] + 1))
        for n in calls
    ]
    covariance(model, tiny_tokenizer, [0, 1, 2], text=SENTENCES)
    for handle in handles:
        handle.remove()
    assert list(calls.values()) == [1, 1, 1, 0]


def test_the_cache_is_used_extended_and_mended(tiny_lm, tiny_tokenizer, cache, monkeypatch):
    model = tiny_lm("llama")
    asked = []
    measure = _statistics._measure

    def counted(model, sites, *rest):
        asked.append([site.index for site in sites])
        return measure(model, sites, *rest)

    monkeypatch.setattr(_statistics, "_measure", counted)

    def run(layers, **how):
        return covariance(model, tiny_tokenizer, layers, **{"text": SENTENCES, **how})

    first = run([0, 1])
    again = run([1, 2])
    assert asked == [[0, 1], [2]]
    assert torch.equal(first[1].matrix, again[1].matrix) and first[1].count == again[1].count
    run([1], tokens=40), run([1], text=SENTENCES[:2]), run([1], text="self", tokens=40)
    run([1], text="self", tokens=40, seed=1)
    assert asked[2:] == [[1]] * 4
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1  # another model
    other = run([1])
    assert asked[6:] == [[1]] and not torch.equal(other[1].matrix, first[1].matrix)
    files = sorted(cache.rglob("*.safetensors"))
    assert len(files) == 8 + 2 and not list(cache.rglob("*.tmp"))
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    mended = run([1])
    assert asked[7:] == [[1]] and torch.equal(mended[1].matrix, other[1].matrix)
    run([1], cache=False)
    assert asked[8:] == [[1]]


def test_another_tokenizer_is_another_text(tiny_lm, tiny_tokenizer):
    model, other = tiny_lm("llama"), copy.deepcopy(tiny_tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    covariance(model, tiny_tokenizer, [1], text=SENTENCES)
    kept = covariance(model, other, [1], text=SENTENCES)[1]
    assert torch.equal(kept.matrix, covariance(model, other, [1], text=SENTENCES, cache=False)[1].matrix)
    other.bos_token = "?"  # what the model's own text begins with
    covariance(model, tiny_tokenizer, [1], tokens=100)
    kept = covariance(model, other, [1], tokens=100)[1]
    assert torch.equal(kept.matrix, covariance(model, other, [1], tokens=100, cache=False)[1].matrix)


def test_text_by_the_model_itself_is_repeatable_and_leaves_no_trace(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama").train()
    random = torch.get_rng_state()
    one = covariance(model, tiny_tokenizer, [1], tokens=150, cache=False)[1]
    two = covariance(model, tiny_tokenizer, [1], tokens=150, cache=False)[1]
    other = covariance(model, tiny_tokenizer, [1], tokens=150, cache=False, seed=7)[1]
    assert one.count == two.count == 150
    assert torch.equal(one.matrix, two.matrix) and not torch.equal(one.matrix, other.matrix)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_sampled_rows_end_with_the_text(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    end = tiny_tokenizer.eos_token_id
    rows = sample_ids(model, tiny_tokenizer, [[1], [1, 5, 9]] * 20, new_tokens=30, seed=3)
    assert all(row[:1] == [1] and end not in row and len(row) <= 33 for row in rows)
    assert rows[1][:3] == [1, 5, 9] and len({tuple(row) for row in rows}) == 40
    greedy = sample_ids(model, tiny_tokenizer, [[1]] * 3, new_tokens=5, seed=3, top_k=1)
    assert greedy[0] == greedy[1] == greedy[2]
    sampled = torch.tensor(
        [
            row[1]
            for row in sample_ids(model, tiny_tokenizer, [[1]] * 4000, new_tokens=1, seed=0)
            if len(row) > 1
        ]
    )
    wanted = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(sampled, minlength=400) / 4000
    assert (seen - wanted)[torch.arange(400) != end].abs().max() < 0.04  # 5 standard errors of 1/2


def test_prefixes_are_the_models_own_words(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    prefixes = sample_prefixes(model, tiny_tokenizer, count=7, seed=2)
    assert len(prefixes) == 8 and prefixes[0] == ""
    assert [p.split()[0][:3] for p in prefixes[1:4]] == ["The", "The", "Bec"]
    assert all(p.endswith(". ") for p in prefixes[1:])
    assert prefixes == sample_prefixes(model, tiny_tokenizer, count=7, seed=2)
    assert sample_prefixes(model, tiny_tokenizer, count=0) == ("",)
    with pytest.raises(BadInput, match="prefixes = -1"):
        sample_prefixes(model, tiny_tokenizer, count=-1)


def test_half_precision_differs_by_rounding_only(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    wide = covariance(model, tiny_tokenizer, [1], text=SENTENCES)[1].matrix
    half = covariance(model.bfloat16(), tiny_tokenizer, [1], text=SENTENCES)[1].matrix
    assert half.dtype == torch.float32
    assert (half - wide).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [4]}, "layer = 4"),
        ({"text": "wikitext-2/valid"}, "no text file and no known data set"),
        ({"text": []}, "not a list of texts"),
        ({"text": ["fine", " "]}, "not a list of texts"),
        ({"text": 3}, "not a list of texts"),
        ({"tokens": 0}, "tokens = 0"),
        ({"module": "mlp.gate"}, "module = 'mlp.gate'"),
    ],
)
def test_wrong_arguments_are_named(tiny_lm, tiny_tokenizer, changes, message):
    with pytest.raises(BadInput, match=message):
        covariance(tiny_lm("llama"), tiny_tokenizer, **{"layers": [1], "text": SENTENCES, **changes})


def test_broken_text_and_broken_keys_are_named(tiny_lm, tiny_tokenizer, tmp_path, cache):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(CorruptFile, match="UTF-8"):
        covariance(tiny_lm("llama"), tiny_tokenizer, [1], text=str(file))
    model = tiny_lm("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BadInput, match="cannot be summed"):
        covariance(model, tiny_tokenizer, [1], text=SENTENCES)
    assert not list(cache.rglob("*.safetensors"))
