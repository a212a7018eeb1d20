"""HiCroPL: prompts in both encoders of a CLIP; text refines vision in early layers, vision text in late ones.

:arxiv: 2507.14976
:moves: a few labelled images -> prompts beside a frozen dual encoder
:access: hidden, weights, training data
:reversible: yes
:context: yes

Each of the first D layers of both encoders reads n prompt tokens. Below layer K a layer's text prompts are summed up
in one token (a proxy, `LayerKnowledgeProxy`), and the visual prompts of all those layers look at all these proxies
(`KnowledgeMapper`); from K on it is the other way round. Neither needs an image, so it happens once per pass:

    V_l <- M_t2v(V_0 .. V_{K-1}; s_0 .. s_{K-1})    l < K        P_l <- M_v2t(P_K .. P_{D-1}; v_K .. v_{D-1})   l >= K

    i = norm(norm(f_img) + z_img)       t = norm(norm(f_txt) + z_txt)       logits = exp(tau) i t^T
    loss = CE + lambda ((1 - mean cos(t, z_txt)) + (1 - mean cos(i, z_img)))

f are features with prompts, z those of the untouched encoders; z_txt is the mean over descriptions of the class.
Prompts, proxies and mappers are trained, the encoders are not, and nothing in them is changed: prompts enter through
hooks that last one pass. Text prompts take places kept free behind the start token, so that the causal mask and the
position of the end token are right by themselves.

The released code writes mapped prompts over the parameters they came from; there the mappers and proxies get no
gradient, and every pass changes the prompts, in evaluation too. Here the mapped prompts are this pass's prompts, as
the paper has it; `flow="inplace"` is the released behaviour, with which its figures were made, and
`flow="independent"` maps nothing (independent prompts in both encoders, same head and loss). Prompts of different
layers are drawn apart; there all visual ones start alike.

    adapted = hicropl(clip, tokenizer, ["cat", "dog"], descriptions=texts, n_ctx=4)
    adapted.learn(pixel_values, labels, epochs=50)
    adapted.predict(pixel_values)
    other = adapted.with_classes(["fox", "owl"])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.batches import minibatches
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels
from transfuse.core.files import atomic_dir, check_writable, read_tensors, write_tensors
from transfuse.core.lineage import write_lineage
from transfuse.core.models import fingerprint
from transfuse.core.runs import History, check_positive
from transfuse.core.training import loop

from ._arguments import check_labels, check_number
from ._prompt_flow import CrossModalPromptLearner, Flow, HiCroPLConfig, KnowledgeMapper, LayerKnowledgeProxy
from ._prompted import (
    BaseToNovel,
    ClassPrompts,
    Descriptions,
    Towers,
    base_to_novel,
    class_prompts,
    described_by,
    first_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BaseToNovel",
    "CrossModalPromptLearner",
    "HiCroPLConfig",
    "KnowledgeMapper",
    "LayerKnowledgeProxy",
    "PromptedCLIP",
    "base_to_novel",
    "hicropl",
    "load",
    "restore",
    "save",
]

FILE = "prompts.safetensors"
WARM_UP = 1e-5  # learning rate of the first epoch
BEFORE = "_before_prompts"  # attribute of an encoder with prompts: what `restore` gives back


def hicropl(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    *,
    descriptions: Descriptions | None = None,
    n_ctx: int = 16,
    depth: int = 12,
    cross_layer: int = 6,
    distill_weight: float = 12.0,
    heads: int = 8,
    flow: Flow = "differentiable",
    seed: int = 0,
) -> PromptedCLIP:
    """Put cross-modal prompts on a dual encoder. It takes no gradient until `restore`; its weights stay as they are.

    Args:
        model: A transformers `CLIPModel`, or one built alike (`SiglipModel`).
        tokenizer: Its tokenizer.
        class_names: Names of the classes, in the order of the labels.
        descriptions: Texts about each class, under its name or that with spaces for underscores; where they are
            missing, "a photo of a <class>." with a warning.
        n_ctx: Context tokens per layer and encoder. Up to 4, the first text prompt starts from "a photo of a".
        depth: Layers with prompts.
        cross_layer: First layer whose text prompts are refined by visual ones.
        distill_weight: Weight lambda of staying near the frozen features.
        heads: Attention heads of proxies and mappers.
        flow: "differentiable", "inplace" (the released code) or "independent" (no mapping).
        seed: Of all initial values.

    Raises:
        BadInput: an argument out of range; names or descriptions that are no lists of strings; a class name that is
            too long for the context.
        NotApplicable: the model is no dual encoder of that kind.
    """
    towers = Towers(model)
    config = HiCroPLConfig(
        n_ctx=n_ctx,
        depth=depth,
        cross_layer=cross_layer,
        distill_weight=distill_weight,
        heads=heads,
        flow=flow,
    )
    config.check(towers.text_width, towers.vision_width, towers.blocks)
    classes = class_prompts(towers, tokenizer, class_names, n_ctx)
    texts = described_by(class_names, descriptions)
    learner = CrossModalPromptLearner(
        config,
        towers.text_width,
        towers.vision_width,
        first=first_prompt(towers, tokenizer, n_ctx),
        seed=seed,
    )
    frozen = towers.described(tokenizer, texts)
    return PromptedCLIP(model, learner, list(class_names), classes, frozen, tokenizer)


@dataclass(frozen=True)
class Output:
    """What a prompted model answers.

    Attributes:
        logits: float32 `[batch, classes]`.
        loss: Scalar, where labels were given: cross-entropy + lambda (text + image).
        cross_entropy: Its first term.
        text_distance: 1 - mean cos(t, z_txt).
        image_distance: 1 - mean cos(i, z_img).
    """

    logits: Tensor
    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    text_distance: Tensor | None = None
    image_distance: Tensor | None = None


class PromptedCLIP(nn.Module):
    """A frozen dual encoder with a prompt learner; made by `hicropl` and `load`.

    Args:
        clip: The dual encoder.
        learner: Its prompts.
        class_names: Names of the classes.
        classes: Their token ids.
        frozen: z_txt, `[classes, e]`.
        tokenizer: For other classes; None where there will be none.
    """

    def __init__(
        self,
        clip: Any,
        learner: CrossModalPromptLearner,
        class_names: list[str],
        classes: ClassPrompts,
        frozen: Tensor,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.wanted, self.clip_training = _before(clip)
        self.clip, self.learner = clip.requires_grad_(False).eval(), learner.to(clip.device)
        self.class_names, self.tokenizer, self.towers = class_names, tokenizer, Towers(clip)
        self.start = classes.start
        self.ids, self.frozen_text = nn.Buffer(classes.ids.to(clip.device)), nn.Buffer(frozen)
        self.eval()

    @property
    def config(self) -> HiCroPLConfig:
        """Sizes and weights."""
        return self.learner.config

    def train(self, mode: bool = True) -> PromptedCLIP:
        """Set the mode of the learner; the encoders stay in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fused image features i `[batch, e]`, frozen ones z_img `[batch, e]`, fused text features t `[classes, e]`."""
        text, vision = self.learner()
        with torch.no_grad():
            plain = self.towers.images(pixel_values)
        seen = F.normalize(self.towers.images(pixel_values, vision) + plain, dim=-1)
        said = self.towers.text(self.ids, text, self.start, self.config.n_ctx)
        return seen, plain, F.normalize(said + self.frozen_text, dim=-1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Output:
        """Logits, and with labels the loss and its terms."""
        seen, plain, said = self.features(pixel_values)
        logits = self.towers.scale * seen @ said.T
        if labels is None:
            return Output(logits)
        entropy = F.cross_entropy(logits, labels)
        text = 1 - F.cosine_similarity(said, self.frozen_text, eps=1e-7).mean()
        image = 1 - F.cosine_similarity(seen, plain, eps=1e-7).mean()
        return Output(logits, entropy + self.config.distill_weight * (text + image), entropy, text, image)

    @torch.no_grad()
    def predict(self, pixel_values: Tensor, batch_size: int = 256) -> Tensor:
        """Classes, int64 `[rows]`.

        Raises:
            BadInput: batch_size is below 1.
        """
        check_positive(batch_size=batch_size)
        parts = pixel_values.split(batch_size)
        return torch.cat([self(part).logits.argmax(-1) for part in parts])

    def accuracy(self, pixel_values: Tensor, labels: Tensor) -> float:
        """Percent right."""
        return 100 * float((self.predict(pixel_values).cpu() == labels.cpu()).double().mean())

    def learn(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        *,
        epochs: int = 50,
        batch_size: int = 32,
        lr: float = 2.5e-3,
        eps: float = 1e-3,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> History:
        """Train the prompts with Adam: one epoch at 1e-5, then half a cosine from the peak, epoch by epoch.

        Epoch e > 0 of T has the rate `lr (1 + cos(pi (e - 1) / T)) / 2`: in the released code too, the cosine starts
        from the peak after the first epoch.

        Args:
            pixel_values: Images `[rows, channels, height, width]`.
            labels: Classes, int64 `[rows]`.
            epochs: Passes over them.
            batch_size: Images per update.
            lr: Peak learning rate.
            eps: Of Adam.
            weight_decay: L2 penalty, added to the gradient. The default is that of the released code, which sets none.
            seed: Of the order.

        Raises:
            BadInput: an argument out of range; labels that are no class.
        """
        check_positive(epochs=epochs, batch_size=batch_size)
        check_number("lr", lr)
        check_number("eps", eps, zero=True)
        check_number("weight_decay", weight_decay, zero=True)
        check_labels(labels, len(self.class_names))
        optimizer = torch.optim.Adam(self.learner.parameters(), lr=lr, eps=eps, weight_decay=weight_decay)
        batches = minibatches({"x": pixel_values, "y": labels.long()}, batch_size, seed=seed)

        def epoch(number: int) -> Any:
            for group in optimizer.param_groups:
                cosine = lr * (1 + math.cos(math.pi * (number - 1) / epochs)) / 2
                group["lr"] = WARM_UP if number == 0 else cosine
            return batches(number)

        def step(batch: dict[str, Tensor]) -> Tensor:
            loss = self(batch["x"], batch["y"]).loss
            assert loss is not None
            return loss

        return loop(self, epoch, step, optimizer=optimizer, epochs=epochs, seed=seed)

    def with_classes(
        self, class_names: Sequence[str], descriptions: Descriptions | None = None
    ) -> PromptedCLIP:
        """The same prompts (shared, not copied) for other classes.

        Raises:
            BadInput: as `hicropl`; or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise BadInput("tokenizer", None, "is needed for new classes", "pass it to load()")
        classes = class_prompts(self.towers, self.tokenizer, class_names, self.config.n_ctx)
        frozen = self.towers.described(self.tokenizer, described_by(class_names, descriptions))
        return PromptedCLIP(self.clip, self.learner, list(class_names), classes, frozen, self.tokenizer)


def _before(clip: Any) -> tuple[set[str], bool]:
    """The names of the parameters that required gradients, and the mode, before `clip` got its first prompts."""
    wanted = {name for name, p in clip.named_parameters() if p.requires_grad}
    if wanted or not hasattr(clip, BEFORE):  # else it is still as the first prompts left it
        setattr(clip, BEFORE, (wanted, clip.training))
    kept: tuple[set[str], bool] = getattr(clip, BEFORE)
    return kept


def restore(model: PromptedCLIP) -> Any:
    """The dual encoder, with parameters requiring gradients, and its mode, as before prompts were put on it.

    Where several were (by `hicropl`, `load` or `with_classes`), that is as before the first.
    """
    vars(model.clip).pop(BEFORE, None)
    for name, parameter in model.clip.named_parameters():
        parameter.requires_grad_(name in model.wanted)
    return model.clip.train(model.clip_training)


# --- files -----------------------------------------------------------------------------------------------------


def save(model: PromptedCLIP, folder: str | Path) -> Path:
    """Write prompts, proxies, mappers and classes, with a hash of the encoders they belong to.

    Raises:
        BadInput: the folder cannot be written.
    """
    target = check_writable(folder, "folder")
    tensors = {f"learner.{name}": tensor for name, tensor in model.learner.state_dict().items()}
    tensors |= {"ids": model.ids, "frozen_text": model.frozen_text}
    header = {
        "config": asdict(model.config), "class_names": model.class_names, "start": model.start,
        "clip": fingerprint(model.clip),
    }  # fmt: skip
    with atomic_dir(target) as work:
        write_tensors(work / FILE, tensors, header)
        write_lineage(
            work,
            method="hicropl",
            arguments={**asdict(model.config), "class_names": model.class_names},
            summary="Cross-modal prompts for a frozen dual encoder.",
            usage='adapted = transfuse.adapt.hicropl.load(clip, "this folder", tokenizer=tokenizer)',
        )
    return target


def load(
    model: PreTrainedModel | nn.Module,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PromptedCLIP:
    """Put saved prompts on their dual encoder.

    Args:
        model: The dual encoder they were trained with.
        folder: Written by `save`.
        tokenizer: For `with_classes`.

    Raises:
        BadInput: no prompts there.
        CorruptFile: they cannot be read.
        IncompatibleModels: the encoders are others.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise BadInput("folder", str(folder), f"holds no {FILE}", "give the folder of saved prompts")
    tensors, header = read_tensors(path)
    towers = Towers(model)
    try:
        if header["clip"] != fingerprint(model):
            problem, remedy = "was trained on other encoders than these", "load the model it was trained on"
            raise IncompatibleModels("folder", str(folder), problem, remedy)
        learner = CrossModalPromptLearner(
            HiCroPLConfig(**header["config"]), towers.text_width, towers.vision_width
        )
        state = {name.removeprefix("learner."): t for name, t in tensors.items() if name[:8] == "learner."}
        learner.load_state_dict(state)
        classes, frozen = ClassPrompts(tensors["ids"], int(header["start"])), tensors["frozen_text"]
        names = list(header["class_names"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CorruptFile("folder", str(path), f"is not whole ({error})", "save the prompts again") from error
    return PromptedCLIP(model, learner, names, classes, frozen.to(towers.clip.device), tokenizer)
