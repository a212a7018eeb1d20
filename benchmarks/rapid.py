"""Tokens per second of RAPID beside plain decoding and transformers' assisted generation, by length of the context.

All three answer the same question from the same text, greedily, with the same model: plain; assisted by a second
copy that drafts from the whole context; and RAPID, whose drafter reads about a thousand retrieved tokens. What is
timed is decoding after the first tokens; the reading of the prompts is listed beside it. RAPID runs at eta = 0 (the
plain answer) and at eta = 10. Beyond the model's positions its RoPE is stretched (YaRN), which changes what it says,
not what a token costs. Prints medians; `--json FILE` writes all figures.

    python benchmarks/rapid.py [--model smollm2-135m] [--lengths 4096 8000 16384] [--tokens 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from transfuse.core.lineage import hardware, versions
from transfuse.core.models import Loaded, load
from transfuse.steer.rapid import RAPID, ChunkRetriever, round_flops

QUESTION = "What does the manual say about the access code of the observatory? Explain at length."
DRAFTS = 10  # per round
FACT = "The access code of the observatory is 7341, and it is changed on the first day of each month."


class Clock(BaseStreamer):
    """Notes when tokens arrive. `generate` puts the prompt first, then a token or a round of tokens."""

    def __init__(self, skip: int):
        self.skip, self.arrivals, self.started = skip, [], time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self.skip:
            self.skip -= 1
        else:
            self.arrivals.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        pass

    def figures(self) -> dict[str, float]:
        """Seconds to the first tokens, tokens per second after them, and arrivals per token."""
        first, last = self.arrivals[0][0], self.arrivals[-1][0]
        tokens = sum(count for _, count in self.arrivals[1:])
        return {
            "first_seconds": first - self.started,
            "tokens_per_second": tokens / max(last - first, 1e-9),
            "passes_per_token": len(self.arrivals) / (tokens + self.arrivals[0][1]),
        }


def loaded(name: str, positions: int, device: str) -> tuple[Loaded, str]:
    """The model with room for `positions`, and what was done to its RoPE."""
    plain = load(name, device=device)
    config = plain.model.config
    limit = config.max_position_embeddings
    if positions <= limit:
        return plain, "as trained"
    factor = float(-(-positions // limit))
    stretched = {**config.rope_parameters, "rope_type": "yarn", "factor": factor}
    stretched["original_max_position_embeddings"] = limit
    room = {"max_position_embeddings": int(limit * factor), "rope_parameters": stretched}
    return load(name, device=device, **room), f"YaRN x {factor:g}"


def document(tokenizer: Any, length: int) -> str:
    """English prose of `length` tokens with the fact in its middle."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    half = length // 2
    return f"{tokenizer.decode(ids[:half])}\n\n{FACT}\n\n{tokenizer.decode(ids[half:length])}"


def measured(repeats: int, once: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Medians over the repeats, and every repeat's figures."""
    runs = [once() for _ in range(repeats)]
    return {**{key: statistics.median(run[key] for run in runs) for key in runs[0]}, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8000, 16384])
    parser.add_argument("--retrieved", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    # No threshold, so that the drafter's context is filled: only the chunk with the answer would pass it.
    retriever = ChunkRetriever(chunk_tokens=256, threshold=-1.0, max_tokens=options.retrieved)
    figures = []
    print(
        f"{'context':>8} {'method':<14} {'tokens/s':>9} {'speed-up':>9} {'accepted':>9} {'passes':>7} {'model':>6}"
        f" {'first s':>8}"
    )
    for length in options.lengths:
        (model, tokenizer), rope = loaded(options.model, length + options.tokens + 128, options.device)
        assistant = copy.deepcopy(model)
        assistant.generation_config.update(
            num_assistant_tokens=DRAFTS,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        text = document(tokenizer, length)
        start = time.perf_counter()
        short = retriever(QUESTION, text, tokenizer)
        retrieval = time.perf_counter() - start
        ids = torch.tensor([tokenizer(f"{text}\n\n{QUESTION}")["input_ids"]], device=model.device)
        shared = {"max_new_tokens": options.tokens, "eos_token_id": None, "do_sample": False}
        size = sum(p.numel() for p in model.parameters())

        def transformers_own(
            model: Any = model, ids: torch.Tensor = ids, shared: dict = shared, **more: Any
        ) -> dict[str, float]:
            clock = Clock(skip=1)
            model.generate(
                ids, attention_mask=torch.ones_like(ids), streamer=clock, pad_token_id=0, **shared, **more
            )
            found = clock.figures()
            if "assistant_model" in more:  # a round yields what was accepted and one token
                found["acceptance"] = (1 / found["passes_per_token"] - 1) / DRAFTS
            return found

        def rapid(
            eta: float, model: Any = model, tokenizer: Any = tokenizer, text: str = text, short: str = short,
            shared: dict = shared, size: int = size,
        ) -> dict[str, float]:  # fmt: skip
            clock = Clock(skip=0)
            method = RAPID(model, tokenizer, retriever=lambda *_: short, gamma=DRAFTS, eta=eta)
            answer = method.generate(QUESTION, text, details=True, on_tokens=clock.put, **shared)
            whole, part = answer.prompt_tokens
            cost = round_flops(size, size, whole, part, acceptance=1 / answer.passes_per_token)
            return {
                **clock.figures(),
                "acceptance": answer.acceptance,
                "cost_model_speed_up": round_flops(size, 0, whole, 0, gamma=0) / cost,
                "prompt_tokens": whole,
                "drafter_tokens": part,
            }

        with torch.no_grad():
            arms = {
                "plain": measured(options.repeats, transformers_own),
                "assisted": measured(
                    options.repeats, lambda run=transformers_own, other=assistant: run(assistant_model=other)
                ),
                "rapid, eta 0": measured(options.repeats, lambda run=rapid: run(0.0)),
                "rapid, eta 10": measured(options.repeats, lambda run=rapid: run(10.0)),
            }
        for method, found in arms.items():
            found["speed_up"] = found["tokens_per_second"] / arms["plain"]["tokens_per_second"]
            shown = [
                f"{found[key]:.2f}" if key in found else "-"
                for key in ("acceptance", "passes_per_token", "cost_model_speed_up")
            ]
            print(
                f"{length:>8} {method:<14} {found['tokens_per_second']:>9.2f} {found['speed_up']:>9.2f} {shown[0]:>9} "
                f"{shown[1]:>7} {shown[2]:>6} {found['first_seconds']:>8.1f}"
            )
            figures.append(
                {"context": length, "method": method, "rope": rope, "retrieval_seconds": retrieval, **found}
            )
        print(f"{'':>8} retrieval {retrieval:.1f} s; RoPE {rope}")
    if options.json:
        record = {"model": options.model, "versions": versions(), "hardware": hardware(), "figures": figures}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
