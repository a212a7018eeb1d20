"""kid: do steps on the cache make knowledge words likelier, and answers better informed?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from _shared.how_why import QUESTIONS, STARTS
from transformers import LogitsProcessor, LogitsProcessorList

from transfuse.core.data import Document
from transfuse.core.generate import generate_texts, pad_batch, pad_id_of, target_nll
from transfuse.core.models import load
from transfuse.core.retrieval import VectorIndex
from transfuse.core.training import generator, seeded
from transfuse.steer.kid import KID, KnowledgeTrie, Source, TokenFinder, nouns

SLUG = "kid"
CLAIM = (
    "Without training, and without knowledge in the prompt, a frozen model that is steered through its key/value "
    "cache takes up terms of retrieved passages. The paper (GPT-2, BART; six knowledge-intensive generation tasks) "
    "reports better scores than task-optimised systems and seven ways of infusing knowledge, better human ratings "
    "for relevance and factuality, and quality that holds for longer texts."
)
RULE = {
    "quick": "eta_001.worst_ratio >= 1.5 in 3/3 seeds; all.objective_fell >= 0.95 in 3/3 seeds",
    "full": (
        "kid.recall >= plain.recall + 0.1 in 3/3 seeds; mean(kid.rouge_l) > mean(plain.rouge_l); "
        "kid.perplexity <= 2 * plain.perplexity in 3/3 seeds"
    ),
}
SEEDS = {"quick": 3, "full": 3}
ETAS = {"eta_001": 0.01, "eta_003": 0.03, "eta_01": 0.1}
BOOST = 2.0  # of the bag of words in the quick tier, in nats
BOOSTS = (1.0, 2.0, 3.0, 4.0)  # in the full tier the one whose recall is nearest to KID's is reported
NOTES = (
    "Quick: decoding is greedy, hence without chance; each seed has four prompts of its own, with five words chosen "
    "by hand for each. mass_plain and mass are the probability of the words not yet written, before and after the "
    "update, averaged over the seven tokens of a text; worst_ratio is the smallest ratio of the two over the "
    "prompts, median_gain the median of that ratio over single tokens; objective_fell pools all three step sizes, and "
    "counts steps with an update only: the first recording counted those without any word, too, and gave 0.976. "
    "bow puts 2 nats on the words' first tokens, rag reads the words before the prompt. recall is the share of the "
    "words in the answers. Prompts, words and rule were written before the first run; a trial on the first prompt "
    "with other words came before them. The rule fails on 2 of 12 prompts: the bees and the earthquakes reach a "
    "token where the plain model gives the word 0.77 and 0.85 already, which cannot grow by half and outweighs the "
    "other six in the mean (ratios 1.19 and 1.16; the other ten prompts 1.53 to 2.34). Full: sampling; the middle one "
    "of the three step sizes; kl_0 is the update without KL, as PPLM's bag of words, and bow the boost whose recall "
    "is nearest to KID's."
)


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32")


class Boost(LogitsProcessor):
    """A bag of words: `boost` nats on the first tokens of the knowledge words that the text calls for."""

    def __init__(self, sources: Sequence[Source], prompts: Sequence[list[int]], boost: float):
        self.finder = TokenFinder(loaded()[1])
        self.sources, self.prompts, self.boost = sources, prompts, boost
        self.width = max(map(len, prompts))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, (source, prompt) in enumerate(zip(self.sources, self.prompts)):
            found = self.finder(source, prompt, input_ids[row, self.width :].tolist())
            scores[row, list(found)] += self.boost
        return scores


def boosted(texts: list[str], sources: list[Source], boost: float, **options) -> list[str]:
    """Answers of the plain model with boosted words; everything else is as KID's own generation."""
    model, tokenizer = loaded()
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    ids, mask = pad_batch(prompts, pad_id_of(tokenizer), side="left")
    out = model.generate(
        input_ids=ids, attention_mask=mask, pad_token_id=pad_id_of(tokenizer), no_repeat_ngram_size=2,
        repetition_penalty=1.0, logits_processor=LogitsProcessorList([Boost(sources, prompts, boost)]), **options,
    )  # fmt: skip
    return [t.lstrip(" ") for t in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]


def recall(answers: list[str], words: list[str]) -> float:
    """Share of the knowledge words whose lemma stands in its answer."""
    hits = [word in nouns(answer) for answer, listed in zip(answers, words) for word in listed.split()]
    return sum(hits) / len(hits)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words."""
    a, b = (["".join(filter(str.isalnum, w)) for w in text.lower().split()] for text in (answer, reference))
    lengths = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, start=1):
            previous, lengths[j] = (
                lengths[j],
                previous + 1 if x == y else max(lengths[j], lengths[j - 1]),
            )
    return 2 * lengths[-1] / (len(a) + len(b)) if a and b else 0.0


def fluency(prompts: list[str], answers: list[str]) -> float:
    """Perplexity of the answers after their prompts, for the plain model; empty answers are left out."""
    kept = [(p, a) for p, a in zip(prompts, answers) if a.strip()]
    losses = target_nll(*loaded(), [p for p, _ in kept], [a for _, a in kept])
    return math.exp(float(torch.cat(losses).mean()))


def quick(seed: int) -> dict[str, dict[str, float]]:
    model, tokenizer = loaded()
    starts = STARTS[4 * seed % len(STARTS) :][:4]
    prompts, words = [s[0] for s in starts], [s[2] for s in starts]
    contexts = [f"{entity} {listed}" for _, entity, listed in starts]
    results: dict[str, dict[str, float]] = {}
    fell: list[float] = []
    arms = {arm: {"step_size": eta} for arm, eta in ETAS.items()}
    for arm, settings in {"plain": {"steps": 0}, **arms}.items():
        found = KID(model, tokenizer, **settings).generate(prompts, contexts, max_new_tokens=7, details=True)
        texts = [answer.text for answer in found]
        before, after = ([float(a.trace[n].mean()) for a in found] for n in (3, 4))
        size, objective, updated, plain, mass = (torch.cat(x) for x in zip(*(a.trace for a in found)))
        known = size > 0  # elsewhere all words are written, and there is no update
        steps, gains = (updated < objective)[known].double(), (mass / plain)[known]
        ratios = [b / a for a, b in zip(before, after)]
        results[arm] = {
            "mass_plain": sum(before) / len(before),
            "mass": sum(after) / len(after),
            "worst_ratio": min(ratios),
            "prompts_at_1.5": float(sum(ratio >= 1.5 for ratio in ratios)),
            "median_gain": float(gains.median()),
            "recall": recall(texts, words),
            "perplexity": fluency(prompts, texts),
        }
        if arm != "plain":
            results[arm]["objective_fell"] = float(steps.mean())
            fell += steps.tolist()
    results["all"] = {"objective_fell": sum(fell) / len(fell)}
    sources = [Source(KnowledgeTrie.from_passages(context)) for context in contexts]
    other = {
        "bow": boosted(prompts, sources, BOOST, max_new_tokens=7, do_sample=False),
        "rag": generate_texts(
            model, tokenizer, [f"{c.capitalize()}. {p}" for c, p in zip(contexts, prompts)], max_new_tokens=7
        ),
    }
    for arm, texts in other.items():
        results[arm] = {"recall": recall(texts, words), "perplexity": fluency(prompts, texts)}
    return results


@lru_cache
def retrieved(questions: int) -> list[list[str]]:
    """The five passages nearest to each question."""
    passages = [Document(id=str(n), text=q.passage) for n, q in enumerate(QUESTIONS)]
    hits = VectorIndex(passages).search([q.text for q in QUESTIONS[:questions]], 5)
    return [[hit.document.text for hit in row] for row in hits]


def full(seed: int, *, questions: int = len(QUESTIONS), new: int = 30, boosts: Sequence[float] = BOOSTS):
    model, tokenizer = loaded()
    asked, passages = QUESTIONS[:questions], retrieved(questions)
    texts, words = [q.text for q in asked], [q.words for q in asked]

    def rendered(queries: list[str]) -> list[str]:
        chats = [[{"role": "user", "content": query}] for query in queries]
        return [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]

    prompts = rendered(texts)
    options = {"max_new_tokens": new, "do_sample": True}

    def answers(queries: list[str] = texts, **settings) -> list[str]:
        method = KID(model, tokenizer, chat=True, **settings)
        return method.generate(
            queries, passages, batch_size=len(queries), generator=generator(seed), **options
        )

    with_passages = ["\n".join([*found, text]) for found, text in zip(passages, texts)]
    eta = ETAS["eta_003"]
    arms = {
        "plain": answers(steps=0),
        "kid": answers(step_size=eta),
        "kl_0": answers(step_size=eta, kl_scale=0.0),
        "rag": answers(with_passages, steps=0),
    }
    sources = [Source(KnowledgeTrie.from_passages(found), text) for found, text in zip(passages, texts)]
    sampling = {**options, "top_k": 20, "top_p": 0.92, "temperature": 1.0}
    bags = {}
    for boost in boosts:
        with seeded(seed):
            bags[boost] = boosted(prompts, sources, boost, **sampling)
    level = recall(arms["kid"], words)
    chosen = min(bags, key=lambda boost: abs(recall(bags[boost], words) - level))
    arms["bow"] = bags[chosen]
    results = {
        arm: {
            "recall": recall(found, words),
            "rouge_l": sum(rouge_l(a, q.reference) for a, q in zip(found, asked)) / len(asked),
            "perplexity": fluency(prompts, found),
        }
        for arm, found in arms.items()
    }
    results["bow"]["boost"] = chosen
    return results


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    return quick(seed) if tier == "quick" else full(seed)
