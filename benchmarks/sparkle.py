"""What a large graph costs: time and bytes of its index, and of the constraint per generated token.

Synthetic graphs of 50 thousand to 5 million triples, four triples per entity, stream into the index. Then random
walks through the constraint generate queries, as beams would, and the time of "which tokens may follow" is taken
for every prefix: first cold (nothing remembered), then over the stream of further queries. The model beside it is
random, of the given width; its forward pass, with a cache, is what a token costs without a constraint. All times
are processor seconds.

    python benchmarks/sparkle.py [--triples 50000 500000 5000000] [--queries 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from transfuse.core.lineage import hardware, versions
from transfuse.core.training import generator, seeded
from transfuse.steer.sparkle import KGIndex, SparqlConstraint

SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]
RELATIONS = 500
PER_ENTITY = 4
URI = "http://kg/"


def name(number: int) -> str:
    """A word or two of syllables for a number, each number another."""
    parts = []
    while True:
        number, rest = divmod(number, len(SYLLABLES))
        parts.append(SYLLABLES[rest])
        if not number:
            break
    text = "".join(parts)
    return f"{text[:4]}_{text[4:]}" if len(text) > 6 else text


def triples(count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Four relations of each entity to others; a few relations are frequent, most are rare."""
    source = random.Random(seed)
    entities = max(2, count // PER_ENTITY)
    for i in range(count):
        relation = int(RELATIONS * source.random() ** 3)
        yield URI + name(i % entities), f"{URI}r/{name(relation)}", URI + name(source.randrange(entities))


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def model_step(width: int, vocabulary: int, rows: int) -> float:
    """Processor seconds of one cached forward pass of `rows` beams."""
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(10, vocabulary, (rows, 40), generator=generator(0))
    times = []
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        for _ in range(12):
            start = time.process_time()
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            times.append(time.process_time() - start)
    return statistics.median(times[2:])


def walks(constraint: SparqlConstraint, queries: int, seed: int) -> list[float]:
    """Processor seconds per prefix of random queries."""
    source, times = random.Random(seed), []
    for _ in range(queries):
        ids: list[int] = []
        while len(ids) < 60 and (not ids or ids[-1] != constraint.index.tokens.eos):
            start = time.process_time()
            found = constraint.after(ids)
            times.append(time.process_time() - start)
            ids.append(int(source.choice(found.tokens)))
    return times


def measure(count: int, tokenizer: PreTrainedTokenizerFast, queries: int, step: float, rows: int) -> dict:
    start = time.process_time()
    index = KGIndex.from_triples(triples(count), tokenizer)
    built = time.process_time() - start
    constraint = SparqlConstraint(index, grammar="strict", max_triples=3)
    cold = walks(constraint, 1, 0)
    warm = walks(constraint, queries, 1)
    scores = torch.randn(rows, index.tokens.size, generator=generator(0))
    processor, ids = constraint.processor(0), torch.tensor([[index.tokens.select]] * rows)
    spent = []
    for _ in range(30):
        begun = time.process_time()
        processor(ids, scores)
        spent.append(time.process_time() - begun)
    mask = statistics.median(spent)
    figures = {
        "triples": count,
        "entities": len(index.entities),
        "relations": len(index.relations),
        "build_s": built,
        "bytes": index.nbytes,
        "bytes_per_entity": index.nbytes / len(index.entities),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cold_max_ms": 1e3 * max(cold),
        "warm_mean_us": 1e6 * statistics.mean(warm),
        "warm_median_us": 1e6 * statistics.median(warm),
        "warm_max_ms": 1e3 * max(warm),
        "prefixes": len(warm),
        "mask_us_per_step": 1e6 * mask,
        "model_ms_per_step": 1e3 * step,
        "overhead": (rows * statistics.mean(warm) + mask) / step,
    }
    print(
        f"{count:>9} {figures['entities']:>9} {built:>8.1f} {index.nbytes / 2**20:>8.1f} "
        f"{figures['cold_max_ms']:>8.1f} {figures['warm_mean_us']:>8.0f} {figures['warm_median_us']:>8.0f} "
        f"{100 * figures['overhead']:>8.1f}%"
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--triples", type=int, nargs="+", default=[50_000, 500_000, 5_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512, help="of the model beside it")
    parser.add_argument("--rows", type=int, default=10, help="beams decoded together")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    tokenizer = tokenizer_of([name(i).replace("_", " ") for i in range(0, 200_000, 7)])
    step = model_step(options.width, len(tokenizer), options.rows)
    print("  triples  entities  build s      MiB  cold ms  mean us   median  of model")
    figures = [measure(n, tokenizer, options.queries, step, options.rows) for n in options.triples]
    ratio = figures[-1]["warm_mean_us"] / figures[0]["warm_mean_us"]
    print(f"per token, largest against smallest graph: {ratio:.2f}")
    if options.json:
        record = {"versions": versions(), "hardware": hardware(), "figures": figures, "ratio": ratio}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
