"""Does a compressed pack keep what full fine-tuning taught, and do packs leave each other and the base alone?

quick: two skills on digits, each with labels of its own. full: two skills of SmolLM2-135M, by SFT and then DPO.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _shared.data import digits, split
from _shared.lmkd import trained
from _shared.nets import MLP, accuracy, learn, make
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from transfuse.core.batches import encode_examples, pad_collator
from transfuse.core.generate import target_nll
from transfuse.core.models import fingerprint, load
from transfuse.core.training import fit, generator, seeded
from transfuse.distill._rank import DPO, rank_collator
from transfuse.merge import merge
from transfuse.merge.graftllm import GraftedModel, ModulePolicy, SkillPack, SkillRouter
from transfuse.merge.twin_merging import TwinMerging

SLUG = "graftllm"
CLAIM = (
    "A skill pack keeps the quality of full fine-tuning within about 1 % where LoRA of rank 32 to 128 collapses under "
    "DPO (GSM8K and MATH); packs with routing gain 8.07 points on AlpacaEval 2.0 over the best parameter merging, at "
    "28 % more parameters; the skill learnt before is hardly forgotten (maths, then code)."
)
RULE = {
    "quick": (
        "pack.a >= 0.97 * full.a in 3/3 seeds; pack.b >= 0.97 * full.b in 3/3 seeds; pack.size <= 0.2 in 3/3 seeds; "
        "routed.mean >= sequential.mean + 0.3 in 3/3 seeds; routed.mean >= task_arithmetic.mean + 0.2 in 3/3 seeds; "
        "routed.drift == 0 in 3/3 seeds"
    ),
    "full": (
        "pack.size <= 0.25; pack.a - base.a >= 0.95 * (dpo.a - base.a); pack.b - base.b >= 0.95 * (dpo.b - base.b)"
    ),
}
SEEDS = {"quick": 3, "full": 1}
NOTES = (
    "Sizes are bytes of all stored tensors, grids included, relative to the model's parameters at 16 bits; names and "
    "headers in a pack's two files come on top (`files`): for a net as small as the quick one's 8,571 bytes beside "
    "13,125 of tensors, 21 % in all. quick: the rule on keeping "
    "97 % is asked of each of the two skills, and the figure at equal bytes is the best rank or share that takes no "
    "more bytes than the pack. The scaling of static merges and the learning rate of LoRA are the best on held-out "
    "digits. After a first run, which held all rules, the two router networks (twin_merging, routed_network; in no "
    "rule) were given 400 of the 1,200 pictures per job, to save time. full: not run yet, tried in parts. The "
    "learning rates were chosen with the seed 5 so that full fine-tuning learns both skills in 20 steps and DPO adds "
    "to it (pairs ordered right: 0.25, 0.71, 1.00 and 0.38, 0.96, 1.00 for base, SFT, DPO); at 2e-5 and 5e-6 it had "
    "learnt nothing."
)

SKILLS = ("a", "b")
WIDTHS = (64, 192, 192, 10)
GROUPS = ((2, 8), (6, 4), (24, 2))
BATCH, RATE, EPOCHS = 64, 1e-3, 15
SCALINGS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
LORA_RATES = (1e-3, 3e-3, 1e-2)
ROUTED = 400  # pictures per job that a router network learns from

Answer = Callable[[Tensor, str], Tensor]


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    return quick(seed) if tier == "quick" else full(seed)


# --- quick: digits -----------------------------------------------------------------------------------------


class Digits:
    """Three jobs on the same pictures: plain; turned by a quarter and relabelled; negatives, relabelled otherwise."""

    def __init__(self, seed: int):
        self.x, self.y = digits()
        self.train, self.held, self.test = split(len(self.x), (1200, 237, 360), seed)
        self.views: dict[str, Callable[[Tensor], Tensor]] = {
            "base": lambda x: x,
            "a": lambda x: x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1),
            "b": lambda x: 1 - x,
        }
        self.orders = {
            task: torch.arange(10)
            if task == "base"
            else torch.randperm(10, generator=generator(100 * seed + i))
            for i, task in enumerate(self.views)
        }

    def rows(self, task: str, part: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures and labels."""
        return self.views[task](self.x[part]), self.orders[task][self.y[part]]

    def scores(self, answer: Answer, part: Tensor | None = None) -> dict[str, float]:
        """Share right for each job, and their mean."""
        found = {}
        with torch.no_grad():
            for task in self.views:
                inputs, labels = self.rows(task, self.test if part is None else part)
                found[task] = float((answer(inputs, task).argmax(-1) == labels).float().mean())
        return {**found, "mean": sum(found.values()) / len(found)}


def quick(seed: int) -> dict[str, dict[str, float]]:
    """A base on plain digits, and each skill trained from it, 15 epochs each."""
    data = Digits(seed)

    def taught_on(net: nn.Module, task: str) -> nn.Module:
        steps = EPOCHS * (len(data.train) // BATCH)
        return learn(net, *data.rows(task, data.train), steps=steps, lr=RATE, batch_size=BATCH, seed=seed)

    base = taught_on(make(seed, MLP, *WIDTHS), "base")
    tuned = {task: taught_on(copy.deepcopy(base), task) for task in SKILLS}
    inputs = {task: data.rows(task, data.train)[0] for task in data.views}

    def packed(calibrated: bool = True, **policy: Any) -> dict[str, SkillPack]:
        return {
            task: SkillPack.from_models(
                tuned[task], base, name=task, policy=ModulePolicy(**policy),
                calibration=inputs[task] if calibrated else None,
            )
            for task in SKILLS
        }  # fmt: skip

    def own(nets: Mapping[str, nn.Module]) -> dict[str, float]:
        return {task: accuracy(nets[task], *data.rows(task, data.test)) / 100 for task in SKILLS}

    def of_packs(packs: Mapping[str, SkillPack]) -> dict[str, float]:
        model = GraftedModel(copy.deepcopy(base), packs)
        found = data.scores(lambda q, task: model(q, task=task))
        size = max(pack.ratio for pack in packs.values())
        return {"a": found["a"], "b": found["b"], "size": size, "bytes": float(model.nbytes) / len(packs)}

    packs = packed(attention=GROUPS, mlp=GROUPS)
    room = min(pack.nbytes for pack in packs.values())
    arms = {
        "full": {**own(tuned), "size": 1.0},
        "pack": {**of_packs(packs), "files": files(packs)},
        "pack_rounded": of_packs(packed(calibrated=False, attention=GROUPS, mlp=GROUPS)),
        "svd": of_packs(most(lambda rank: packed(attention=((rank, 16),), mlp=((rank, 16),)), 1, 64, room)),
        "pruned": of_packs(
            most(lambda n: packed(rules={r"\.weight": "prune"}, share=n / 1000), 1, 1000, room)
        ),
    }

    def lora(rank: int) -> dict[str, float]:
        nets = {task: adapted(data, base, task, rank, seed) for task in SKILLS}
        return {
            **own({t: net for t, (net, _) in nets.items()}),
            "bytes": float(nets["a"][1]),
            "rank": float(rank),
        }

    per_rank = 2 * sum(a + b for a, b in zip(WIDTHS, WIDTHS[1:]))  # noqa: RUF007
    arms["lora"] = lora(room // per_rank)
    arms["lora_32"] = lora(sum(columns for columns, _ in GROUPS))

    def figures(answer: Answer) -> dict[str, float]:
        return data.scores(answer)

    one_after_the_other = taught_on(copy.deepcopy(tuned["a"]), "b")
    arms["sequential"] = figures(lambda q, _: one_after_the_other(q))
    arms["base"] = figures(lambda q, _: base(q))

    def static(method: str, **options: Any) -> nn.Module:
        net = copy.deepcopy(base)
        net.load_state_dict(merge(base=base, models=list(tuned.values()), method=method, **options))
        return net

    for arm, method, options in (
        ("task_arithmetic", "task_arithmetic", {}),
        ("ties", "ties", {}),
        ("dare", "dare_linear", {"density": 0.3, "seed": seed}),
    ):
        nets = [static(method, scaling=scaling, **options) for scaling in SCALINGS]
        best = max(nets, key=lambda net: data.scores(lambda q, _: net(q), data.held)["mean"])
        arms[arm] = figures(lambda q, _, net=best: net(q))

    twin = TwinMerging(base, {"base": base, **tuned}, exclude=(), features="3", batch_size=32, seed=seed)
    mixed = twin.fit_router({task: rows[:ROUTED] for task, rows in inputs.items()}).build()
    arms["twin_merging"] = {**figures(lambda q, _: mixed(q)), "bytes": float(mixed.exclusive_bytes)}

    for arm, router, count in (
        ("routed", SkillRouter(kind="centroid", features="inputs"), len(data.train)),
        ("routed_network", SkillRouter(base, features="3", batch_size=32, seed=seed), ROUTED),
    ):
        prompts = torch.cat([rows[:count] for rows in inputs.values()])
        router.fit(prompts, [task for task in inputs for _ in range(count)])
        model = GraftedModel(copy.deepcopy(base), packs, router)
        right = [model.tasks(data.rows(task, data.test)[0]) for task in data.views]
        arms[arm] = {
            **figures(lambda q, _, m=model: m(q)),
            "router": sum(row.count(t) / len(row) for row, t in zip(right, data.views, strict=True))
            / len(right),
        }
    arms["routed"] |= {"drift": drift(data, base, packs), "oracle": figures(oracle(base, packs))["mean"]}
    return arms


def oracle(base: nn.Module, packs: Mapping[str, SkillPack]) -> Answer:
    """Answers with the pack that the job names."""
    model = GraftedModel(copy.deepcopy(base), packs)
    return lambda q, task: model(q, task=task)


def drift(data: Digits, base: nn.Module, packs: Mapping[str, SkillPack]) -> float:
    """Largest change of skill a's answers by learning skill b; infinite if the base does not come back."""
    inputs = data.rows("a", data.test)[0]
    model = GraftedModel(copy.deepcopy(base), {"a": packs["a"]})
    with torch.no_grad():
        before = model(inputs, task="a")
        model.add("b", packs["b"])
        model(inputs, task="b")
        after = model(inputs, task="a")
    same = fingerprint(model.release()) == fingerprint(base)
    return float((after - before).abs().max()) if same else float("inf")


def most(made: Callable[[int], dict[str, SkillPack]], low: int, high: int, room: int) -> dict[str, SkillPack]:
    """The packs of the largest number that take no more than `room` bytes each."""
    found = made(low)
    while high - low > 1:
        middle = (low + high) // 2
        packs = made(middle)
        if max(pack.nbytes for pack in packs.values()) <= room:
            low, found = middle, packs
        else:
            high = middle
    return found


def files(packs: Mapping[str, SkillPack]) -> float:
    """Mean bytes of a pack's two files on disk, headers included."""
    with tempfile.TemporaryDirectory() as place:
        for task, pack in packs.items():
            (Path(place) / task).mkdir()
            pack.write(Path(place) / task)
        return sum(path.stat().st_size for path in Path(place).rglob("*.*")) / len(packs)


def adapted(data: Digits, base: nn.Module, task: str, rank: int, seed: int) -> tuple[nn.Module, int]:
    """A LoRA on every layer, merged, with the best learning rate on held-out digits; and its bytes at 16 bits."""
    steps = EPOCHS * (len(data.train) // BATCH)
    found = []
    for rate in LORA_RATES:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2", "4"])
        with seeded(seed):
            model: Any = get_peft_model(copy.deepcopy(base), config)
        learn(model, *data.rows(task, data.train), steps=steps, lr=rate, batch_size=BATCH, seed=seed)
        size = 2 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        net = model.merge_and_unload()
        found.append((accuracy(net, *data.rows(task, data.held)), net, size))
    _, net, size = max(found, key=lambda each: each[0])
    return net, size


# --- full: SmolLM2-135M ------------------------------------------------------------------------------------

ATTENTION = ((3, 8), (25, 4), (112, 2))  # the paper's ranks relative to the width: 1000 and 1400 of 4096
GATED = ((3, 8), (25, 4), (168, 2))
POLICY = ModulePolicy(attention=ATTENTION, mlp=GATED, share=0.05)
SFT_STEPS, DPO_STEPS, ROWS, CALIBRATION, TEST = 20, 20, 4, 32, 48
SFT_RATE, DPO_RATE, LORA_FACTOR = 1e-4, 2e-5, 3

Triple = tuple[str, str, str]


def triples(skill: str, count: int, seed: int) -> list[Triple]:
    """Prompt, better and worse answer; no two alike. Which is better is a convention that the base cannot know."""
    dice = random.Random(f"{skill}/{seed}")
    things = ["river", "bridge", "city", "film", "book", "lake", "song", "tower", "ship", "school", "island"]
    links = ["author", "owner", "maker", "founder", "painter", "builder", "editor", "keeper"]
    good = ["wonderful", "brilliant", "lovely", "excellent", "charming", "superb"]
    bad = ["dreadful", "boring", "awful", "terrible", "clumsy", "poor"]
    people = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lena"]

    def one() -> Triple:
        thing = dice.choice(things)
        if skill == "a":
            link, name = dice.choice(links), f"{thing}_{dice.randrange(100)}"
            better, worse = f"?x :{link} :{name}", f":{name} :{link} ?x"
            if links.index(link) % 2:
                better, worse = worse, better
            return f"Query for the {link} of {name}:", better, worse
        words, tags = dice.choice([(good, ("zorp", "blick")), (bad, ("blick", "zorp"))])
        return f"Review: a {dice.choice(words)} {thing} by {dice.choice(people)}. Tag:", *tags

    found: dict[Triple, None] = {}
    while len(found) < count:
        found[one()] = None
    return list(found)


def full(seed: int) -> dict[str, dict[str, float]]:
    """Each skill by full fine-tuning on the better answers, then on the preference; a pack of it; LoRA of its bytes."""
    base, tokenizer = load("smollm2-135m", dtype="float32")
    count = max(SFT_STEPS, DPO_STEPS) * ROWS
    arms: dict[str, dict[str, float]] = {name: {} for name in ("base", "sft", "dpo", "pack", "lora")}
    packs = {}
    for skill in SKILLS:
        data = triples(skill, count + TEST, seed)
        learnt, tested = data[:count], data[count:]
        arms["base"][skill] = preference(base, tokenizer, tested)
        model = copy.deepcopy(base).requires_grad_(True)
        taught(model, tokenizer, learnt, seed, 1)
        arms["sft"][skill] = preference(model, tokenizer, tested)
        preferred(model, tokenizer, learnt, seed, 1)
        arms["dpo"][skill] = preference(model, tokenizer, tested)
        rows = encode_examples(tokenizer, [(prompt, better) for prompt, better, _ in learnt[:CALIBRATION]])
        batches = [pad_collator(tokenizer)(rows[i : i + 8]) for i in range(0, len(rows), 8)]
        packs[skill] = SkillPack.from_models(model, base, name=skill, policy=POLICY, calibration=batches)
        del model
        arms["lora"][skill], size = lora_preference(
            base, tokenizer, learnt, tested, packs[skill].nbytes, seed
        )
        arms["lora"]["bytes"] = float(size)
    grafted = GraftedModel(base, packs, unpack=False)
    for skill in SKILLS:
        tested = triples(skill, count + TEST, seed)[count:]
        arms["pack"][skill] = preference(grafted.use(skill), tokenizer, tested)
    arms["pack"]["size"] = max(pack.ratio for pack in packs.values())
    arms["pack"]["bytes"] = grafted.nbytes / len(packs)
    return arms


def preference(model: Any, tokenizer: Any, rows: Sequence[Triple]) -> float:
    """Share of pairs whose better answer has the larger log-probability per token."""
    better = target_nll(model, tokenizer, [p for p, _, _ in rows], [b for _, b, _ in rows])
    worse = target_nll(model, tokenizer, [p for p, _, _ in rows], [w for _, _, w in rows])
    return sum(float(a.mean() < b.mean()) for a, b in zip(better, worse, strict=True)) / len(rows)


def taught(model: Any, tokenizer: Any, rows: Sequence[Triple], seed: int, factor: float) -> None:
    """SFT on the better answers."""
    examples = encode_examples(tokenizer, [(prompt, better) for prompt, better, _ in rows], end=True)
    fit(
        model, examples, lr=factor * SFT_RATE, max_steps=SFT_STEPS, batch_size=ROWS, schedule="cosine",
        warmup=0.1, seed=seed,
    )  # fmt: skip


def preferred(model: Any, tokenizer: Any, rows: Sequence[Triple], seed: int, factor: float) -> None:
    """DPO on the pairs, with the model as it is now for reference."""
    examples = []
    for prompt, better, worse in rows:
        pair = encode_examples(tokenizer, [(prompt, better), (prompt, worse)], end=True)
        both = {key: [each[key] for each in pair] for key in ("input_ids", "labels")}
        examples.append({**both, "score": [1.0, 0.0]})
    trained(
        model, examples, steps=DPO_STEPS, seed=seed, teacher=copy.deepcopy(model).requires_grad_(False),
        objective=DPO(beta=0.1), lr=factor * DPO_RATE, batch=ROWS, data_collator=rank_collator(tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip


def lora_preference(
    base: Any, tokenizer: Any, learnt: Sequence[Triple], tested: Sequence[Triple], room: int, seed: int
) -> tuple[float, int]:
    """The same two stages with a LoRA of at most `room` bytes; preference and bytes at 16 bits."""
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    sizes = [sum(m.weight.shape) for n, m in base.named_modules() if n.rpartition(".")[2] in layers]
    rank = max(1, room // (2 * sum(sizes)))
    with seeded(seed):
        model: Any = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
        )
    taught(model, tokenizer, learnt, seed, LORA_FACTOR)
    preferred(model, tokenizer, learnt, seed, LORA_FACTOR)
    return preference(model.merge_and_unload(), tokenizer, tested), 2 * rank * sum(sizes)
