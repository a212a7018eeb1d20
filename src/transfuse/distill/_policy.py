"""Which sequences a student learns on: the data's, or its own continuations of the data's prompts."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ..core.batches import IGNORED
from ..core.errors import BadInput
from ..core.generate import pad_batch, plain_generation
from ..core.runs import check_positive, evaluating
from ._base import is_causal

__all__ = ["AdaptivePolicy", "Policy", "continuations", "continued", "ends_of", "pad_of", "prompts_of"]

_COLUMNS = ("input_ids", "attention_mask", "labels")


class Policy(nn.Module):
    """GKD's rule (arXiv 2306.13649): with probability `fraction` a batch becomes the student's own samples.

    The other batches are the data's or, with `seq_kd`, the teacher's samples. A row's prompt is what comes before its
    first labelled token; the continuation, to and with its end-of-text token, takes the place of what follows, and is
    what is predicted. It is drawn from the model's own distribution, whatever its `generation_config` says. No gradient
    passes through the sampling. Draws from the global random state, which training
    seeds and checkpoints keep.

    Args:
        fraction: Probability (lambda).
        max_new_tokens: Longest continuation.
        temperature: Of the sampling; top-k and top-p are off.
        prompt_tokens: Length of the prompt in rows whose tokens are all labelled; such rows are refused if None.
        seq_kd: Let the teacher continue the prompts of the batches that the student does not.

    Attributes:
        vocabulary: Only tokens below it are drawn; None for all. Set by `Distiller` where vocabularies are truncated.

    Raises:
        BadInput: an argument out of range.
    """

    def __init__(
        self,
        *,
        fraction: float = 0.5,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        prompt_tokens: int | None = None,
        seq_kd: bool = False,
    ):
        super().__init__()
        if not 0.0 <= fraction <= 1.0:
            raise BadInput("fraction", fraction, "is not a probability", "give a number from 0 to 1")
        check_positive(max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens)
        if not 0 < temperature < math.inf:
            raise BadInput("temperature", temperature, "is not positive", "give a number above 0")
        self.fraction, self.max_new_tokens = fraction, max_new_tokens
        self.temperature, self.prompt_tokens, self.seq_kd = temperature, prompt_tokens, seq_kd
        self.vocabulary: int | None = None
        self._writers: tuple[nn.Module, ...] = ()  # in a tuple, so that the teacher is no submodule

    def prepare(self, teachers: Sequence[nn.Module]) -> None:
        """Called before training with the teachers that are models.

        Raises:
            BadInput: `seq_kd` without one teacher that can write.
        """
        if self.seq_kd and (len(teachers) != 1 or not is_causal(teachers[0])):
            problem = "is asked for, and there is not one language model to write as the teacher"
            raise BadInput("seq_kd", True, problem, "give one teacher model, or leave it out")
        self._writers = tuple(teachers) if self.seq_kd else ()

    def replace(self, student: nn.Module, batch: dict[str, Any], *, progress: float) -> dict[str, Any]:
        """The batch to train on.

        Args:
            student: Samples, in evaluation mode.
            batch: As collated: `input_ids`, `attention_mask`, `labels`.
            progress: Share of the updates made, 0 to 1.
        """
        return self.sampled(student, batch) if random.random() < self.fraction else self.fixed(batch)

    def fixed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What a batch is where the student does not write it: the data, or with `seq_kd` the teacher's samples.

        Raises:
            BadInput: `seq_kd` before `prepare`.
        """
        if not self.seq_kd:
            return batch
        if not self._writers:
            raise BadInput("seq_kd", True, "has no teacher yet", "call prepare([teacher]) first")
        home = batch["input_ids"].device
        return {name: value.to(home) for name, value in self.sampled(self._writers[0], batch).items()}

    def on_evaluate(self, loss: float) -> None:
        """Called with each validation loss."""

    def sampled(self, student: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A model's continuations of the batch's prompts, as a batch of the same form."""
        rows = prompts_of(batch, self.prompt_tokens)
        device = next(student.parameters()).device
        return continuations(
            student, rows, device, max_new_tokens=self.max_new_tokens, temperature=self.temperature,
            vocabulary=self.vocabulary,
        )  # fmt: skip


class AdaptivePolicy(Policy):
    """DistiLLM's adaptive off-policy scheme (arXiv 2402.03898).

    The probability phi of the student's outputs starts at 0. It rises by `increase` whenever the validation loss is not
    below the best one so far; in the authors' code whenever it is not below the loss at the last rise (at first that
    before training), so that there a run that got better and then worse again need not raise phi. With r uniform in
    [0, 1): new samples, which are also stored, if r < phi (1 - progress), or if r < phi while the buffer is not full;
    else as many stored ones as the batch has rows, drawn without replacement, if r < phi; else the data.

    phi and the best loss are in checkpoints; the buffer is not, and fills again after a resumption. A loss that is NaN
    is no better one. Of several validation sets the mean counts.

    Args:
        increase: Step of phi, from 0 to 1.
        buffer: Sequences kept, the oldest going first; a batch must fit in.
        **options: Those of `Policy` but `fraction`.

    Raises:
        BadInput: an argument out of range; in training, more rows in a batch than `buffer`.
    """

    phi: Tensor
    best: Tensor

    def __init__(self, *, increase: float = 0.1, buffer: int = 1000, **options: Any):
        super().__init__(fraction=0.0, **options)
        check_positive(buffer=buffer)
        if not 0.0 <= increase <= 1.0:
            raise BadInput("increase", increase, "is not between 0 and 1", "give a step of a probability")
        self.increase, self.buffer = increase, buffer
        self.stored: deque[tuple[list[int], list[int]]] = deque(maxlen=buffer)  # token ids, and their labels
        self.register_buffer("phi", torch.zeros((), dtype=torch.float64))
        self.register_buffer("best", torch.full((), torch.inf, dtype=torch.float64))

    def prepare(self, teachers: Sequence[nn.Module]) -> None:
        """As `Policy.prepare`; what an earlier run stored is dropped."""
        super().prepare(teachers)
        self.stored.clear()

    def replace(self, student: nn.Module, batch: dict[str, Any], *, progress: float) -> dict[str, Any]:
        rows = len(batch["input_ids"])
        if rows > self.buffer:
            raise BadInput("buffer", self.buffer, f"sequences are fewer than a batch's {rows}", "keep more")
        draw, phi = random.random(), float(self.phi)
        if draw < phi * (1.0 - progress) or (draw < phi and len(self.stored) < self.buffer):
            found = self.sampled(student, batch)
            for ids, mask, labels in zip(*(found[name] for name in _COLUMNS), strict=True):
                self.stored.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
            return found
        if draw < phi:
            ids, labels = zip(*random.sample(self.stored, rows), strict=True)
            return _padded(ids, labels, pad_of(student), batch["input_ids"].device)
        return self.fixed(batch)

    def on_evaluate(self, loss: float) -> None:
        if loss < float(self.best):
            self.best.fill_(loss)
        else:
            self.phi.copy_((self.phi + self.increase).clamp_max(1.0))


def prompts_of(batch: Mapping[str, Any], prompt_tokens: int | None = None) -> list[list[int]]:
    """Token ids of each row before its first labelled token.

    Raises:
        BadInput: a row begins with a labelled token and `prompt_tokens` is None.
    """
    rows = []
    for ids, mask, labels in zip(*(batch[name] for name in _COLUMNS), strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        labelled = (labels != IGNORED).nonzero()
        length = int(labelled[0]) if len(labelled) else len(ids)
        if length == 0:
            if prompt_tokens is None:
                raise BadInput(
                    "prompt_tokens", None, "is needed: rows have no prompt", "give a number of tokens"
                )
            length = min(prompt_tokens, len(ids))
        rows.append(ids[:length].tolist())
    return rows


def continuations(
    student: nn.Module,
    prompts: list[list[int]],
    device: torch.device,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> dict[str, Any]:
    """Sample continuations from the model's own distribution, batched, without dropout, and label them.

    Args:
        student: A causal language model.
        prompts: Token ids per row.
        device: Of the result.
        max_new_tokens: Longest continuation.
        temperature: Of the sampling.
        vocabulary: Only tokens below it are drawn; None for all.

    Returns:
        `input_ids`, `attention_mask`, `labels` `[B, T]`, padded on the right; the prompt is not labelled, the end of
        text is.
    """
    model: Any = student
    pad, stops = pad_of(model), ends_of(model)
    ids, mask = pad_batch(prompts, pad, side="left")
    processors = LogitsProcessorList([] if vocabulary is None else [_Below(vocabulary)])
    with torch.no_grad(), evaluating(model), plain_generation(model, pad=pad, ends=stops):
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=True, top_k=0, top_p=1.0,
            temperature=temperature, max_new_tokens=max_new_tokens, use_cache=True, logits_processor=processors,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
    return continued(prompts, out, stops, pad, device)


class _Below(LogitsProcessor):
    """Rules out the tokens from a number on."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, self.vocabulary :] = -math.inf
        return scores


def continued(
    prompts: list[list[int]], new: list[list[int]], stops: set[int], pad: int, device: torch.device
) -> dict[str, Any]:
    """Prompts and what was sampled after them as a batch, each cut after its first stop.

    Returns:
        As `continuations`.
    """
    rows, labels = [], []
    for prompt, tokens in zip(prompts, new, strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        rows.append(prompt + tokens[:end])
        labels.append([IGNORED] * len(prompt) + tokens[:end])
    return _padded(rows, labels, pad, device)


def _padded(
    rows: Sequence[list[int]], labels: Sequence[list[int]], pad: int, device: torch.device
) -> dict[str, Any]:
    ids, mask = pad_batch(rows, pad)
    made = zip(_COLUMNS, (ids, mask, pad_batch(labels, IGNORED)[0]), strict=True)
    return {name: value.to(device) for name, value in made}


def pad_of(model: Any) -> int:
    """The padding id of a model's generation, 0 if it names none."""
    found = model.generation_config.pad_token_id
    return int(found if found is not None else getattr(model.config, "pad_token_id", None) or 0)


def ends_of(model: Any) -> set[int]:
    """The ids that end a text."""
    ends = model.generation_config.eos_token_id
    ends = ends if ends is not None else getattr(model.config, "eos_token_id", None)
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}
