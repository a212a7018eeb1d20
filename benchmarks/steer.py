"""Time and memory of several streams decoded in step, beside the parts they are made of.

Time: the limit is one forward pass per stream and token at the same cache length, with nothing around it. Streams of
one model share a pass and may stay below the limit. Prompts are random tokens; what is timed is decoding, not the
reading of the prompts. Medians over the repeats, in which limit and decoder take turns.

Memory: the most bytes that tensors held at one time beyond the weights, found by watching every operation, beside
what the streams' caches hold in the end. Beams: time and memory beside transformers' own search on one stream.

    python benchmarks/steer.py [--model smollm2-135m] [--tokens 32] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessorList, PreTrainedModel

from transfuse.core.lineage import hardware, versions
from transfuse.core.lockstep import Combine, decode, decode_prepared
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


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live.

    Attributes:
        peak: The most bytes at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                key, size = self._key(tensor), tensor.untyped_storage().nbytes()
                if key in self._owners:
                    self._owners[key] += 1
                elif key in known:
                    continue  # a view of something that was there before
                else:
                    self._owners[key] = 1
                    self._now += size
                weakref.finalize(tensor, self._freed, key, size)
        self.peak = max(self.peak, self._now)
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _freed(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self._now -= size


def held(run: Callable[[], Any]) -> int:
    """The most bytes at one time of what a run makes."""
    with Held() as mode:
        run()
    return mode.peak


def cache_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    """What keys and values of so many tokens take."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * length * heads * width * model.dtype.itemsize


def paired(first: Callable[[], float], second: Callable[[], float], repeats: int) -> tuple[list, list]:
    """Two measurements in turns; the first round warms up."""
    rounds = [(first(), second()) for _ in range(repeats + 1)][1:]
    return [a for a, _ in rounds], [b for _, b in rounds]


def measure(name: str, streams: list[Stream], combine: Combine, tokens: int, repeats: int) -> dict:
    limits, ours = paired(
        lambda: sum(alone(stream, tokens) for stream in streams),
        lambda: in_step(streams, combine, tokens),
        repeats,
    )
    limit, own = statistics.median(limits), statistics.median(ours)
    caches = sum(cache_bytes(s.model, len(s.input_ids), s.input_ids.shape[1] + tokens) for s in streams)
    peak = held(lambda: decode(streams, combine, max_new_tokens=tokens + 1))
    models = {id(s.model): s.model for s in streams}.values()
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    lengths = [tuple(stream.input_ids.shape) for stream in streams]
    print(
        f"{name:<32} {1e3 * limit:>9.1f} {1e3 * own:>9.1f} {own / limit:>7.3f} {caches / 2**20:>9.1f} "
        f"{peak / 2**20:>9.1f} {(weights + peak) / (weights + caches):>7.3f}   {lengths}"
    )
    return {
        "case": name,
        "streams": lengths,
        "alone_ms": 1e3 * limit,
        "in_step_ms": 1e3 * own,
        "ratio": own / limit,
        "alone_ms_all": [1e3 * t for t in limits],
        "in_step_ms_all": [1e3 * t for t in ours],
        "weights_bytes": weights,
        "caches_bytes": caches,
        "peak_bytes_beyond_weights": peak,
        "memory_ratio": (weights + peak) / (weights + caches),
    }


def beams(model: PreTrainedModel, ids: torch.Tensor, size: int, tokens: int, repeats: int) -> dict:
    """Beam search of one stream: transformers' own, and ours through the same `generate`."""

    def custom(model: Any, input_ids: Any, processors: Any, criteria: Any, config: Any, **kwargs: Any) -> Any:
        return decode_prepared(
            [Stream(model, input_ids)], lambda z: z[0], processors, criteria, config, kwargs
        )

    def prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return custom(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def search(**how: Any) -> tuple[float, torch.Tensor]:
        times: list[float] = []

        def stamp(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())
            return scores

        texts = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=size, do_sample=False, pad_token_id=0,
            min_new_tokens=tokens + 1, max_new_tokens=tokens + 1, repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([stamp]), **how,
        )  # fmt: skip
        return (times[-1] - times[0]) / tokens, texts

    theirs, ours = paired(lambda: search()[0], lambda: search(custom_generate=prepared)[0], repeats)
    equal = torch.equal(search()[1], search(custom_generate=prepared)[1])
    peaks = held(lambda: search()), held(lambda: search(custom_generate=prepared))
    limit, own = statistics.median(theirs), statistics.median(ours)
    print(
        f"{f'{size} beams, {len(ids)} x {ids.shape[1]}':<32} {1e3 * limit:>9.1f} {1e3 * own:>9.1f} "
        f"{own / limit:>7.3f} {peaks[0] / 2**20:>9.1f} {peaks[1] / 2**20:>9.1f} {peaks[1] / peaks[0]:>7.3f}   "
        f"{'the same texts' if equal else 'other texts'}"
    )
    return {
        "case": f"{size} beams",
        "prompts": tuple(ids.shape),
        "transformers_ms": 1e3 * limit,
        "ours_ms": 1e3 * own,
        "ratio": own / limit,
        "transformers_ms_all": [1e3 * t for t in theirs],
        "ours_ms_all": [1e3 * t for t in ours],
        "peak_bytes_beyond_weights": {"transformers": peaks[0], "ours": peaks[1]},
        "same_texts": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="measure cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    model = load(options.model, device=options.device).model
    others = [copy.deepcopy(model) for _ in range(2)]
    vocabulary, source = model.config.get_text_config().vocab_size, generator(0)

    def prompt(rows: int, length: int) -> torch.Tensor:
        return torch.randint(10, vocabulary, (rows, length), generator=source).to(model.device)

    cases: list[tuple[str, list[Stream], Combine]] = []
    for rows, context, query in ((1, 200, 16), (8, 200, 16), (1, 700, 16)):
        streams = [Stream(model, prompt(rows, context)), Stream(model, prompt(rows, query))]
        cases.append((f"ck-plug, 2 streams, {rows} x {context}", streams, lambda z: ck_plug_scores(*z)))
    for rows in (1, 4):
        streams = [Stream(m, prompt(rows, 200)) for m in (model, *others)]
        cases.append((f"3 models, {rows} x 200", streams, offset))
    searches = [prompt(1, 200), prompt(4, 200)]

    print(f"{'ms per token, MiB past weights':<32} {'alone':>9} {'in step':>9} {'ratio':>7} "
          f"{'caches':>9} {'peak':>9} {'ratio':>7}   prompts")  # fmt: skip
    figures = [
        measure(name, streams, combine, options.tokens, options.repeats)
        for name, streams, combine in cases
        if options.only in name
    ]
    print(f"{'':<32} {'transf.':>9} {'ours':>9} {'ratio':>7} {'transf.':>9} {'ours':>9} {'ratio':>7}")
    for ids in searches:
        if options.only in "beams":
            figures.append(beams(model, ids, 4, options.tokens, options.repeats))
    if options.json:
        record = {"model": options.model, "versions": versions(), "hardware": hardware(), "figures": figures}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
