"""HiCroPL against loops in float64, on tiny CLIP and SigLIP models, through learning, saving and refusing."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from transfuse.adapt.hicropl import (
    CrossModalPromptLearner,
    HiCroPLConfig,
    KnowledgeMapper,
    LayerKnowledgeProxy,
    base_to_novel,
    hicropl,
    load,
    restore,
    save,
)
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.files import read_tensors, write_tensors
from transfuse.core.training import generator, seeded

CLASSES = ["cat", "old_dog", "bird"]
TEXTS = {"cat": ["it purrs", "it says meow."], "old_dog": ["it barks"], "bird": ["it sings", "it flies"]}
SIZES = {"n_ctx": 2, "depth": 3, "cross_layer": 1, "heads": 2}


@functools.cache
def tokenizer():
    """A token per character; start 1, end 30, the highest id."""
    letters = {token: i for i, token in enumerate(["<pad>", "<s>", *"abcdefghijklmnopqrstuvwxyz ."])}
    vocabulary = {**letters, "<unk>": 29, "</s>": 30}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 30)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def fresh(kind="clip", seed=0, **options):
    """A random dual encoder of unequal widths and depths."""
    text = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "vocab_size": 31, "max_position_embeddings": 24, "eos_token_id": 30, "bos_token_id": 1,
        "pad_token_id": 0, "projection_size": 12,
    }  # fmt: skip
    vision = {
        "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": 4, "patch_size": 2, "num_channels": 1,
    }  # fmt: skip
    text, vision = {**text, **options}, {"initializer_factor": 4.0, **vision}
    config, build = (CLIPConfig, CLIPModel) if kind == "clip" else (SiglipConfig, SiglipModel)
    with seeded(seed):
        model = build(
            config(text_config={"initializer_factor": 4.0, **text}, vision_config=vision, projection_dim=6)
        )
    return model.eval()


def images(rows=12, seed=0):
    return torch.randn(rows, 1, 4, 4, generator=generator(seed))


def make(base, **options):
    return hicropl(base, tokenizer(), CLASSES, **{"descriptions": TEXTS, **SIZES, **options})


@functools.cache
def made():
    """For what is refused and changes nothing."""
    return make(fresh())


def adapt(base, seed=0, **options):
    model = make(base, seed=seed, **options)
    labels = torch.arange(12) % 3
    model.learn(images(), labels, epochs=3, batch_size=4, seed=seed)
    return model


def answers(model, rows=None):
    with torch.no_grad():
        return model(images()[slice(None) if rows is None else rows]).logits


WRONG = {
    "n_ctx": lambda base: make(base, n_ctx=0),
    "depth": lambda base: make(base, depth=4),
    "cross_layer": lambda base: make(base, cross_layer=3),
    "distill_weight": lambda base: make(base, distill_weight=-1),
    "heads": lambda base: make(base, heads=3),
    "flow": lambda base: make(base, flow="up"),
    "class_names": lambda base: make(base, n_ctx=16),
    "descriptions": lambda base: make(base, descriptions=["it purrs"]),
}


# --- proxies and mappers in float64 ----------------------------------------------------------------------------


def norm(x, layer):
    centred = [v - sum(x) / len(x) for v in x]
    size = math.sqrt(sum(v * v for v in centred) / len(x) + layer.eps)
    return [
        v / size * w + b for v, w, b in zip(centred, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def linear(x, weight, bias):
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def attention(queries, keys, values, layer):
    """Multi-head attention, written out."""
    weight, bias = layer.in_proj_weight.tolist(), layer.in_proj_bias.tolist()
    d, heads = len(queries[0]), layer.num_heads
    size = d // heads
    q, k, v = (
        [linear(x, weight[i * d : (i + 1) * d], bias[i * d : (i + 1) * d]) for x in rows]
        for i, rows in enumerate((queries, keys, values))
    )
    out = []
    for one in q:
        joined = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = [
                math.exp(sum(a * b for a, b in zip(one[part], key[part], strict=True)) / math.sqrt(size))
                for key in k
            ]
            mixed = [s / sum(scores) for s in scores]
            joined += [
                sum(m * value[part][j] for m, value in zip(mixed, v, strict=True)) for j in range(size)
            ]
        out.append(linear(joined, layer.out_proj.weight.tolist(), layer.out_proj.bias.tolist()))
    return out


def loop_proxy(module, proxy, prompts):
    seen = [norm(p, module.ln_1) for p in prompts]
    added = attention([norm(proxy, module.ln_1)], seen, seen, module.attn)[0]
    return norm([a + b for a, b in zip(proxy, added, strict=True)], module.ln_2)


def loop_mapper(module, queries, proxies):
    def dense(layer, x):
        return linear(x, layer.weight.tolist(), layer.bias.tolist())

    q = [dense(module.linear_q, x) for x in queries]
    k = [norm(dense(module.linear_k, x), module.ln_1) for x in proxies]
    v = [norm(dense(module.linear_v, x), module.ln_1) for x in proxies]
    added = attention([norm(x, module.ln_1) for x in q], k, v, module.attn)
    out = []
    for x, more in zip(q, added, strict=True):
        u = [a + b for a, b in zip(x, more, strict=True)]
        hidden = dense(module.ffn.c_fc, norm(u, module.ln_2))
        hidden = [h / (1 + math.exp(-1.702 * h)) for h in hidden]
        out.append([a + b for a, b in zip(u, dense(module.ffn.c_proj, hidden), strict=True)])
    return out


def shaken(module, seed=0):
    """Away from initial zeros and ones, in float64."""
    random = generator(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=random, dtype=torch.float64))
    return module


def test_proxy_and_mapper_against_loops():
    random = generator(1)
    proxy, prompts = (torch.randn(n, 6, generator=random, dtype=torch.float64) for n in (1, 3))
    module = shaken(LayerKnowledgeProxy(6, 2))
    expected = torch.tensor([loop_proxy(module, proxy[0].tolist(), prompts.tolist())], dtype=torch.float64)
    assert torch.allclose(module(proxy, prompts), expected, atol=1e-10)
    queries = torch.randn(4, 8, generator=random, dtype=torch.float64)
    mapper = shaken(KnowledgeMapper(8, 6, 4))
    expected = torch.tensor(loop_mapper(mapper, queries.tolist(), prompts.tolist()), dtype=torch.float64)
    assert torch.allclose(mapper(queries, prompts), expected, atol=1e-10)


def test_flow_against_loops():
    """Every query of a stage sees the proxies of all its layers; the other prompts stay as they are."""
    config = HiCroPLConfig(n_ctx=2, depth=5, cross_layer=2, heads=2)
    learner = shaken(CrossModalPromptLearner(config, 4, 6))
    p, v = ([t.tolist() for t in some] for some in (learner.text_prompts, learner.visual_prompts))
    early = [loop_proxy(learner.text_lkps[i], learner.text_proxies[i][0].tolist(), p[i]) for i in range(2)]
    late = [
        loop_proxy(learner.visual_lkps[i], learner.visual_proxies[i][0].tolist(), v[2 + i]) for i in range(3)
    ]
    seen = loop_mapper(learner.text_to_vision, v[0] + v[1], early)
    said = loop_mapper(learner.vision_to_text, p[2] + p[3] + p[4], late)
    text, vision = learner()
    for i in range(5):
        expected = (
            (p[i] if i < 2 else said[2 * (i - 2) : 2 * i - 2]),
            (seen[2 * i : 2 * i + 2] if i < 2 else v[i]),
        )
        assert torch.allclose(text[i], torch.tensor(expected[0], dtype=torch.float64), atol=1e-10)
        assert torch.allclose(vision[i], torch.tensor(expected[1], dtype=torch.float64), atol=1e-10)


def test_learners_start():
    config = HiCroPLConfig(n_ctx=64, depth=4, cross_layer=2, heads=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    learner = CrossModalPromptLearner(config, 64, 32)
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        p.std().item() == pytest.approx(0.02, rel=0.1)
        for p in (*learner.text_prompts, *learner.visual_prompts)
    )
    assert torch.stack(list(learner.text_proxies)).std().item() == pytest.approx(1, rel=0.2)
    assert [
        len(x) for x in (learner.text_proxies, learner.visual_proxies, learner.text_lkps, learner.visual_lkps)
    ] == [2] * 4
    places = [p.data_ptr() for p in learner.parameters()]
    assert len(set(places)) == len(places)  # each has its own storage
    assert not torch.equal(learner.visual_prompts[0], learner.visual_prompts[1])


def test_flows_and_gradients():
    learners = {}
    for flow in ("differentiable", "inplace", "independent"):
        config = HiCroPLConfig(n_ctx=2, depth=4, cross_layer=2, heads=2, flow=flow)
        learners[flow] = CrossModalPromptLearner(config, 8, 12)
    expected = [t.detach().clone() for side in learners["differentiable"]() for t in side]
    raw = [
        t.detach().clone() for t in (*learners["inplace"].text_prompts, *learners["inplace"].visual_prompts)
    ]
    first = [t.detach().clone() for side in learners["inplace"]() for t in side]
    again = [t.detach().clone() for side in learners["inplace"]() for t in side]
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(first, again, strict=True)]
    assert moved == [False, False, True, True, True, True, False, False]  # each call overwrites
    assert all(
        torch.equal(a, b) for a, b in zip([t for s in learners["independent"]() for t in s], raw, strict=True)
    )
    for flow, learner in learners.items():
        out = sum(t.square().sum() for side in learner() for t in side)
        named = dict(learner.named_parameters())
        found = torch.autograd.grad(out, list(named.values()), allow_unused=True)
        got = {name for name, g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}
        prompts = {name for name in named if "prompts" in name}
        assert got == (set(named) if flow == "differentiable" else prompts)


def test_gradient_by_finite_differences():
    config = HiCroPLConfig(n_ctx=2, depth=3, cross_layer=1, heads=2)
    learner = shaken(CrossModalPromptLearner(config, 4, 6))

    def value():
        return sum(((1 + i) * t.sin()).sum() for i, side in enumerate(learner()) for t in side)

    for parameter in (
        learner.text_prompts[0],
        learner.text_proxies[0],
        learner.vision_to_text.linear_k.weight,
    ):
        (analytic,) = torch.autograd.grad(value(), parameter)
        for index in range(min(3, parameter.numel())):
            ends = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    parameter.view(-1)[index] += step
                ends.append(value().item())
            with torch.no_grad():
                parameter.view(-1)[index] += 1e-6
            assert float(analytic.view(-1)[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-5)


# --- injection -----------------------------------------------------------------------------------------------------


def manual_text(clip, ids, prompts, start):
    """The text tower by hand: embeddings put in, an explicit causal mask, the end token's position read."""
    tower = clip.text_model
    n, rows, width = len(prompts[0]), len(ids), ids.shape[1]
    x = tower.embeddings.token_embedding(ids)
    x = torch.cat([x[:, :start], prompts[0].expand(rows, -1, -1), x[:, start + n :]], 1)
    x = x + tower.embeddings.position_embedding.weight[:width]
    mask = torch.full((width, width), -torch.inf).triu(1)[None, None]
    for i, layer in enumerate(tower.encoder.layers):
        if 0 < i < len(prompts):
            x = torch.cat([x[:, :start], prompts[i].expand(rows, -1, -1), x[:, start + n :]], 1)
        x = layer(x, mask)
    x = tower.final_layer_norm(x)
    end = torch.tensor([row.tolist().index(30) for row in ids])
    return F.normalize(clip.text_projection(x[torch.arange(rows), end]), dim=-1)


def manual_images(clip, pixels, prompts):
    tower = clip.vision_model
    n, rows = len(prompts[0]), len(pixels)
    x = torch.cat([tower.embeddings(pixels), prompts[0].expand(rows, -1, -1)], 1)
    x = tower.pre_layrnorm(x)
    for i, layer in enumerate(tower.encoder.layers):
        if 0 < i < len(prompts):
            x = torch.cat([x[:, :-n], prompts[i].expand(rows, -1, -1)], 1)
        x = layer(x, None)
    return F.normalize(clip.visual_projection(tower.post_layernorm(x[:, 0])), dim=-1)


@pytest.mark.parametrize("eos", [30, 2])  # 2: older configurations take the highest id for the end
def test_prompts_enter_both_towers(eos):
    base = fresh(eos_token_id=eos)
    plain = state(base)
    model = make(base)
    text, vision = model.learner()
    with torch.no_grad():
        model.clip.set_attn_implementation("eager")
        found = model.towers.text(model.ids, text, model.start, 2)
        assert torch.allclose(found, manual_text(base, model.ids, text, 1), atol=1e-5)
        seen = model.towers.images(images(), vision)
        assert torch.allclose(seen, manual_images(base, images(), vision), atol=1e-5)
        assert not torch.allclose(seen, model.towers.images(images()), atol=1e-3)
        assert not torch.allclose(found[:, :], model.towers.text(model.ids), atol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert all(torch.equal(a, plain[name]) for name, a in state(base).items())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_ids_leave_room_and_names_are_read():
    model = make(fresh())
    for row, name in zip(model.ids.tolist(), ["cat.", "old dog.", "bird."], strict=True):
        own = tokenizer()(name)["input_ids"]
        assert row[0] == 1 and row[3 : 3 + len(own) - 1] == own[1:] and not any(row[2 + len(own) :])
        assert row.index(30) == len(own) - 1 + 2  # the end moved by the context
    assert torch.equal(
        make(fresh(), n_ctx=4).learner.text_prompts[0],
        fresh().text_model.embeddings.token_embedding.weight[tokenizer()("a ph")["input_ids"][1:-1]],
    )
    assert make(fresh(), n_ctx=5).learner.text_prompts[0].std() < 0.05  # drawn, above 4 tokens


def test_classes_do_not_touch_each_other():
    """Padding behind the end changes nothing, so a class's feature does not depend on the longest name."""
    model = make(fresh())
    alone = model.with_classes(["cat"], TEXTS)
    assert alone.ids.shape[1] < model.ids.shape[1] and alone.learner is model.learner
    one, all_three = (m.features(images())[2] for m in (alone, model))
    assert torch.allclose(one[0], all_three[0], atol=1e-5)
    assert torch.allclose(alone.frozen_text[0], model.frozen_text[0], atol=1e-5)


def test_head_and_loss_by_hand():
    model = make(fresh(), distill_weight=3.0)
    labels = torch.arange(12) % 3
    out = model(images(), labels)
    text, vision = model.learner()
    f_txt, f_img = model.towers.text(model.ids, text, 1, 2), model.towers.images(images(), vision)
    rows = []
    for name in CLASSES:
        ids = [torch.tensor([tokenizer()(text)["input_ids"]]) for text in TEXTS[name]]
        rows.append(
            sum(F.normalize(model.clip.get_text_features(i).pooler_output[0], dim=0) for i in ids) / len(ids)
        )
    z_txt = F.normalize(torch.stack(rows), dim=-1)
    z_img = F.normalize(model.clip.get_image_features(images()).pooler_output, dim=-1)
    assert torch.allclose(model.frozen_text, z_txt, atol=1e-6)
    i, t = F.normalize(f_img + z_img, dim=-1), F.normalize(f_txt + z_txt, dim=-1)
    logits = model.clip.logit_scale.exp() * i @ t.T
    assert torch.allclose(out.logits, logits, atol=1e-4)
    entropy = -logits.log_softmax(-1)[torch.arange(12), labels].mean()
    distances = 1 - (t * z_txt).sum(-1).mean(), 1 - (i * z_img).sum(-1).mean()
    assert out.cross_entropy.item() == pytest.approx(entropy.item(), rel=1e-4)
    assert out.text_distance.item() == pytest.approx(distances[0].item(), abs=1e-5)
    assert out.image_distance.item() == pytest.approx(distances[1].item(), abs=1e-5)
    assert out.loss.item() == pytest.approx((entropy + 3 * sum(distances)).item(), rel=1e-4)
    assert model(images()).loss is None


def test_learning_moves_the_prompts_alone():
    base = fresh()
    before = state(base)
    model = make(base, distill_weight=0.0)
    start = state(model.learner)
    labels = torch.arange(12) % 3
    history = model.learn(images(), labels, epochs=40, batch_size=12, lr=0.02, eps=1e-8)
    assert history.losses[-1] < 0.7 * history.losses[0]
    right = (answers(model).argmax(-1) == labels).double().mean()
    assert model.accuracy(images(), labels) == pytest.approx(100 * float(right))
    assert torch.equal(model.predict(images(), batch_size=5), answers(model).argmax(-1))
    moved = {name for name, tensor in state(model.learner).items() if not torch.equal(tensor, start[name])}
    # with one proxy (K = 1) its mapper's attention has nothing to choose from, so only prompts etc. must move
    assert {name for name in start if "prompts" in name or "proxies" in name or "linear_v" in name} <= moved
    assert all(torch.equal(a, before[name]) for name, a in state(base).items())
    assert not any(p.requires_grad for p in base.parameters()) and not model.train().clip.training
    with pytest.raises(BadInput, match="labels"):
        model.learn(images(), labels + 1)
    with pytest.raises(BadInput, match="lr"):
        model.learn(images(), labels, lr=0.0)
    with pytest.raises(BadInput, match="epochs"):
        model.learn(images(), labels, epochs=0)
    with pytest.raises(BadInput, match="weight_decay"):
        model.learn(images(), labels, weight_decay=-1e-4)


def test_rates_and_decay_against_adam_by_hand():
    """One update per epoch: at 1e-5, then along a cosine that starts from the peak; the penalty is in the gradient."""
    labels, lr, eps, decay = torch.arange(12) % 3, 0.01, 1e-3, 0.5
    model, slow = make(fresh()), make(fresh())
    model.learn(images(), labels, epochs=4, batch_size=12, lr=lr, eps=eps, weight_decay=decay)
    trained = list(slow.learner.parameters())
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    rates = [1e-5, lr, lr * (1 + math.cos(math.pi / 4)) / 2, lr * (1 + math.cos(math.pi / 2)) / 2]
    for step, rate in enumerate(rates, 1):
        found = torch.autograd.grad(slow(images(), labels).loss, trained)
        with torch.no_grad():
            for p, gradient, m, v in zip(trained, found, first, second, strict=True):
                own = gradient + decay * p
                m.mul_(0.9).add_(0.1 * own)
                v.mul_(0.999).add_(0.001 * own * own)
                p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + eps)
    for name, expected in state(slow.learner).items():
        assert torch.allclose(state(model.learner)[name], expected, atol=1e-4), name
    start = state(make(fresh()).learner)
    assert max((t - start[name]).abs().max() for name, t in state(slow.learner).items()) > 0.02


def test_the_default_penalty_is_dassls():
    labels = torch.arange(12) % 3
    found = []
    for options in ({}, {"weight_decay": 5e-4}, {"weight_decay": 0.0}):
        model = make(fresh())
        model.learn(images(), labels, epochs=3, batch_size=12, **options)
        found.append(state(model.learner))
    same = [all(torch.equal(found[0][n], other[n]) for n in other) for other in found[1:]]
    assert same == [True, False]


def test_the_first_epoch_is_slow():
    model = make(fresh())
    start = state(model.learner)
    model.learn(images(), torch.arange(12) % 3, epochs=1, batch_size=12, eps=1e-8)
    largest = max((t - start[name]).abs().max() for name, t in state(model.learner).items())
    assert 0 < largest < 1.1e-5


@pytest.mark.parametrize("flow", ["inplace", "independent"])
def test_other_flows_learn(flow):
    model = adapt(fresh(), flow=flow)
    assert answers(model).isfinite().all()
    start, now = state(make(fresh(), flow=flow).learner), state(model.learner)
    apart = {name for name in start if "prompts" not in name}  # no gradient reaches them: no penalty either
    assert apart and all(torch.equal(now[name], start[name]) for name in apart)
    assert torch.equal(answers(model), answers(model)) == (flow == "independent")


def test_siglip_like_towers():
    base = fresh("siglip")
    before = state(base)
    model = adapt(base)
    assert model.ids.shape[1] == 24  # padded to the whole context, as these are trained
    assert answers(model).shape == (12, 3) and not torch.equal(answers(model), answers(make(fresh("siglip"))))
    assert all(torch.equal(a, before[name]) for name, a in state(base).items())


def test_bf16_encoders():
    model = adapt(fresh().to(torch.bfloat16))
    assert answers(model).dtype == torch.float32 and answers(model).isfinite().all()
    assert all(p.dtype == torch.float32 for p in model.learner.parameters())


@pytest.mark.filterwarnings("error")
def test_descriptions_may_have_spaces_for_underscores():
    """As published description files do; under the name itself they come first."""
    expected = make(fresh()).frozen_text
    texts = {name.replace("_", " "): some for name, some in TEXTS.items()}
    assert torch.equal(make(fresh(), descriptions=texts).frozen_text, expected)
    both = {**texts, "old dog": ["it flies"], "old_dog": TEXTS["old_dog"]}
    assert torch.equal(make(fresh(), descriptions=both).frozen_text, expected)


def test_missing_descriptions_warn():
    with pytest.warns(UserWarning, match="no descriptions of old_dog, bird"):
        model = make(fresh(), descriptions={"cat": TEXTS["cat"]})
    expected = model.towers.described(tokenizer(), {"old_dog": ["a photo of a old dog."]})
    assert torch.allclose(model.frozen_text[1], expected[0], atol=1e-6)


def test_refusals(tmp_path):
    with pytest.raises(NotApplicable, match="text_model"):
        hicropl(torch.nn.Linear(2, 2), tokenizer(), CLASSES)
    with pytest.raises(BadInput, match="old_dog"):
        make(fresh(), n_ctx=15)  # 8 characters, start and end
    for names in ([], ["cat", "cat"]):
        with pytest.raises(BadInput, match="class_names"):
            hicropl(fresh(), tokenizer(), names, **SIZES)
    with pytest.raises(BadInput, match="scores"):
        base_to_novel([])
    model = adapt(fresh())
    save(model, tmp_path / "a")
    with pytest.raises(BadInput, match="folder"):
        load(fresh(), tmp_path)
    with pytest.raises(IncompatibleModels, match="other encoders"):
        load(fresh(seed=1), tmp_path / "a")
    with pytest.raises(BadInput, match="tokenizer"):
        load(fresh(), tmp_path / "a").with_classes(["fox"])
    loaded = load(fresh(), tmp_path / "a", tokenizer=tokenizer())
    assert loaded.with_classes(CLASSES, TEXTS).ids.tolist() == model.ids.tolist()
    tensors, header = read_tensors(tmp_path / "a" / "prompts.safetensors")
    del tensors["ids"]
    write_tensors(tmp_path / "a" / "prompts.safetensors", tensors, header)
    with pytest.raises(CorruptFile, match="not whole"):
        load(fresh(), tmp_path / "a")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("distill_weight", math.nan), ("distill_weight", math.inf), ("n_ctx", 2.5), ("n_ctx", True),
        ("depth", 3.0), ("cross_layer", 1.5), ("heads", 0.5), ("descriptions", ["it purrs"]),
        ("descriptions", "it purrs"), ("descriptions", {**TEXTS, "cat": "it purrs"}),
        ("descriptions", {**TEXTS, "cat": [1]}), ("descriptions", {**TEXTS, "cat": 1}),
    ],
)  # fmt: skip
def test_arguments_are_checked(argument, value):
    base = fresh()
    with pytest.raises(BadInput, match=rf"^{argument}"):
        make(base, **{argument: value})
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("names", ["cat", ["cat", ""], ["cat", 1]])
def test_names_are_a_list_of_strings(names):
    for use in (lambda: hicropl(fresh(), tokenizer(), names, **SIZES), lambda: made().with_classes(names)):
        with pytest.raises(BadInput, match="class_names"):
            use()


def test_with_classes_refuses_bare_texts():
    with pytest.raises(BadInput, match=r"descriptions\['fox'\]"):
        made().with_classes(["fox"], {"fox": "it runs"})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", math.inf), ("lr", math.nan), ("eps", -1.0), ("eps", math.nan), ("weight_decay", math.inf),
        ("epochs", 1.5), ("batch_size", 2.5), ("labels", torch.arange(12) % 3 / 1),
        ("labels", torch.zeros(12, 3, dtype=torch.long)), ("labels", torch.arange(0)),
    ],
)  # fmt: skip
def test_learning_checks_its_arguments(argument, value):
    model = made()
    before = state(model.learner)
    given = {"labels": torch.arange(12) % 3, "epochs": 1, argument: value}
    with pytest.raises(BadInput, match=argument):
        model.learn(images(), **given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model.learner).items())
    for wrong in (0, -1, 2.5):
        with pytest.raises(BadInput, match="batch_size"):
            model.predict(images(), batch_size=wrong)


def test_labels_of_any_integer_type():
    kinds = (torch.int64, torch.int32, torch.uint8)
    runs = [make(fresh()).learn(images(), (torch.arange(12) % 3).to(kind), epochs=1).losses for kind in kinds]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("last", [0, 1, 2])
def test_restore_after_several_prompts(tmp_path, last):
    """Whichever is restored, the encoder is as before the first of them."""
    base = fresh().train()
    base.logit_scale.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    models = [make(base), make(base, seed=1)]
    save(models[0], tmp_path / "a")
    models.append(load(base, tmp_path / "a"))
    for _ in range(2):
        assert restore(models[last]) is base and base.training
        assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    base.text_model.requires_grad_(False)  # what is changed in between counts
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    restore(make(base.eval()))
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags and not base.training


def test_restore_gives_flags_and_mode_back():
    base = fresh().train()
    base.logit_scale.requires_grad_(False)
    model = make(base)
    assert not any(p.requires_grad for p in base.parameters()) and not base.training
    assert restore(model.with_classes(["cat"], TEXTS)) is base and base.training
    assert {name for name, p in base.named_parameters() if not p.requires_grad} == {"logit_scale"}


def test_harmonic_mean_is_of_means():
    found = base_to_novel([(80.0, 60.0), (90.0, 20.0)])
    assert (found.base, found.novel) == (85.0, 40.0)
    assert found.harmonic == pytest.approx(2 * 85 * 40 / 125)
    assert base_to_novel([(0.0, 0.0)]).harmonic == 0
