"""Do prompts that refine each other across modalities keep novel classes while they learn base ones?

A tiny CLIP (transformers' classes, trained here on scikit-learn's digits and captions about their shapes) meets
shifted digits: half the classes with 16 shots to learn from, the other half never seen in that shape.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import torch
from _shared.data import digits, split
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from transfuse.adapt.hicropl import PromptedCLIP, base_to_novel, hicropl, restore
from transfuse.core.batches import minibatches
from transfuse.core.training import generator, loop, seeded

SLUG = "hicropl"
CLAIM = (
    "Text prompts that refine visual ones in early layers, and visual ones that refine text in late layers, adapt CLIP "
    "to base classes without losing novel ones: harmonic mean over 11 data sets 81.75, against 71.70 for CLIP, 78.55 "
    "for MaPLe, 79.97 for PromptSRC and 80.47 for CoPrompt."
)
RULE = {
    "quick": (
        "hicropl.harmonic >= zero_shot.harmonic + 3 in 3/3 seeds; hicropl.harmonic >= ivlp.harmonic - 1 in 3/3 seeds; "
        "hicropl.zero_gradients == 0 in 3/3 seeds"
    ),
    "full": "paired.over_ivlp > paired.over_ivlp_error; paired.over_maple > paired.over_maple_error",
}
SEEDS = {"quick": 3, "full": 1}
NOTES = (
    "A substitute: digits of 8x8 pixels, encoders of four blocks and 64 wide, captions by character. The "
    "pretraining (rate, epochs, batch, captions, initial scale, one image in four inverted: six variants) was "
    "chosen on seed 11 by its loss, with zero-shot accuracy on plain and on shifted digits in view; the whole "
    "comparison was seen twice on that seed, first with an encoder that had collapsed, and nothing changed after "
    "the second time. Prompts use the published optimiser settings. Zero-shot is the plain head without prompts; "
    "all other arms share the fused head and the loss. The first run on the recorded seeds failed the comparison "
    "with independent prompts (IVLP) in two of three seeds, and on average too (by about two points, where one is "
    "allowed); nothing was tried after it. Schedule and weight decay were then set right by the released code, and "
    "this is the run after that. It gains ten points over zero-shot, and five over the in-place flow of the "
    "released code. Novel classes gain from no arm here. This speaks about the substitute: 90 updates and two "
    "proxies per stage."
)

SHOTS, EPOCHS, PLACES = 16, 30, {"n_ctx": 4, "depth": 4, "cross_layer": 2}
WIDTH, BLOCKS = 64, 4
PRETRAINING, FLIPPED = 30, 0.25  # epochs, and the share of images they show with inverted contrast
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = tuple(f"digit {word}" for word in WORDS)
SHAPES = (
    ("one large hole", "a closed round stroke"),
    ("no hole", "a single straight stroke"),
    ("no hole", "a curve on top and a flat stroke below"),
    ("no hole", "two curves open to the left"),
    ("a small hole or none", "two strokes that cross a long one"),
    ("no hole", "a flat stroke on top and a curve below"),
    ("a hole below", "a long stroke above on the left"),
    ("no hole", "a flat stroke on top and a slanted one"),
    ("two holes", "a stroke that crosses itself"),
    ("a hole above", "a long stroke below on the right"),
)


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm; accuracies in percent."""
    if tier == "quick":
        return compare(seed, seed, ("zero_shot", "ivlp", "maple", "hicropl", "inplace"), 12.0)
    kept: dict[str, list[dict[str, float]]] = {}
    for own in range(3):
        for order in range(10):
            for weight in (0.0, 4.0, 12.0):
                arms = ("ivlp", "maple", "hicropl")
                if weight == 12:
                    arms += ("zero_shot", "inplace", "no_proxy")
                for arm, figures in compare(own, order, arms, weight).items():
                    kept.setdefault(arm if weight == 12 else f"{arm}_{weight:.0f}", []).append(figures)
    found = {}
    for arm, rows in kept.items():
        summary = base_to_novel([(row["base"], row["novel"]) for row in rows])
        found[arm] = {"base": summary.base, "novel": summary.novel, "harmonic": summary.harmonic}
    paired = {}
    for other in ("ivlp", "maple"):
        gains = [a["harmonic"] - b["harmonic"] for a, b in zip(kept["hicropl"], kept[other], strict=True)]
        paired[f"over_{other}"] = statistics.mean(gains)
        paired[f"over_{other}_error"] = statistics.stdev(gains) / math.sqrt(len(gains))
    return {**found, "paired": paired}


# --- a tiny CLIP -----------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, between a start and an end."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz ."))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", *letters, "</s>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def descriptions(digit: int) -> list[str]:
    """Captions of a digit, in pretraining and as the descriptions of the class."""
    holes, strokes = SHAPES[digit]
    return [
        f"{NAMES[digit]}.",
        f"{NAMES[digit]} with {holes}.",
        f"{NAMES[digit]} with {strokes}.",
        f"{strokes}.",
    ]


@functools.cache
def pretrained(seed: int) -> CLIPModel:
    """Contrastive training on all ten digits with shifts, noise and contrast as augmentation."""
    letters = tokenizer()
    end = letters.eos_token_id
    encoder = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4, "projection_dim": WIDTH, "initializer_factor": 3.0,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**encoder, "vocab_size": len(letters), "max_position_embeddings": 64,
                     "bos_token_id": letters.bos_token_id, "eos_token_id": end, "pad_token_id": 0},
        vision_config={**encoder, "image_size": 8, "patch_size": 2, "num_channels": 1},
        projection_dim=WIDTH,
    )  # fmt: skip
    with seeded(seed):
        model = CLIPModel(config)
    texts = [descriptions(digit) for digit in range(10)]
    ids = [
        letters([some[i] for some in texts], padding=True, return_tensors="pt")["input_ids"] for i in range(4)
    ]
    x, y = digits()
    chosen = parts(seed)[0]
    random = generator(seed)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        """Each image against one caption of every class, and the captions against the images of their class."""
        which = int(torch.randint(0, len(ids), (1,), generator=random))
        images = F.normalize(
            model.get_image_features(pixel_values=augmented(batch["x"], random)).pooler_output, dim=-1
        )
        said = F.normalize(model.get_text_features(input_ids=ids[which]).pooler_output, dim=-1)
        logits = model.logit_scale.exp().clamp_max(100) * images @ said.T
        own = F.one_hot(batch["y"], 10).float()
        own = own / own.sum(0).clamp_min(1)
        return F.cross_entropy(logits, batch["y"]) - (own * logits.log_softmax(0)).sum() / 10

    batches = minibatches({"x": x[chosen].view(-1, 1, 8, 8), "y": y[chosen]}, 64, seed=seed, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    loop(model, batches, loss, optimizer=optimizer, epochs=PRETRAINING, clip=1.0, seed=seed)
    return model.eval()


def augmented(x: Tensor, random: torch.Generator) -> Tensor:
    """Shifted by up to a pixel, some with their contrast inverted, with noise."""
    up, left = torch.randint(-1, 2, (2,), generator=random).tolist()
    flipped = torch.rand(len(x), 1, 1, 1, generator=random) < FLIPPED
    x = torch.where(flipped, 1 - x, x).roll((up, left), (2, 3))
    return x + 0.1 * torch.randn(x.shape, generator=random)


def parts(seed: int) -> list[Tensor]:
    """Rows for pretraining, for shots, and for the test."""
    return split(1797, (900, 300, 597), seed)


def shifted(x: Tensor) -> Tensor:
    """Inverted contrast and a shear: each row of pixels moves by a share of its height."""
    slant = torch.tensor([[1.0, 0.6, 0.0], [0.0, 1.0, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(slant, list(x.shape), align_corners=False)
    return 1 - F.grid_sample(x, grid, align_corners=False)


# --- arms --------------------------------------------------------------------------------------------------------


class Coupled(nn.Module):
    """MaPLe's prompts: a visual prompt is a linear map of the text prompt of its layer."""

    def __init__(self, plain: Any):
        super().__init__()
        self.config, self.text_prompts = plain.config, plain.text_prompts
        self.maps = nn.ModuleList(
            nn.Linear(t.shape[1], v.shape[1])
            for t, v in zip(plain.text_prompts, plain.visual_prompts, strict=True)
        )

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        text = list(self.text_prompts)
        return text, [f(p) for f, p in zip(self.maps, text, strict=True)]


class Mean(nn.Module):
    """In place of a proxy: the mean of a layer's prompts."""

    def forward(self, proxy: Tensor, prompts: Tensor) -> Tensor:
        return prompts.mean(0, keepdim=True)


def adapted(arm: str, clip: Any, classes: list[int], weight: float, seed: int) -> PromptedCLIP:
    """The untrained model of an arm; every arm has the same head and loss."""
    flow: Any = {"ivlp": "independent", "inplace": "inplace"}.get(arm, "differentiable")
    names = [NAMES[digit] for digit in classes]
    model = hicropl(
        clip, tokenizer(), names, descriptions={NAMES[d]: descriptions(d) for d in classes},
        distill_weight=weight, flow=flow, seed=seed, **PLACES,
    )  # fmt: skip
    if arm == "maple":
        with seeded(seed):
            model.learner = Coupled(model.learner)
    if arm == "no_proxy":
        for proxies in (model.learner.text_lkps, model.learner.visual_lkps):
            for i in range(len(proxies)):
                proxies[i] = Mean()
    return model


def compare(seed: int, order: int, arms: tuple[str, ...], weight: float) -> dict[str, dict[str, float]]:
    """Train the arms on 16 shots of five classes; score them on these and on the other five."""
    clip = pretrained(seed)
    classes = torch.randperm(10, generator=generator(1000 + order)).tolist()
    base, novel = classes[:5], classes[5:]
    x, y = digits()
    _, shots, test = parts(seed)
    rows = torch.cat([shots[y[shots] == digit][:SHOTS] for digit in base])
    labels = torch.tensor([base.index(int(digit)) for digit in y[rows]])
    images = shifted(x[rows].view(-1, 1, 8, 8))
    found = {}
    for arm in arms:
        model = adapted(arm, clip, base, weight, seed)
        figures = {}
        if arm != "zero_shot":
            figures["zero_gradients"] = float(unreached(model, images, labels))
            model.learn(images, labels, epochs=EPOCHS, seed=seed)
        other = model.with_classes(
            [NAMES[digit] for digit in novel], {NAMES[d]: descriptions(d) for d in novel}
        )
        for name, own, known in (("base", model, base), ("novel", other, novel)):
            held = test[torch.isin(y[test], torch.tensor(known))]
            truth = torch.tensor([known.index(int(digit)) for digit in y[held]])
            seen = shifted(x[held].view(-1, 1, 8, 8))
            if arm == "zero_shot":
                right = (own.towers.images(seen) @ own.frozen_text.T).argmax(-1) == truth
                figures[name] = 100 * float(right.double().mean())
            else:
                figures[name] = own.accuracy(seen, truth)
        figures["harmonic"] = base_to_novel([(figures["base"], figures["novel"])]).harmonic
        found[arm] = figures
        restore(model)
    return found


def unreached(model: PromptedCLIP, images: Tensor, labels: Tensor) -> int:
    """How many tensors of proxies and mappers (of everything trained, where there are none) get no gradient."""
    named = {n: p for n, p in model.learner.named_parameters() if "lkps" in n or "_to_" in n}
    wanted = list(named.values()) or list(model.learner.parameters())
    gradients = torch.autograd.grad(model(images, labels).loss, wanted, allow_unused=True)
    return sum(g is None or not bool(g.abs().max() > 0) for g in gradients)
