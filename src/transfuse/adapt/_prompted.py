"""A frozen dual encoder that reads prompts in both towers, without any change to its classes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.taps import replace

__all__ = [
    "TEMPLATE",
    "BaseToNovel",
    "ClassPrompts",
    "Descriptions",
    "Towers",
    "base_to_novel",
    "class_prompts",
    "described_by",
    "first_prompt",
]

TEMPLATE = "a photo of a {}."
TEXT, VISION = "text_model", "vision_model"
Descriptions = Mapping[str, Sequence[str]]


class ClassPrompts:
    """Token ids of class names with room for context tokens.

    Args:
        ids: int64 `[classes, tokens]`; positions `start` to `start + n - 1` hold an id whose embedding is replaced.
        start: 1 behind a start token, else 0.
    """

    def __init__(self, ids: Tensor, start: int):
        self.ids, self.start = ids, start


class Towers:
    """The two encoders of a transformers CLIP (or SigLIP) model, run with and without prompts.

    Args:
        clip: The model.

    Raises:
        NotApplicable: it is not built like one.
    """

    def __init__(self, clip: Any):
        self.clip = clip
        needed = ("embeddings.token_embedding", "encoder.layers"), ("embeddings", "encoder.layers")
        for tower, names in zip((TEXT, VISION), needed, strict=True):
            for name in names:
                try:
                    clip.get_submodule(f"{tower}.{name}")
                except AttributeError as error:
                    problem = f"has no {tower}.{name}"
                    remedy = "pass a transformers CLIPModel or SiglipModel"
                    raise NotApplicable("model", type(clip).__name__, problem, remedy) from error
        config = clip.config
        self.text_width, self.vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        self.context = int(config.text_config.max_position_embeddings)
        self.blocks = min(len(clip.get_submodule(f"{tower}.encoder.layers")) for tower in (TEXT, VISION))
        # CLIP reads the end-of-text position behind a causal mask: padding is never seen. Others read the last
        # position without one, and were trained on texts padded to the whole context.
        self.padded = getattr(config, "model_type", "") != "clip"

    @property
    def scale(self) -> Tensor:
        """exp(tau)."""
        scale: Tensor = self.clip.logit_scale.detach().float().exp()
        return scale

    def text(
        self, ids: Tensor, prompts: Sequence[Tensor] | None = None, start: int = 0, width: int = 0
    ) -> Tensor:
        """Normalised text features, float32 `[rows, e]`.

        Args:
            ids: int64 `[rows, tokens]`.
            prompts: One per layer, `[n, text width]`: the first takes the place of token embeddings (positions are
                added to it as to any token), the others overwrite the same positions before their block.
            start: First position they take.
            width: n.
        """
        changes: dict[str, Callable[[Tensor], Tensor]] = {}

        def put(prompt: Tensor) -> Callable[[Tensor], Tensor]:
            def over(hidden: Tensor) -> Tensor:
                own = prompt.to(hidden).expand(len(hidden), -1, -1)
                return torch.cat([hidden[:, :start], own, hidden[:, start + width :]], 1)

            return over

        deeper = list(prompts or ())
        if deeper:
            changes[f"{TEXT}.embeddings.token_embedding"] = put(deeper.pop(0))
        with replace(self.clip, changes), self._before(TEXT, deeper, put):
            return _features(self.clip.get_text_features(input_ids=ids.to(self.clip.device)))

    def images(self, pixel_values: Tensor, prompts: Sequence[Tensor] | None = None) -> Tensor:
        """Normalised image features, float32 `[rows, e]`.

        Args:
            pixel_values: As the model takes them.
            prompts: One per layer, `[n, vision width]`: the first is appended behind the patches (without positions,
                before the first norm), the others overwrite the last n tokens before their block.
        """
        changes: dict[str, Callable[[Tensor], Tensor]] = {}

        def put(prompt: Tensor, added: bool = False) -> Callable[[Tensor], Tensor]:
            def over(hidden: Tensor) -> Tensor:
                own = prompt.to(hidden).expand(len(hidden), -1, -1)
                return torch.cat([hidden if added else hidden[:, : -len(prompt)], own], 1)

            return over

        deeper = list(prompts or ())
        if deeper:
            changes[f"{VISION}.embeddings"] = put(deeper.pop(0), added=True)
        with replace(self.clip, changes), self._before(VISION, deeper, put):
            pixels = pixel_values.to(self.clip.device, self.clip.dtype)
            return _features(self.clip.get_image_features(pixel_values=pixels))

    @contextlib.contextmanager
    def _before(
        self, tower: str, prompts: Sequence[Tensor], put: Callable[[Tensor], Callable[[Tensor], Tensor]]
    ) -> Iterator[None]:
        """Overwrite positions before blocks 1, 2, ..., one prompt each."""
        changes = {f"{tower}.encoder.layers.{i}": put(prompt) for i, prompt in enumerate(prompts, 1)}
        with replace(self.clip, changes, inputs=True):
            yield

    @torch.no_grad()
    def described(self, tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> Tensor:
        """z_txt `[classes, e]`: per class, the mean of its texts' normalised features, normalised."""
        rows = []
        for some in texts.values():
            ids = [tokenizer(text, truncation=True, max_length=self.context)["input_ids"] for text in some]
            rows.append(self.text(self._padded(tokenizer, ids)).mean(0))
        return F.normalize(torch.stack(rows), dim=-1)

    def _padded(self, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Tensor:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        width = self.context if self.padded else max(len(row) for row in rows)
        return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def class_prompts(towers: Towers, tokenizer: Any, names: Sequence[str], n_ctx: int) -> ClassPrompts:
    """Ids `[start, n places, name, ".", end, padding]` of each class; underscores in names are read as spaces.

    Raises:
        BadInput: a bare string, no names, an empty one, one twice, or one too long for the context (it is named).
    """
    if isinstance(names, str):
        raise BadInput("class_names", names, "is one string", f"give a list, such as [{names!r}]")
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise BadInput("class_names", list(names), "holds what is no name", "give each class a name")
    if not names or len(set(names)) < len(names):
        problem = "holds a name twice" if names else "is empty"
        raise BadInput("class_names", list(names), problem, "give each class its own name")
    text = towers.clip.config.text_config
    place = (
        1 if 0 in (text.eos_token_id, tokenizer.eos_token_id) else 0
    )  # any id but the end's: it is replaced
    rows, start = [], 0
    for name in names:
        ids = tokenizer(name.replace("_", " ") + ".")["input_ids"]
        start = int(ids[0] == tokenizer.bos_token_id)
        rows.append([*ids[:start], *[place] * n_ctx, *ids[start:]])
        if len(rows[-1]) > towers.context:
            problem = f"takes {len(rows[-1])} tokens with {n_ctx} of context, more than {towers.context}"
            raise BadInput("class_names", name, problem, "shorten the name or lower n_ctx")
    return ClassPrompts(towers._padded(tokenizer, rows), start)


def described_by(names: Sequence[str], descriptions: Descriptions | None) -> dict[str, Sequence[str]]:
    """Texts per class, by its name or by that with spaces for underscores; the template where there are none.

    Raises:
        BadInput: no mapping, or a class whose texts are no list of strings.
    """
    told = {} if descriptions is None else descriptions
    if not isinstance(told, Mapping):
        raise BadInput("descriptions", told, "is no mapping", "give texts by name of class")
    given = {name: told.get(name) or told.get(name.replace("_", " ")) for name in names}
    for name, texts in given.items():
        some = texts or ()
        listed = isinstance(some, Collection) and all(isinstance(text, str) for text in some)
        if isinstance(texts, str) or not listed:
            raise BadInput(f"descriptions[{name!r}]", texts, "is no list of texts", "give a list of strings")
    missing = [name for name in names if not given[name]]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        warnings.warn(f"no descriptions of {shown}: {TEMPLATE!r} stands for them", stacklevel=3)
    return {name: given[name] or [TEMPLATE.format(name.replace("_", " "))] for name in names}


def first_prompt(towers: Towers, tokenizer: Any, n_ctx: int, text: str = "a photo of a") -> Tensor | None:
    """Embeddings of the first n tokens of `text`, `[n, width]`; None where n is above 4 or the text is shorter.

    With n below 4 the released code keeps the words of `text` that are left over, unlearnt, before each class name;
    here they are left out.
    """
    ids = [i for i in tokenizer(text)["input_ids"] if i not in tokenizer.all_special_ids]
    if n_ctx > 4 or len(ids) < n_ctx:
        return None
    table: nn.Embedding = towers.clip.get_submodule(f"{TEXT}.embeddings.token_embedding")
    return table.weight[torch.tensor(ids[:n_ctx], device=table.weight.device)].detach()


@dataclass(frozen=True)
class BaseToNovel:
    """Accuracies over data sets, in percent.

    Attributes:
        base: Mean on the classes learnt from.
        novel: Mean on the others.
        harmonic: Harmonic mean of these two means (not the mean of harmonic means), as papers' tables have it.
    """

    base: float
    novel: float
    harmonic: float


def base_to_novel(scores: Sequence[tuple[float, float]]) -> BaseToNovel:
    """Sum up (base, novel) accuracies, one pair per data set.

    Raises:
        BadInput: there are none.
    """
    if not scores:
        raise BadInput("scores", [], "is empty", "give a pair per data set")
    base, novel = (sum(column) / len(scores) for column in zip(*scores, strict=True))
    total = base + novel
    return BaseToNovel(base, novel, 2 * base * novel / total if total else 0.0)


def _features(found: Any) -> Tensor:
    """Newer transformers answer with a record, or (earlier) with the tensor itself."""
    tensor = found if isinstance(found, Tensor) else found.pooler_output
    return F.normalize(tensor.float(), dim=-1)
