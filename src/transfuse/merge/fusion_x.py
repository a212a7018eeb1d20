"""FusionX: several language models teach one; a small network decides per text whom to hear and how much.

:arxiv: 2505.23844
:moves: next-token distributions of several models -> one model's weights
:access: logits, weights, training data
:reversible: no
:context: no

The target is trained further on texts and, on each, on a weighted mean of what N sources say about it. The sources are
run over the texts once, beforehand; the target's own original distribution is one of them by default.

    r_i = exp(-CE_i)                                          reward, CE_i the source's mean cross-entropy on the text
    g   = softmax(W3 GELU(W2 GELU(W1 r)))                     the selection network
    A   = {i : g_i > tau}, or the best one if it is empty
    w_i = g_i 1[i in A] / (sum_A g + 1e-8)
    T   = sum_i w_i T_i                                       the fused next-token distribution
    L   = lambda CLM + (1 - lambda) CE(T, p) + beta CV^2(I)   I_i = sum of w_i over the batch

The network has the target's optimiser and is thrown away at the end; gradients pass w and not the choice of A. The
feedback CV^2 = Var(I) / mean(I)^2 (unbiased; 0 for one source) keeps it from settling on one source.

Where paper and code differ the paper is followed: the released code draws the network anew in every loss call and never
trains it, so that its threshold acts on noise; `mode="random-gate"` does that. The code leaves padding out but not a
text's last position, about which the labels say nothing; here it is left out. The network has biases, as in the code,
and starts near equal weights, which is ours. Over a batch of one text the feedback pulls every text to equal weights:
`importance="update"` sums over all micro-batches of an update, "ema" over a running mean.

Sources are stored as their k likeliest tokens. What these lack to 1 is spread evenly over the others (`rest="spread"`),
so that each is a distribution over the whole vocabulary; the code drops it and renormalises (`"renormalise"`). A source
with another tokenizer reads the text in its own tokens and is brought back by `align_distributions`: byte for byte, or
by FuseLLM's time warping (`alignment="edit"`). Where no place fits, the row is one-hot on the token that follows; the
code names the token before it (`fallback="current"` of `align_distributions`).

    >>> from transfuse.merge.fusion_x import FusionX
    >>> fusion = FusionX(model, sources=["smollm2-135m", "gemma3-270m"], max_steps=500)   # doctest: +SKIP
    >>> fusion.fit("texts.jsonl", tokenizer)                                              # doctest: +SKIP
    >>> fusion.save_pretrained("fused", tokenizer)                                        # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import TrainingArguments

from ..core.batches import IGNORED, data_identity, text_split
from ..core.checkpoints import load_checkpoint
from ..core.errors import BadInput, NotApplicable
from ..core.files import atomic_dir, check_writable
from ..core.lineage import amend_lineage, input_hash, jsonable, write_lineage
from ..core.models import check_spec, fingerprint, load
from ..core.runs import check_number, check_positive, open_run, training_mode
from ..core.training import seeded
from ..core.workshop import tell
from ._checks import check_choice
from ._fusion import (
    Distributions,
    FusionLossOutput,
    Importance,
    Loss,
    Mode,
    MultiTeacherFusion,
    Rest,
    SelectionGate,
    cv_squared,
)
from ._fusion_align import AlignedTopK, Alignment, VocabularyMap, align_distributions
from ._fusion_store import SourceStore, gathered, rows_of
from ._fusion_trainer import FusionTrainer

__all__ = [
    "AlignedTopK",
    "Distributions",
    "FusionLossOutput",
    "FusionTrainer",
    "FusionX",
    "MultiTeacherFusion",
    "SelectionGate",
    "SourceStore",
    "VocabularyMap",
    "align_distributions",
    "cv_squared",
    "gathered",
]

Schedule = Literal["constant", "linear", "cosine"]


class FusionX:
    """Train a target in place under several sources.

    Args:
        target: The model that learns.
        sources: Models, folders or names; a model with a tokenizer of its own as `{"model": ..., "tokenizer": ...}`.
            Named ones are loaded one at a time.
        include_target: Count the target's own original distribution as the first source.
        mode: How sources are weighted, see `MultiTeacherFusion`.
        threshold: tau; below 1 / N, or the selection network does not learn (a warning says so).
        feedback_weight: beta.
        lm_weight: lambda.
        loss: "ce" or "kl".
        importance: Over what the feedback sums: "batch", "update" or "ema".
        top_k: Entries kept per token of a source.
        rest: What becomes of the probability beyond them.
        temperature: Divides the sources' logits.
        alignment: How places of another tokenizer are matched.
        block: Tokens per row of plain text.
        lr: Peak learning rate of AdamW (beta 0.9, 0.99).
        gate_lr: That of the selection network; None for the same.
        epochs: Passes over the rows.
        max_steps: Updates to make, in place of `epochs`.
        batch_size: Rows per batch and process.
        accumulation: Batches per update.
        schedule: Learning rate after warm-up.
        warmup: Updates of linear warm-up; below 1, a share of all.
        weight_decay: Decoupled.
        clip: Largest norm of the gradient; None for no clipping.
        save_every: Updates between checkpoints; None writes one at the end only.
        seed: Of the selection network, the data order and dropout.

    Attributes:
        report: After `fit`: losses, figures of each update (see `FusionTrainer`), perplexity before and after where
            rows were held out, and per source its mean cross-entropy and the share of tokens that could be aligned.
    """

    reads: ClassVar[tuple[str, ...]] = ("texts",)

    def __init__(
        self,
        target: nn.Module,
        *,
        sources: Sequence[str | os.PathLike[str] | nn.Module | Mapping[str, Any]] = (),
        include_target: bool = True,
        mode: Mode = "gate",
        threshold: float = 0.15,
        feedback_weight: float = 0.5,
        lm_weight: float = 0.9,
        loss: Loss = "ce",
        importance: Importance = "batch",
        top_k: int = 64,
        rest: Rest = "spread",
        temperature: float = 1.0,
        alignment: Alignment = "bytes",
        block: int = 2048,
        lr: float = 1e-5,
        gate_lr: float | None = None,
        epochs: int = 1,
        max_steps: int | None = None,
        batch_size: int = 2,
        accumulation: int = 16,
        schedule: Schedule = "cosine",
        warmup: float = 0.008,
        weight_decay: float = 0.01,
        clip: float | None = 1.0,
        save_every: int | None = 100,
        seed: int = 42,
    ):
        self.target, self.sources, self.include_target = target, sources, include_target
        self.mode, self.threshold, self.loss, self.importance = mode, threshold, loss, importance
        self.feedback_weight, self.lm_weight = feedback_weight, lm_weight
        self.top_k, self.rest, self.temperature, self.alignment = top_k, rest, temperature, alignment
        self.block, self.lr, self.gate_lr, self.epochs, self.max_steps = block, lr, gate_lr, epochs, max_steps
        self.batch_size, self.accumulation, self.schedule = batch_size, accumulation, schedule
        self.warmup, self.weight_decay, self.clip = warmup, weight_decay, clip
        self.save_every, self.seed = save_every, seed
        self.report: dict[str, Any] = {}
        self._check_values()

    def fit(
        self,
        texts: str | os.PathLike[str] | Sequence[Any],
        tokenizer: Any,
        *,
        held_out: Sequence[Mapping[str, Any]] = (),
        scratch: Path | None = None,
        seed: int | None = None,
    ) -> nn.Module:
        """Run the sources over the texts, then train.

        Args:
            texts: A file, as `core.batches.text_rows` reads it; texts; or rows with `input_ids` and `labels`.
            tokenizer: The target's.
            held_out: Rows whose perplexity is measured before and after.
            scratch: Folder of what the sources said and of checkpoints, from which an interrupted run goes on.
            seed: In place of the argument `seed`.

        Returns:
            The target.

        Raises:
            BadInput: no source, an argument out of range, texts of another form, `held_out` without a label; a
                checkpoint of another run.
            TrainingDiverged: the loss became NaN or infinite.
        """
        seed = self.seed if seed is None else seed
        with seeded(seed):
            fusion = self._loss()
        self._check()
        rows = rows_of(texts, tokenizer, self.block)
        if held_out and not any(label != IGNORED for row in held_out for label in row["labels"][1:]):
            raise BadInput("held_out", len(held_out), "rows have no label", "give rows with labels, or none")
        identity = {"fusion-x": self._arguments(), "seed": seed, "data": data_identity(rows)}
        folder, last = open_run(scratch, identity, True)
        with contextlib.ExitStack() as stack:
            place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="transfuse-")))
            stores = self._captured(rows, tokenizer, place / "sources")
            stack.enter_context(seeded(seed))
            stack.enter_context(training_mode(self.target))
            trainer = FusionTrainer(
                model=self.target, fusion=fusion, sources=stores, train_dataset=rows, eval_dataset=list(held_out),
                args=self._training_arguments(place, folder is not None, seed), processing_class=tokenizer,
                gate_lr=self.gate_lr, rest=self.rest, identity=identity,
            )  # fmt: skip
            perplexity = {}
            if held_out:
                perplexity["before"] = math.exp(trainer.evaluate()["eval_loss"])
            if last is not None and load_checkpoint(last).get("finished"):
                trainer.resume_weights(last)
            else:
                trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
                if folder is not None:
                    trainer.save_state(folder, finished=True)
            if held_out:
                perplexity["after"] = math.exp(trainer.evaluate()["eval_loss"])
            self.target.zero_grad(set_to_none=True)
        heard = [{"cross_entropy": float(s.ce.mean()), "aligned": s.aligned} for s in stores]
        self.report = {
            "losses": trainer.losses, "figures": trainer.figures, "perplexity": perplexity, "sources": heard,
        }  # fmt: skip
        return self.target

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
        """Write the target, its tokenizer and its lineage into a folder that `from_pretrained` loads; all at once."""
        model: Any = self.target
        path = check_writable(folder)
        losses = self.report.get("losses") or [math.nan]
        last = (self.report.get("figures") or [{}])[-1]
        perplexity = {f"perplexity_{k}": v for k, v in self.report.get("perplexity", {}).items()}
        with atomic_dir(path) as work:
            model.save_pretrained(work)
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
            write_lineage(
                work,
                method="fusion-x",
                arguments=self._arguments(),
                measurements={
                    **perplexity, "first_loss": losses[0], "last_loss": losses[-1], "updates": len(losses), **last,
                    "sources": self.report.get("sources", []),
                },
                summary=f"Trained under {self._count()} sources, fused anew for every text.",
                usage='model = AutoModelForCausalLM.from_pretrained("this folder")',
            )  # fmt: skip
        return path

    def transfer(
        self,
        tokenizer: Any,
        *,
        output: str | os.PathLike[str],
        scratch: Path | None,
        seed: int,
        **inputs: Any,
    ) -> Path:
        """What `transfuse run` does: hold out a twentieth of the rows of `texts`, train on the others, and save.

        Args:
            tokenizer: The target's.
            output: Folder of the result.
            scratch: Folder of the stored sources and checkpoints.
            seed: Of the run.
            **inputs: `texts`: a file of plain text, of records with `text`, or with `prompt` and `target`.
        """
        rows, kept = text_split(tokenizer, Path(inputs["texts"]), None, self.block, 200)
        self.fit(rows, tokenizer, held_out=kept, scratch=scratch, seed=seed)
        before, after = (self.report["perplexity"][name] for name in ("before", "after"))
        tell(f"held-out perplexity {before:.2f} -> {after:.2f} after {len(self.report['losses'])} updates")
        target = self.save_pretrained(output, tokenizer)
        given = {"texts": str(inputs["texts"])}
        hashes = {"texts": input_hash(inputs["texts"])}
        for i, source in enumerate(self.sources):
            if isinstance(source, (str, os.PathLike)):
                given[f"sources[{i}]"], hashes[f"sources[{i}]"] = str(source), fingerprint(source)
        amend_lineage(target, seed=seed, inputs=given, input_sha256=hashes)
        return target

    # --- parts ---------------------------------------------------------------------------------------------

    def _count(self) -> int:
        return len(self.sources) + self.include_target

    def _loss(self) -> MultiTeacherFusion:
        if not self.sources:
            raise BadInput("sources", list(self.sources), "are none", "name at least one model to learn from")
        return MultiTeacherFusion(
            self._count(), self.threshold, self.feedback_weight, self.lm_weight, loss=self.loss, mode=self.mode,
            importance=self.importance,
        )  # fmt: skip

    def _check_values(self) -> None:
        check_choice("rest", self.rest, Rest)
        check_choice("alignment", self.alignment, Alignment)
        check_choice("schedule", self.schedule, Schedule)
        check_number("temperature", self.temperature, remedy="give 1 for the sources' own")
        check_number("lr", self.lr, remedy="give a positive learning rate")
        check_number("warmup", self.warmup, zero=True, remedy="give updates, or a share below 1")
        check_number("weight_decay", self.weight_decay, zero=True, remedy="give 0 for none")
        if self.clip is not None:
            check_number("clip", self.clip, zero=True, remedy="give None for no clipping")

    def _check(self) -> None:
        """What can be refused before any model is run."""
        check_positive(
            epochs=self.epochs, max_steps=self.max_steps, batch_size=self.batch_size, top_k=self.top_k,
            accumulation=self.accumulation, save_every=self.save_every, block=self.block,
        )  # fmt: skip
        if not hasattr(self.target, "save_pretrained"):
            kind = type(self.target).__name__
            raise NotApplicable("target", kind, "is no model of transformers", "use FusionTrainer")
        for i, source in enumerate(self.sources):
            if isinstance(source, (str, os.PathLike)):
                check_spec(source)
            elif isinstance(source, Mapping):
                if set(source) != {"model", "tokenizer"}:
                    remedy = 'give {"model": ..., "tokenizer": ...}'
                    raise BadInput(f"sources[{i}]", sorted(source), "are other keys", remedy)
            elif not isinstance(source, nn.Module):
                raise BadInput(
                    f"sources[{i}]", type(source).__name__, "is no model", "give a model or its name"
                )
            if source is self.target:
                remedy = "leave it out: include_target counts it"
                raise BadInput(f"sources[{i}]", "the target", "is trained and cannot stay as it is", remedy)

    def _captured(self, rows: list[Any], tokenizer: Any, place: Path) -> list[SourceStore]:
        """What each source says; at most one that was named is in memory at a time."""
        target: Any = self.target
        every: list[Any] = [*([self.target] if self.include_target else []), *self.sources]
        found = []
        for i, source in enumerate(every):
            model, theirs = source, None
            if isinstance(source, (str, os.PathLike)):
                dtype = str(target.dtype).removeprefix("torch.")
                model, theirs = load(source, device=str(target.device), dtype=dtype)
            elif isinstance(source, Mapping):
                model, theirs = source["model"], source["tokenizer"]
            store = SourceStore.capture(
                model, rows, place / str(i), vocabulary=int(target.config.get_text_config().vocab_size),
                tokenizer=theirs, target_tokenizer=tokenizer, k=self.top_k, temperature=self.temperature,
                alignment=self.alignment, batch_size=self.batch_size,
            )  # fmt: skip
            found.append(store)
        return found

    def _training_arguments(self, place: Path, kept: bool, seed: int) -> TrainingArguments:
        on_cpu = next(self.target.parameters()).device.type == "cpu"
        return TrainingArguments(
            output_dir=str(place),
            learning_rate=self.lr,
            adam_beta2=0.99,
            lr_scheduler_type=self.schedule,
            warmup_steps=self.warmup,
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            weight_decay=self.weight_decay,
            max_grad_norm=self.clip or 0.0,
            seed=seed,
            save_strategy="steps" if kept and self.save_every else "no",
            save_steps=self.save_every or 500,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
        )

    def _arguments(self) -> dict[str, Any]:
        names = (
            "include_target", "mode", "threshold", "feedback_weight", "lm_weight", "loss", "importance", "top_k",
            "rest", "temperature", "alignment", "block", "lr", "gate_lr", "epochs", "max_steps", "batch_size",
            "accumulation", "schedule", "warmup", "weight_decay", "clip", "seed",
        )  # fmt: skip
        named = [str(s) if isinstance(s, (str, os.PathLike)) else type(s).__name__ for s in self.sources]
        return jsonable({"sources": named, **{name: getattr(self, name) for name in names}})
