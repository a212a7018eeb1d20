"""rapid: do drafts from a retrieved part make answers from a long context better, and accepted more often?"""

from __future__ import annotations

import time
from functools import lru_cache, partial

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from transfuse.core.metrics import contains_answer
from transfuse.core.models import load
from transfuse.core.training import generator, loop, seeded
from transfuse.steer.rapid import RAPID, ChunkRetriever, Reader, Speculated, Verdict, round_flops, verify

from _shared.data import long_text  # isort: skip

SLUG = "rapid"
CLAIM = (
    "A drafter on the retrieved part of a long context, with the target moved towards it, answers better and faster "
    "than the target alone. Paper, full context / RAG only / eta 0 / RAPID: Llama-3.1-8B on InfiniteBench 39.33 / "
    "40.40 / 39.64 / 42.83 at speed-ups of 1 / 3.35 / 1.63 / 2.10, on LongBench-v2 30.4 / 33.4 / 31.0 / 34.2; "
    "Qwen2.5-7B full / RAPID 38.12 / 42.48 and 33.2 / 35.4. In a dialogue of 122K tokens 56.3 % of the drafts are "
    "accepted at eta 0 and 76.9 % with the step. Faster than the full context only beyond 32K tokens."
)
RULE = {
    "quick": (
        "random.tv_eta_0 <= 0.01 in 3/3 seeds; random.acceptance_1 >= random.acceptance_0 in 3/3 seeds; "
        "random.acceptance_5 >= random.acceptance_1 in 3/3 seeds; "
        "random.acceptance_10 >= random.acceptance_5 in 3/3 seeds; "
        "eta_10.accuracy >= full.accuracy + 0.05 in 3/3 seeds; "
        "eta_10.acceptance >= eta_0.acceptance + 0.05 in 3/3 seeds"
    ),
    "full": (
        "eta_10.accuracy >= full.accuracy; eta_10.acceptance > eta_0.acceptance; eta_10.passes_per_token <= 0.5"
    ),
}
SEEDS = {"quick": 3, "full": 1}
NOTES = (
    "Quick: p and q are softmax of standard normal logits over 50 tokens. A first run compared acceptance rates from "
    "unequal numbers of draws and failed in seed 0 by 0.0004, which was noise (exactly, a draft stays with 0.4338 at "
    "eta 0 and 0.4351 at eta 1); since then all eta share 1,000,000 drafts and draws. The recall model is a Llama of "
    "width 64 with two layers; each pair is one token (64 keys x 4 values), as a model of this size does not learn "
    "in seconds to put keys and values of two tokens together. It is trained on 8 to 24 pairs and asked about 64. RoPE "
    "base, number of values, learning rate and steps were chosen on seeds 100 to 102 by how well the model learns and "
    "what it loses on contexts longer than those it was trained on, with the expected accuracy at eta 10 in view; on "
    "seeds 0 and 1 only that an earlier variant learns was seen. Answers are one token, sampled at T = 1. Retrieval "
    "alone does about as well here as the step. Full: SmolLM2-135M-Instruct in bf16, greedy; five haystacks of "
    "Python's help texts with eight inserted facts each, 40 questions; chunks of 256 tokens, at most 1,024 of them in "
    "all, because the paper's 4,096 would keep most of a haystack. All arms share the caches of both prompts, so that "
    "their seconds are those of decoding. Wording was tried on other towns at 1,500 tokens, all "
    "arms in view: facts of one kind are not told apart by a model of this size, hence eight kinds. The full rule "
    "fails on accuracy: at eta 10 it goes with that of retrieval alone (26 and 27 of 40 right, whole context "
    "29, ensemble 33), which sees 388 tokens on average, as few chunks reach the threshold of 0.3. eta 0 has 31 where "
    "it should have the "
    "target's 29: in bf16 a pass over several tokens rounds otherwise than one over a single token. Nothing was "
    "changed after that run."
)

KEYS, VALUES, PAIRS, NEAR = 64, 4, 64, 8
STEPS, ROWS, ASKED, RATE = 350, 64, 16, 1e-2
QUESTIONS = 400


def ensemble(drafts: Tensor, q: Tensor, z: Tensor, **options) -> Verdict:
    """Speculative sampling of (p + q) / 2, as transformers does for `assistant_ensemble_weight=0.5`."""
    n = q.shape[1]
    mixed = ((z[:, :n].softmax(-1) + q) / 2).log()
    return verify(drafts, q, torch.cat([mixed, z[:, n:]], dim=1), eta=0.0, **options)


ARMS = {
    "full": {"gamma": 0},
    "eta_0": {"eta": 0.0},
    "eta_10": {"eta": 10.0},
    "eta_10_renormalised": {"eta": 10.0, "tail": "renormalise"},
    "ensemble": {"verify_fn": ensemble},
}


def summed(answers: list[Speculated], right: list[bool]) -> dict[str, float]:
    """Accuracy, and what the rounds came to, over all answers."""
    drafted = sum(a.drafted for a in answers)
    found = {
        "accuracy": sum(right) / len(right),
        "passes_per_token": sum(a.rounds for a in answers) / sum(len(a.tokens) for a in answers),
    }
    if drafted:
        found["acceptance"] = sum(int((a.origins == 0).sum()) for a in answers) / drafted
    return found


# --- quick (a): the algorithm on random distributions -------------------------------------------------------


def random_pairs(seed: int) -> dict[str, float]:
    """200,000 tokens at eta 0 against p; the share of drafts accepted at each eta, with the same draws."""
    source = generator(seed)
    z = torch.randn(50, generator=source)
    q = torch.randn(50, generator=source).softmax(-1)

    def rounds(eta: float) -> tuple[Tensor, float]:
        """200,000 rounds of five drafts: the first 200,000 tokens, and the share of drafts that stayed."""
        draws, emitted, accepted = generator(seed + 1), [], 0
        for _ in range(20):
            drafts = torch.multinomial(q, 50_000, replacement=True, generator=draws).view(10_000, 5)
            verdict = verify(
                drafts, q.expand(10_000, 5, -1), z.expand(10_000, 6, -1), eta=eta, generator=draws
            )  # fmt: skip
            made = torch.cat([drafts, verdict.token[:, None]], dim=1)
            made.scatter_(1, verdict.accepted[:, None], verdict.token[:, None])
            emitted.append(made[torch.arange(6) <= verdict.accepted[:, None]])  # round by round
            accepted += int(verdict.accepted.sum())
        return torch.cat(emitted)[:200_000], accepted / 1_000_000

    tokens, _ = rounds(0.0)
    shares = tokens.bincount(minlength=50) / len(tokens)
    found = {"tv_eta_0": float((shares - z.softmax(-1)).abs().sum() / 2)}
    return found | {f"acceptance_{eta}": rounds(float(eta))[1] for eta in (0, 1, 5, 10)}


# --- quick (b): recall of 64 pairs by a model trained on 8 to 24 --------------------------------------------


def words() -> list[str]:
    keys, values = [f"k{i}" for i in range(KEYS)], [f"v{j}" for j in range(VALUES)]
    return ["<pad>", "<s>", "</s>", "?", *keys, *values, *(f"{k}:{v}" for k in keys for v in values)]


def recall_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def facts(rows: int, pairs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of distinct keys and of their values, `[rows, pairs]` each."""
    keys = torch.stack([torch.randperm(KEYS, generator=source)[:pairs] for _ in range(rows)])
    return keys, torch.randint(VALUES, (rows, pairs), generator=source)


def training_batch(source: torch.Generator) -> dict[str, Tensor]:
    """Rows `<s> pairs ? key value key value ...`; labels at the values."""
    pairs = int(torch.randint(8, 25, (1,), generator=source))
    keys, values = facts(ROWS, pairs, source)
    pick = torch.randint(pairs, (ROWS, ASKED), generator=source)
    asked = torch.stack([4 + keys.gather(1, pick), 4 + KEYS + values.gather(1, pick)], dim=-1).flatten(1)
    first, mark = torch.full((ROWS, 1), 1), torch.full((ROWS, 1), 3)
    ids = torch.cat([first, 4 + KEYS + VALUES + keys * VALUES + values, mark, asked], dim=1)
    return {"ids": ids, "gold": asked[:, 1::2]}


def recall_model(seed: int):
    config = AutoConfig.for_model(
        "llama", vocab_size=len(words()), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.125,
        rope_theta=50.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in model.model.layers:  # what is embedded should outweigh what the layers add at first
        layer.self_attn.o_proj.weight.data.mul_(0.25)
        layer.mlp.down_proj.weight.data.mul_(0.25)
    model.lm_head.weight.data.mul_(0.1)
    source = generator(seed)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        hidden = model.model(batch["ids"]).last_hidden_state[:, -2 * ASKED :: 2]
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch["gold"].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    slope = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.02, 1 - step / STEPS)
    )
    batches = [training_batch(source) for _ in range(STEPS)]
    loop(model, batches, loss, optimizer=optimizer, scheduler=slope, clip=1.0, seed=seed)
    return model.eval()


def recall(seed: int) -> dict[str, dict[str, float]]:
    """All arms on the same questions; retrieval brings the pair asked for nine times of ten."""
    model, tokenizer, source = recall_model(seed), recall_tokenizer(), generator(seed + 1)
    keys, values = facts(QUESTIONS, PAIRS, source)
    queries, contexts, golds, near = [], [], [], {}
    for row in range(QUESTIONS):
        pairs = [f"k{k}:v{v}" for k, v in zip(keys[row].tolist(), values[row].tolist())]
        asked, *others = torch.randperm(PAIRS, generator=source).tolist()
        found = float(torch.rand(1, generator=source)) < 0.9
        kept = [asked, *others[: NEAR - 1]] if found else others[:NEAR]
        contexts.append(" ".join(pairs))
        queries.append(pairs[asked].partition(":")[0])
        golds.append(pairs[asked].partition(":")[2])
        near[contexts[-1]] = " ".join(pairs[i] for i in sorted(kept))
    results = {}
    for arm, settings in {**ARMS, "rag": {"gamma": 0}}.items():
        method = RAPID(
            model, tokenizer, prompt="<s> {context} ? {query}",
            retriever=lambda query, context, _: near.get(context, context), **settings,
        )  # fmt: skip
        answers = method.generate(
            queries, [near[c] for c in contexts] if arm == "rag" else contexts, max_new_tokens=1, details=True,
            do_sample=True, generator=generator(seed + 2),
        )  # fmt: skip
        results[arm] = summed(answers, [a.text == gold for a, gold in zip(answers, golds)])
    return results


# --- full: facts in haystacks -------------------------------------------------------------------------------

LENGTHS = (1500, 2500, 3500, 4750, 6000)
TOWNS = ["Quenby", "Port Ellery", "Ostrin", "Varrow", "Tveldam"]
FACTS = [
    ("What is the access code of the observatory in {}?", "The access code of the observatory in {} is {}."),
    ("Who is the mayor of {}?", "The mayor of {} is {}."),
    ("What is the bakery in {} famous for?", "The bakery in {} is famous for its {}."),
    ("When does the last ferry to {} leave?", "The last ferry to {} leaves at {}."),
    ("Who built the old bridge in {}?", "The old bridge in {} was built by {}."),
    (
        "What colour are the shirts of the football club of {}?",
        "The shirts of the football club of {} are {}.",
    ),
    ("What is the river that flows through {} called?", "The river that flows through {} is called the {}."),
    ("Who won the chess tournament in {}?", "The chess tournament in {} was won by {}."),
]
ANSWERS = [
    ["7341", "2096", "5518", "8827", "4603"],
    ["Ines Varro", "Tomas Lindqvist", "Greta Osei", "Pavel Brandt", "Mira Castellan"],
    ["plum tarts", "rye buns", "honey cakes", "almond rolls", "cheese pies"],
    ["21:40", "18:15", "22:05", "19:50", "20:35"],
    ["Oskar Tveld", "Hannah Pryce", "Luis Amaro", "Edith Moreau", "Jonas Falk"],
    ["orange", "purple", "green", "white", "yellow"],
    ["Ardle", "Senna", "Mirrow", "Tolm", "Beck"],
    ["Nadia Roux", "Viktor Hale", "Selma Dunn", "Otto Grimaldi", "Clara Voss"],
]


def haystack(number: int, tokenizer, towns: list[str] = TOWNS) -> tuple[str, list[str], list[str]]:
    """A text of `LENGTHS[number]` tokens with eight facts about a town at even depths; questions and answers."""
    paragraphs = [p for p in long_text().split("\n\n") if 200 < len(p) < 1200]
    answers = [given[number] for given in ANSWERS]
    needles = [fact.format(towns[number], answer) for (_, fact), answer in zip(FACTS, answers)]
    used = len(tokenizer("\n\n".join(needles))["input_ids"])
    chosen: list[str] = []
    for i in torch.randperm(len(paragraphs), generator=generator(number)).tolist():
        used += len(tokenizer("\n\n" + paragraphs[i])["input_ids"])
        if used > LENGTHS[number]:
            break
        chosen.append(paragraphs[i])
    places = [round((i + 0.5) * len(chosen) / len(needles)) for i in range(len(needles))]
    for place, needle in reversed(list(zip(places, needles))):
        chosen.insert(place, needle)
    return "\n\n".join(chosen), [question.format(towns[number]) for question, _ in FACTS], answers


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="bfloat16")


def haystacks() -> dict[str, dict[str, float]]:
    """All arms, question by question, from the same two caches."""
    model, tokenizer = loaded()
    size = sum(p.numel() for p in model.parameters())
    retriever = ChunkRetriever(chunk_tokens=256, max_tokens=1024)
    arms = {arm: ARMS[arm] for arm in ("full", "eta_0", "eta_10", "ensemble")} | {"rag": {"gamma": 0}}
    answers: dict[str, list[Speculated]] = {arm: [] for arm in arms}
    right: dict[str, list[bool]] = {arm: [] for arm in arms}
    seconds = dict.fromkeys([*arms, "reading", "retrieval"], 0.0)
    readers: dict[str, Reader] = {}

    def timed(name: str, call, *arguments, **options):
        start = time.perf_counter()
        made = call(*arguments, **options)
        seconds[name] += time.perf_counter() - start
        return made

    for number in range(len(LENGTHS)):
        text, questions, golds = haystack(number, tokenizer)
        for question, gold in zip(questions, golds):
            short = timed("retrieval", retriever, question, text, tokenizer)
            make = partial(RAPID, model, tokenizer, retriever=lambda *_, short=short: short, chat=True)
            timed("reading", make(gamma=1).generate, question, text, max_new_tokens=1, readers=readers)
            for arm, settings in arms.items():
                read, kept = (short, {"target": readers["drafter"]}) if arm == "rag" else (text, readers)
                method = make(**settings)
                made = timed(
                    arm, method.generate, question, read, max_new_tokens=32, details=True, readers=kept
                )
                answers[arm].append(made)
                right[arm].append(contains_answer(made.text, gold))
    results = {arm: summed(answers[arm], right[arm]) for arm in arms}
    for arm, found in results.items():
        length, retrieved = (
            sum(a.prompt_tokens[i] for a in answers[arm]) / len(answers[arm]) for i in (0, 1)
        )
        gamma = arms[arm].get("gamma", 10)
        flops = round_flops(
            size, size if gamma else 0, round(length), round(retrieved) if gamma else 0, gamma=gamma,
            acceptance=1 / found["passes_per_token"],
        )  # fmt: skip
        found |= {"model_gflops_per_token": flops / 1e9, "prompt_tokens": length, "drafter_tokens": retrieved}
        found |= {"seconds": seconds[arm], "tokens": sum(len(a.tokens) for a in answers[arm])}
    results["once"] = {f"{name}_seconds": seconds[name] for name in ("reading", "retrieval")}
    return results


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    return {"random": random_pairs(seed), **recall(seed)} if tier == "quick" else haystacks()
