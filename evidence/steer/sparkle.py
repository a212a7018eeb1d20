"""sparkle: do queries fail less, and answer more, when the graph says what may be written?"""

from __future__ import annotations

import json
import random
import re
import warnings
from typing import Any
from urllib.parse import quote

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from transfuse.core.datasets import dataset_path
from transfuse.core.extras import require
from transfuse.core.models import load
from transfuse.core.training import fit, seeded
from transfuse.steer.sparkle import RDF_TYPE, KGIndex, Sparkle, execute, extend, linearise, score, to_sparql

ox: Any = require("pyoxigraph", extra="graph")

SLUG = "sparkle"
CLAIM = (
    "Constraining beam search by the names and links of the graph makes far fewer queries inexecutable, gives the "
    "best F1 on SimpleQuestions-Wiki and the best on LC-QuAD 1.0 among systems without gold entities (others there: "
    "51 to 54), and works with a graph that is another one than in training."
)
RULE = {
    "quick": (
        "full.inexecutable == 0 in 3/3 seeds; full.invalid <= 0.02 in 3/3 seeds; "
        "none.inexecutable + none.invalid >= 0.5 in 3/3 seeds; full.accuracy >= none.accuracy + 0.05 in 3/3 seeds; "
        "mean(full.accuracy) >= mean(none.accuracy) + 0.4"
    ),
    "full": (
        "full.inexecutable + full.invalid <= 0.5 * (none.inexecutable + none.invalid); full.f1 >= none.f1 + 0.05"
    ),
}
SEEDS = {"quick": 3, "full": 1}
NOTES = (
    "Quick: training on 30 graphs drawn over the 106 names the test does not use; rate, batch and steps were set "
    "before the first run and kept; after figures of seeds 10 to 12, which passed, graphs went from 91 to 30 to save "
    "time. All names are copied rightly, so failures are empty answers from a wrong relation, and no arm writes "
    "inexecutable queries. Full: one seed; 199 test questions, since the one question with an empty answer list is "
    "left out. Gold answers are those of the gold query on the graph made from the queries (an answer in place of "
    "?uri, a node of its own in place of ?x, at most 10 nodes per count). Relations of DBpedia's infoboxes carry the "
    "word infobox, since they share their names with those of the ontology. Training is one pass over 800 pairs (100 "
    "steps of 8), what a processor core does in some minutes. Looked at before: seed 10 on 8 questions after 8 steps "
    "(all F1 0; then 100 steps in place of 200 and at most 72 new tokens in place of 90, to save time) and seed 10 on "
    "16 questions after 100 steps (F1 0.06 none, 0.06 syntax, 0.12 tries, 0.46 full); no rate, prompt or length was "
    "changed after that. A query that does not end within 72 tokens counts as inexecutable."
)

MODES = {"none": "none", "syntax": "syntax", "tries": "retrieval", "full": "full"}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    return synthetic(seed) if tier == "quick" else lcquad(seed)


def compare(
    sparkle: Sparkle, questions: list[str], gold: list[Any], **decoding: Any
) -> dict[str, dict[str, float]]:
    """Metrics of the four modes on the same questions."""
    figures = {}
    for arm, mode in MODES.items():
        one = Sparkle(
            sparkle.model, sparkle.tokenizer, sparkle.index, sparkle.store,
            beams=sparkle.beams, mode=mode, prompt=sparkle.prompt,
        )  # fmt: skip
        results = one.answer(questions, **decoding)
        found = score(results, [[answers] for answers in gold])
        figures[arm] = {
            "inexecutable": found.inexecutable,
            "invalid": found.invalid,
            "accuracy": found.exact_match,
            "f1": found.f1,
            "hits_at_1": found.hits_at_1,
            "questions": float(found.questions),
            "fallbacks": float(one.constraint.fallbacks if one.constraint else 0),
        }
    return figures


# --- a graph of names the model has never seen ---------------------------------------------------------------

FIRST = (
    "amber", "birch", "coral", "delta", "ember", "frost", "grove", "haven", "ivory", "jade", "khaki", "lunar",
    "maple", "noble",
)  # fmt: skip
SECOND = (
    "falcon", "garden", "harbor", "island", "jungle", "kernel", "ladder", "meadow", "needle", "orchid", "palace",
    "quarry", "ribbon", "saddle",
)  # fmt: skip
ASKED = ["author", "place"]  # the same words for all types; which relation they mean depends on the type
TYPES, ENTITIES, TEST = 5, 90, 60
GRAPHS, STEPS, BATCH, RATE = 30, 600, 32, 2e-3
URI = "http://example.org/"


def query(name: str, relation: int) -> str:
    return f"SELECT DISTINCT ?uri WHERE {{ <{URI}{name.replace(' ', '_')}> <{URI}r{relation}> ?uri }}"


def draw(names: list[str], source: random.Random) -> tuple[list[Any], list[tuple[str, str]]]:
    """A graph over names and its questions: type t has relations 2t and 2t + 1."""
    triples, asked = [], []
    for name in names:
        kind = source.randrange(TYPES)
        for j, words in enumerate(ASKED):
            other = source.choice(names)
            triples.append(
                (URI + name.replace(" ", "_"), f"{URI}r{2 * kind + j}", URI + other.replace(" ", "_"))
            )
            asked.append((f"{words} of {name}", query(name, 2 * kind + j)))
    return triples, asked


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "of", *ASKED, *FIRST, *SECOND, *(f"r{i}" for i in range(2 * TYPES))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def synthetic(seed: int) -> dict[str, dict[str, float]]:
    """A tiny Llama learns on graphs over one part of the names and is asked about a graph over the others."""
    source = random.Random(seed)
    names = [f"{a} {b}" for a in FIRST for b in SECOND]
    source.shuffle(names)
    held, seen = names[:ENTITIES], names[ENTITIES:]
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        extend(model, tokenizer, ["uri"])
    rows: list[Any] = []
    for _ in range(GRAPHS):
        triples, asked = draw(seen, source)
        train = KGIndex.from_triples(triples, tokenizer, variables=["uri"])
        rows += Sparkle(model, tokenizer, train).examples(asked)
    fit(model, rows, lr=RATE, max_steps=STEPS, batch_size=BATCH, warmup=0.05, seed=seed)
    triples, asked = draw(held, source)
    store = ox.Store()
    store.extend(ox.Quad(*map(ox.NamedNode, triple)) for triple in triples)
    index = KGIndex.from_store(store, tokenizer, variables=["uri"])
    chosen = source.sample(asked, TEST)
    gold = [execute(store, sparql) for _, sparql in chosen]
    sparkle = Sparkle(model, tokenizer, index, store, beams=1)
    return compare(sparkle, [question for question, _ in chosen], gold, max_new_tokens=20, batch_size=TEST)


# --- LC-QuAD 1 ------------------------------------------------------------------------------------------------

TRAIN, HELD, BEAMS = 800, 200, 4
RANK, LORA_STEPS, LORA_BATCH, LORA_RATE = 16, 100, 8, 1e-3
COUNTED = 10  # a COUNT question gets at most so many nodes to count
_TRIPLE = re.compile(r"(\?\w+|<[^>]+>)\s*(<[^>]+>)\s*(\?\w+|<[^>]+>)")


def safe(iri: str) -> str:
    """An IRI without the characters that SPARQL does not allow in one."""
    return quote(iri, safe="".join(chr(i) for i in range(33, 127) if chr(i) not in '<>"{}|^`\\') + "%")


def mini_graph(rows: list[dict[str, Any]]) -> tuple[Any, list[tuple[str, str]]]:
    """The triples that make each question's query give its answers, and the questions with their queries.

    ?uri becomes each answer, ?x a node of its own per question; a count has as many nodes as it says, up to 10. A
    question without answers is left out.
    """
    store, asked = ox.Store(), []
    for n, row in enumerate(rows):
        if not row["answers"]:
            continue  # no triples come of it: its names may be nowhere
        sparql = re.sub(r"<([^>]+)>", lambda match: f"<{safe(match[1])}>", row["sparql_query"])
        asked.append((" ".join(row["corrected_question"].split()), sparql))
        values = [safe(each) if isinstance(each, str) else each for each in row["answers"]]
        if "COUNT" in sparql:
            values = [f"http://nodes/node_{n}_{i}" for i in range(min(int(values[0]), COUNTED))]
        for value in values:
            bound = {"?uri": f"<{value}>", "?x": f"<http://nodes/node_{n}>"}
            for terms in _TRIPLE.findall(sparql):
                nodes = [ox.NamedNode(bound.get(term, term)[1:-1]) for term in terms]
                store.add(ox.Quad(*nodes))
    return store, asked


def labels_of(store: Any) -> dict[str, str]:
    """DBpedia has two relations of one name, from its ontology and from infoboxes: the latter are marked."""
    found = {RDF_TYPE: "is a"}
    for quad in store:
        iri = quad.predicate.value
        if "/property/" in iri:
            found[iri] = "infobox " + iri.rpartition("/")[2]
    return found


def lcquad(
    seed: int, *, steps: int = LORA_STEPS, train: int = TRAIN, held: int = HELD
) -> dict[str, dict[str, float]]:
    """SmolLM2-135M learns to write queries, then answers questions on the graph that all questions span."""
    from peft import LoraConfig, get_peft_model

    rows = json.loads(dataset_path("lcquad1-test.json").read_text(encoding="utf-8"))
    store, asked = mini_graph(rows)
    random.Random(seed).shuffle(asked)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load("smollm2-135m", dtype="bfloat16", device=device)
    with seeded(seed):
        tokens = extend(base, tokenizer)
    index = KGIndex.from_store(store, tokenizer, labels=labels_of(store))
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM",
        trainable_token_indices=sorted({*tokens.texts, tokens.eos}),
    )  # fmt: skip
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    writer = Sparkle(base, tokenizer, index, store, beams=BEAMS)
    examples = writer.examples(asked[:train])
    fit(
        model, examples, lr=LORA_RATE, max_steps=steps, batch_size=LORA_BATCH, schedule="cosine", warmup=0.05,
        group_by_length=True, seed=seed,
    )  # fmt: skip
    merged = model.merge_and_unload().eval()
    sparkle = Sparkle(merged, tokenizer, index, store, beams=BEAMS)
    test = asked[train : train + held]
    gold = [execute(store, standard(sparql, index, tokenizer)) for _, sparql in test]
    return compare(sparkle, [question for question, _ in test], gold, max_new_tokens=72, batch_size=8)


def standard(sparql: str, index: KGIndex, tokenizer: Any) -> str:
    """The query in SPARQL 1.1: its flat form and back."""
    return to_sparql(linearise(sparql, index), index, tokenizer)
