"""Can a document be read from a small adapter instead of from the prompt?

quick: a tiny model pre-trained here on invented towns, then new towns as adapters. full: SmolLM2-135M-Instruct,
invented towns and real films. Questions are asked in wordings that no adapter was trained on.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transfuse.core.data import Document
from transfuse.core.datasets import dataset_path
from transfuse.core.generate import generate_texts, target_nll
from transfuse.core.metrics import token_f1
from transfuse.core.models import load
from transfuse.core.retrieval import BM25, Hit
from transfuse.core.training import encode_examples, fit, seeded
from transfuse.inject.parametric_rag import (
    AdapterStore,
    DocumentParameterizer,
    Given,
    ParametricRAG,
    Triple,
    cloze_prompt,
    extract_answer,
)

SLUG = "parametric-rag"
CLAIM = (
    "Adapters of retrieved documents stand in for their passages, and add to them. F1 on PopQA / CWQ, Llama-3.2-1B: "
    "passages in the prompt 20.25 / 37.62, adapters alone 21.50 / 35.25, both 32.71 / 40.24; Qwen2.5-1.5B: "
    "9.99 / 28.23, 21.62 / 30.82, 23.64 / 32.09."
)
RULE = {
    "quick": (
        "own.nll <= 0.8 * closed.nll in 3/3 seeds; "
        "wrong.nll - closed.nll < 0.5 * (closed.nll - own.nll) in 3/3 seeds; "
        "closed.nll - wrong.nll < 0.5 * (closed.nll - own.nll) in 3/3 seeds; own.merge_gap <= 1e-5 in 3/3 seeds"
    ),
    "full": (
        "own.nll <= 0.6 * closed.nll in 3/3 seeds; combine.nll <= in_context.nll in 2/3 seeds; "
        "mean(combine.f1) >= mean(in_context.f1)"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "Questions are sentences to complete; the wordings tested are in no adapter's training data. Quick: the tiny "
    "model is pre-trained once, and a seed has its own 12 towns and initialisation; pre-training shows the tested "
    "wordings, with other towns, or so small a model could not understand them. It reads passages imperfectly, so "
    "own below in_context says nothing of larger models. Adapters learn 4 epochs at 2e-3, chosen on seed 0 of an "
    "earlier wording, where the paper's 3e-4 lowered the loss by 4 %, 1e-3 by 19 %, 2e-3 by 38 %, 4e-3 by 54 %. Full: "
    "the paper's settings on SmolLM2-135M in float32, 4 towns and 4 films in every seed, for want of time (557 s for "
    "three seeds on one core); the plan was 40 documents on a GPU. Bare arms: one document (k = 1, which the "
    "rule judges), 4 epochs; own.recall is how often BM25 finds the right one, `wrong` gets the next. "
    "Rewrites and questions are templates, not the "
    "model's. Sentences were chosen by what the model does without adapters: asked questions, with its chat template "
    "or not, it begins with a colon and repeats them even when the passage is there (answer NLL up to 20), and "
    "adapters would be credited with learning the form. A trial of the chat form on one town and one film came first: "
    "NLL in_context 5.62, own 3.98, wrong 7.27, combine 0.46."
)

NEW, HALF = 12, 4  # new towns in the quick tier; towns, and as many films, in the full one
EPOCHS = 4
RATE = {"quick": 2e-3, "full": 3e-4}
TOKENS = {"quick": 2, "full": 8}  # generated for an answer
LESSONS = (3000, 3200, 1600)  # rows of the tiny model's three lessons

# --- documents ---------------------------------------------------------------------------------------------

# Beginning of a sentence of the document, the sentence in other words, another beginning to test, answers.
TOWN = {
    "mayor": (
        "The mayor of {name} is", "{value} serves {name} as mayor.", "The council of {name} is led by",
        "Abbott Barlow Conway Drummond Everard Fairfax Gifford Hadley Irving Jarvis"),
    "founder": (
        "{name} was founded by", "The founder of {name} was {value}.", "The town of {name} was established by",
        "Agathon Bertram Casimir Dagobert Eleazar Florian Gideon Hannibal Ignatius Jolyon"),
    "river": (
        "{name} lies on the river", "The {value} flows through {name}.", "The bridges of {name} cross the water of the",
        "Arven Bresk Calder Dorne Esk Fyle Garron Hesper Isen Jorin"),
    "trade": (
        "People in {name} live from", "The trade of {name} is {value}.", "Most families of {name} earn their money by",
        "weaving fishing brewing mining farming printing tanning baking carving dyeing"),
    "emblem": (
        "The flag of {name} shows a", "A {value} is on the flag of {name}.", "The animal on the banner of {name} is a",
        "heron falcon badger stag wolf bear lion boar hare swan"),
    "stone": (
        "Houses in {name} are made of", "Builders in {name} use {value}.", "The walls of {name} consist of",
        "granite marble slate sandstone limestone basalt flint brick chalk gneiss"),
}  # fmt: skip
PREFIXES = "Port Upper Lower Saint East West North South Old New Great Little"
STEMS = "Ashby Birk Corran Dunmore Ellisk Farrow Glaston Harle Inver Jessop Kirkby Langley Marren Netherby Orrin Venn"
FILM = {
    "director": ("The film {name} was directed by", "The person who made the film {name} is"),
    "star": ("The film {name} stars", "The leading actor in the film {name} is"),
    "year": ("The film {name} came out in", "The film {name} was first shown in the year"),
}
FILM_AGAIN = "In {name}, a {kind} film that {director} made in {year}, {star} plays a part."
PERSON = r"[A-Z][a-z]+(?: [A-Z][a-z]+){1,2}"
FILM_PATTERN = re.compile(
    r"(?P<name>[^.,()]+?) is an? (?P<year>\d{4}) (?P<kind>[A-Za-z-]+(?: [a-z]+){0,3}) film directed by "
    rf"(?P<director>{PERSON})(?: and|,) starring (?P<star>{PERSON})(?=,| and |\.)"
)


class Item(NamedTuple):
    """A document, its rewrite, the triples it is learnt from, and (question, answer) pairs to test."""

    document: Document
    rewrite: str
    learnt: list[Triple]
    tested: list[tuple[str, str]]


def town(name: str, random: Random) -> Item:
    """An invented town: three of the six things above, in a random order."""
    told = [(TOWN[kind], random.choice(TOWN[kind][3].split())) for kind in random.sample(sorted(TOWN), 3)]
    learnt = [Triple(kind[0].format(name=name), value) for kind, value in told]
    text = " ".join(f"{triple.question} {triple.answer}." for triple in learnt)
    rewrite = " ".join(kind[1].format(name=name, value=value) for kind, value in told)
    return Item(Document(text, id=name), rewrite, learnt, [(k[2].format(name=name), v) for k, v in told])


@lru_cache
def town_names() -> list[str]:
    names = [f"{prefix} {stem}" for prefix in PREFIXES.split() for stem in STEMS.split()]
    Random(0).shuffle(names)
    return names


@lru_cache
def films() -> list[Item]:
    """Short real passages that name a film's year, director and leading actor."""
    found = []
    for row in json.loads(Path(dataset_path("2wikimultihopqa-corpus.json")).read_text(encoding="utf-8")):
        match = FILM_PATTERN.match(row["text"])
        if match is None or len(row["text"].split()) > 40 or match["director"] == match["star"]:
            continue
        learnt = [Triple(begin.format(**match.groupdict()), match[k]) for k, (begin, _) in FILM.items()]
        tested = [(begin.format(**match.groupdict()), match[k]) for k, (_, begin) in FILM.items()]
        document = Document(row["text"], title=row["title"], id=row["title"])
        found.append(Item(document, FILM_AGAIN.format(**match.groupdict()), learnt, tested))
    Random(0).shuffle(found)
    return found


# --- the tiny model ----------------------------------------------------------------------------------------


@lru_cache
def tiny() -> tuple[Any, Any]:
    """A four-layer Llama that reads passages about towns and knows every wording, but none of the new towns.

    Three lessons: to repeat a list of words; to answer, with a passage or by guessing; to write all of it.
    """
    random, names = Random(0), town_names()[SEEDS["quick"] * NEW :]
    words = " ".join([PREFIXES, STEMS, *(kind[3] for kind in TOWN.values())]).split()
    lists = [" ".join(random.sample(words, random.randrange(4, 12))) for _ in range(LESSONS[0])]
    lessons = [[[(text, text)] for text in lists]]
    lessons += [[exam(town(random.choice(names), random), random) for _ in range(n)] for n in LESSONS[1:]]
    texts = [text for lesson in lessons for row in lesson for pair in row for text in pair]
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with seeded(0):
        model = LlamaForCausalLM(config)
    for i, lesson in enumerate(lessons):
        rows = []
        for pairs in lesson:
            parts = encode_examples(tokenizer, pairs, loss_on="all" if i == 2 else "target")
            rows.append({key: [n for part in parts for n in part[key]] for key in ("input_ids", "labels")})
        schedule, batch = ("constant", "constant", "linear")[i], (32, 16, 16)[i]
        fit(model, rows, lr=3e-3, epochs=1, batch_size=batch, warmup=0.05, schedule=schedule)
    return model.eval(), tokenizer


def exam(item: Item, random: Random) -> list[tuple[str, str]]:
    """The three questions on a town, in either wording, after one of its two texts or, one time in three, none."""
    passages = random.choice([[item.document.text], [item.rewrite], []])
    asked = [random.choice([(t.question, t.answer), other]) for t, other in zip(item.learnt, item.tested)]
    random.shuffle(asked)
    return [(cloze_prompt(q, [] if i else passages), answer + ".") for i, (q, answer) in enumerate(asked)]


# --- the arms ----------------------------------------------------------------------------------------------


class Other:
    """A retriever that mistakes every document for the next one."""

    def __init__(self, right: BM25):
        self.right, self.documents = right, right.documents

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        following = dict(zip(self.documents, [*self.documents[1:], self.documents[0]]))
        return [[Hit(following[d], s) for d, s in hits] for hits in self.right.search(queries, k)]


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    quick, random = tier == "quick", Random(seed + 1)
    model, tokenizer = tiny() if quick else load("smollm2-135m", dtype="float32")
    count = NEW if quick else HALF
    chosen = slice(seed * count, (seed + 1) * count)
    items = [town(name, random) for name in town_names()[chosen]] + ([] if quick else films()[chosen])
    questions = [question for item in items for question, _ in item.tested]
    answers = [answer for item in items for _, answer in item.tested]
    right = BM25([item.document for item in items])

    def score(prompts: Sequence[str], places: Sequence[int]) -> list[tuple[float, float]]:
        wanted = [answers[i] for i in places]
        losses = target_nll(model, tokenizer, prompts, wanted)
        texts = generate_texts(model, tokenizer, prompts, max_new_tokens=TOKENS[tier])
        scores = [token_f1(extract_answer(text), answer) for text, answer in zip(texts, wanted)]
        return [(float(loss.mean()), f1) for loss, f1 in zip(losses, scores)]

    def means(rows: Sequence[tuple[float, float]]) -> dict[str, float]:
        return dict(zip(("nll", "f1"), map(statistics.mean, zip(*rows))))

    def arm(mode: str, store: AdapterStore | None, retriever: Any = right, k: int = 1) -> dict[str, float]:
        rag = ParametricRAG(model, retriever, store, tokenizer, mode=mode, k=k, render=cloze_prompt)
        return means(rag.measure(questions, score))

    def encoded(folder: str, epochs: int) -> AdapterStore:
        triples = {item.document.id: item.learnt for item in items}
        known = Given(triples, {item.document.id: [item.rewrite] for item in items})
        maker = DocumentParameterizer(
            model, tokenizer, known, lr=RATE[tier], epochs=epochs, render=cloze_prompt, seed=seed
        )
        return maker.encode(right.documents, folder)

    figures = {"closed": means(score(questions, range(len(questions)))), "in_context": arm("context", None)}
    with tempfile.TemporaryDirectory() as folder:
        store = encoded(f"{folder}/own", EPOCHS)
        figures["own"] = arm("parametric", store)
        figures["wrong"] = arm("parametric", store, Other(right))
        figures["combine"] = arm("combine", store)
        owners = [item.document for item in items for _ in item.tested]
        hits = [found[0].document for found in right.search(questions, 1)]
        figures["own"]["recall"] = statistics.mean(float(a == b) for a, b in zip(owners, hits))
        figures["own"]["merge_gap"] = merge_gap(model, store, right.documents[:3])
        if quick:
            return figures
        once = encoded(f"{folder}/once", 1)
        figures["own_1_epoch"], figures["combine_1_epoch"] = arm("parametric", once), arm("combine", once)
        for mode, name in (("context", "in_context"), ("parametric", "own"), ("combine", "combine")):
            figures[f"{name}_k3"] = arm(mode, store, k=3)
    return figures


def merge_gap(model: Any, store: AdapterStore, documents: Sequence[Document]) -> float:
    """Largest entry by which the update of PEFT's attached layers is not the sum of the documents' updates."""
    adapters, lora, gap = [store.get(document) for document in documents], store.manifest["lora"], 0.0
    with store.apply(model, documents):
        for name in adapters[0]:
            summed = sum(b.double() @ a.double() for a, b in (adapter[name] for adapter in adapters))
            layer = model.get_submodule(name)
            delta = layer.get_delta_weight(layer.active_adapters[0]).detach()
            gap = max(gap, float((delta - lora["alpha"] / lora["rank"] * summed).abs().max()))
    return gap
