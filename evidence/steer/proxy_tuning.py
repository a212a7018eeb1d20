"""proxy-tuning: does what tuning did to a small model steer a large one as tuning it would?"""

from __future__ import annotations

from _shared import domains, experts

from transfuse import load
from transfuse.core.datasets import dataset_path
from transfuse.steer.proxy_tuning import ProxyTuning, offset_scores

SLUG = "proxy-tuning"
CLAIM = (
    "Adding the logits of a tuned small model minus those of the untuned one closes most of the gap between a large "
    "model and the same model tuned. Paper, Llama-2 with 7B-chat and 7B, base / proxy / tuned: 13B AlpacaFarm "
    "2.1 / 83.4 / 87.3, GSM 6.6 / 26.4 / 32.4; 70B AlpacaFarm 3.7 / 88.0 / 90.4, GSM 9.6 / 32.0 / 51.8; gap closed "
    "over five tasks 91.1 % at 13B and 88.1 % at 70B. The 7B expert alone: AlpacaFarm 82.5, GSM 23.0."
)
RULE = {
    "quick": (
        "proxy.exact >= expert.exact + 0.3 in 3/3 seeds; proxy.exact >= base.exact + 0.3 in 3/3 seeds; "
        "mean(proxy.gap_closed) >= 0.7"
    ),
    "full": "proxy.nll <= base.nll - 0.05 in 3/3 seeds; proxy.nll <= expert.nll - 0.05 in 3/3 seeds",
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "Quick: exact match of the answer in a format that 3 % of pretraining had, asked of the 72 entities that "
    "tuning did not see, mean over two attributes with an expert each. Learning rates and steps were chosen on "
    "seeds 10 to 12, by the baselines (base 0, a weak expert, alpha 0.5 too little) and with the method's figures in "
    "view; the prototype's 900 and 500 steps of pretraining became 350 and 400. With a small model that knows the "
    "facts as well as the large one (rate 0.01) the expert alone is too good for the rule. Full: nats per token of "
    "200 SPARQL queries; the tiny model reads 100 batches of text, its expert 800 pairs once; SmolLM2-135M is read "
    "in bf16. Direct tuning (LoRA) is measured in seed 0 only, on 120 of the pairs."
)

WEIGHTS = {"alpha_05": 0.5, "proxy": 1.0, "alpha_15": 1.5}


def quick(seed: int) -> dict[str, dict[str, float]]:
    toy = experts.made(seed)
    found = {
        "base": experts.plain(toy, [toy.large] * len(toy.tests)),
        "expert": experts.plain(toy, toy.experts),
        "tuned": experts.plain(toy, toy.tuned),
    }
    for arm, alpha in WEIGHTS.items():
        found[arm] = experts.steered(
            toy,
            lambda a, alpha=alpha: ProxyTuning(
                toy.large, toy.tokenizer, toy.experts[a], toy.small, alpha=alpha
            ),
        )
    gap = found["tuned"] - found["base"]
    arms = {arm: {"exact": value} for arm, value in found.items()}
    for arm in WEIGHTS:
        arms[arm]["gap_closed"] = (found[arm] - found["base"]) / gap if gap else float("nan")
    return arms


def full(
    seed: int, *, reading: int = 100, taught: int = 800, tests: int = 200
) -> dict[str, dict[str, float]]:
    large, tokenizer = load("smollm2-135m", dtype="bfloat16")
    pairs = domains.shuffled(domains.queries(), 0)
    test, train = pairs[:tests], pairs[200 : 200 + taught]
    text = dataset_path("wikitext-2/valid.txt").read_text(encoding="utf-8")
    text = text[seed * 200_000 :][:200_000] + "\n".join(prompt for prompt, _ in train)
    small = domains.read(domains.tiny(seed, len(tokenizer)), tokenizer, text, steps=reading, seed=seed)
    expert = domains.tuned(small, tokenizer, train, steps=taught // 8, seed=seed)
    ways = {"base": lambda z: z[0], "expert": lambda z: z[1], "antiexpert": lambda z: z[2]}
    for arm, alpha in WEIGHTS.items():
        ways[arm] = lambda z, alpha=alpha: offset_scores(*z, alpha)
    arms = {
        arm: {"nll": nll}
        for arm, nll in domains.scored([large, expert, small], ways, tokenizer, test).items()
    }
    if seed == 0:
        adapted = domains.tuned(
            domains.with_lora(large),
            tokenizer,
            train,
            steps=min(30, taught // 4),
            seed=seed,
            lr=1e-3,
            batch=4,
        )
        arms["tuned"] = {"nll": domains.scored([adapted], {"tuned": ways["base"]}, tokenizer, test)["tuned"]}
        for arm in WEIGHTS:
            gap = arms["base"]["nll"] - arms["tuned"]["nll"]
            arms[arm]["gap_closed"] = (arms["base"]["nll"] - arms[arm]["nll"]) / gap
    return arms


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    return quick(seed) if tier == "quick" else full(seed)
