"""Time per token of several streams decoded in step, beside the sum of the same forward passes made alone.

The limit is one forward pass per stream and token at the same cache length, with nothing around it. Streams of
one model share a pass and may stay below the limit. Prompts are random tokens; what is timed is decoding, not the
reading of the prompts. Prints medians; `--json FILE` writes them too.

    python benchmarks/steer.py [--model smollm2-135m] [--tokens 32] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch

from transfuse.core.lineage import hardware, versions
from transfuse.core.lockstep import Combine, decode
from transfuse.core.models import load
from transfuse.core.streams import Stream
from transfuse.core.training import generator
from transfuse.steer.ck_plug import ck_plug_scores


def alone(stream: Stream, tokens: int) -> float:
    """Seconds per token of one stream: forward passes with a cache, and nothing else."""
    with torch.no_grad():
        model, ids, _ = stream
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        token = ids[:, -1:]
        start = time.perf_counter()
        for _ in range(tokens):
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return (time.perf_counter() - start) / tokens


def in_step(streams: list[Stream], combine: Combine, tokens: int) -> float:
    """Seconds per token of the streams decoded as one, after the first token."""
    times: list[float] = []
    decode(streams, combine, max_new_tokens=tokens + 1, on_tokens=lambda _: times.append(time.perf_counter()))
    return (times[-1] - times[0]) / tokens


def offset(logits: list[torch.Tensor]) -> torch.Tensor:
    """Base plus the difference of two others: three models, one combination."""
    base, expert, antiexpert = logits
    return base + expert - antiexpert


def measure(name: str, streams: list[Stream], combine: Combine, tokens: int, repeats: int) -> dict:
    limits, ours = [], []
    for _ in range(repeats + 1):  # the first round warms up
        limits.append(sum(alone(stream, tokens) for stream in streams))
        ours.append(in_step(streams, combine, tokens))
    limit, own = statistics.median(limits[1:]), statistics.median(ours[1:])
    lengths = [tuple(stream.input_ids.shape) for stream in streams]
    print(f"{name:<34} {1e3 * limit:>9.1f} {1e3 * own:>9.1f} {own / limit:>7.2f}   {lengths}")
    return {
        "case": name,
        "streams": lengths,
        "alone_ms": 1e3 * limit,
        "in_step_ms": 1e3 * own,
        "ratio": own / limit,
        "alone_ms_all": [1e3 * t for t in limits[1:]],
        "in_step_ms_all": [1e3 * t for t in ours[1:]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    model = load(options.model, device=options.device).model
    others = [copy.deepcopy(model) for _ in range(2)]
    vocabulary, source = model.config.get_text_config().vocab_size, generator(0)

    def prompt(rows: int, length: int) -> torch.Tensor:
        return torch.randint(10, vocabulary, (rows, length), generator=source).to(model.device)

    print(f"{'milliseconds per token':<34} {'alone':>9} {'in step':>9} {'ratio':>7}   prompts")
    figures = []
    for rows, context, query in ((1, 200, 16), (8, 200, 16), (1, 700, 16)):
        streams = [Stream(model, prompt(rows, context)), Stream(model, prompt(rows, query))]
        name = f"ck-plug, 2 streams, {rows} x {context}"
        figures.append(measure(name, streams, lambda z: ck_plug_scores(*z), options.tokens, options.repeats))
    streams = [Stream(m, prompt(1, 200)) for m in (model, *others)]
    figures.append(measure("3 models, 1 x 200", streams, offset, options.tokens, options.repeats))
    if options.json:
        record = {"model": options.model, "versions": versions(), "hardware": hardware(), "figures": figures}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
