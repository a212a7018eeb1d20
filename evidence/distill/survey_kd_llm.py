"""Are the standard objectives exact, and do they differ as the survey says?

quick: values and slopes of each against formulas written here; then forward KL, reverse KL and a stored top-16 teacher
on characters of English prose, and once a teacher with another tokenizer. full: every objective from SmolLM2-135M to
six of its own blocks, and sampling by the student (GKD) against the same divergence on fixed text; on a CPU with fewer
and shorter rows.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from _shared import charlm, lmkd
from torch import Tensor

from transfuse.core.training import generator
from transfuse.distill import LogitStore, Policy, Signal
from transfuse.distill._cross import ULD, CrossCollator
from transfuse.distill.survey_kd_llm import get

SLUG = "survey-kd-llm"
CLAIM = (
    "A survey without figures of its own: six ways to elicit knowledge from a teacher and four classes of algorithms "
    "to distil it. Forward KL covers the teacher's modes (best held-out NLL), reverse KL seeks them (best samples), "
    "and a stored top-k stands in for whole logits."
)
EXACT = (
    "values.value_error <= 1e-9; values.slope_error <= 1e-9; values.at_equality <= 1e-12; "
    "values.jsd_half <= 0.69314718056"
)
RULE = {
    "quick": (
        f"{EXACT}; rkl.sample_nll <= fkl.sample_nll - 0.2 in 3/3 seeds; fkl.nll <= rkl.nll - 0.05 in 3/3 seeds; "
        "topk.nll <= 1.02 * fkl.nll in 3/3 seeds"
    ),
    "full": (
        "reverse_kl.sample_nll <= forward_kl.sample_nll - 0.2 in 3/3 seeds; forward_kl.nll <= reverse_kl.nll - 0.05 "
        "in 3/3 seeds; topk.nll <= 1.02 * forward_kl.nll in 3/3 seeds"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "The learning rate was chosen on seeds 100 and 101, which are not recorded: at 3e-3, half of it, the stored "
    "top-16 was 2.03% and 1.57% behind whole logits there, at 6e-3 1.80% and 1.41%. topk: 16 of 94 characters (full: "
    "64 of 49,152 tokens) and one class for the rest, in float16. uld, taught by a model of 256 pieces of words, is "
    "reported against sft without a rule (quick: first seed only, for time): no gain, its NLL is 0.09 above that of "
    "fine-tuning alone. In the full tier GKD against JSD on fixed text and all other objectives are reported without "
    "a rule, too. There, on a CPU, every arm makes 30 updates after a warm-up of 30: the students are far from the "
    "teacher (held-out NLL 5.4 to 6.4, the teacher's is 3.3), and what is compared is the direction they set out in. "
    "Sampling by so weak a student does not pay yet: GKD is at 6.26 where the same divergence on fixed text is at "
    "5.96, and its samples are less likely to the teacher (6.26 against 5.73)."
)

K, FULL_K, RATE = 16, 64, 6e-3


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    return full(seed) if tier == "full" else {"values": values(seed), **characters(seed, other=seed == 0)}


# --- against formulas --------------------------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def adaptive(p: Tensor, q: Tensor, label: int) -> Tensor:
    """Head and tail found by sorting, the weights without gradient."""
    order = sorted(range(len(p)), key=lambda v: float(p[v]))
    below = [float(p[order[: i + 1]].sum()) >= 0.5 for i in range(len(p))]
    gap = (p - q).abs().detach()
    high = sum(float(gap[v]) for v, inside in zip(order, below, strict=True) if inside)
    low = sum(float(gap[v]) for v, inside in zip(order, below, strict=True) if not inside)
    share = high / (high + low) if high + low else 0.5
    return share * kl(p, q) + (1 - share) * kl(q, p)


def decoupled(p: Tensor, q: Tensor, label: int) -> Tensor:
    """Target against the rest, and the rest among themselves."""
    others = [v for v in range(len(p)) if v != label]
    rest_p, rest_q = p[others].sum(), q[others].sum()
    binary = kl(torch.stack([p[label], rest_p]), torch.stack([q[label], rest_q]))
    return binary + kl(p[others] / rest_p, q[others] / rest_q)


FORMULAS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "forward-kl": lambda p, q, label: kl(p, q),
    "reverse-kl": lambda p, q, label: kl(q, p),
    "jsd": lambda p, q, label: 0.5 * (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)),
    "skew-kl": lambda p, q, label: kl(p, 0.1 * p + 0.9 * q),
    "skew-reverse-kl": lambda p, q, label: kl(q, 0.9 * p + 0.1 * q),
    "total-variation": lambda p, q, label: 0.5 * (p - q).abs().sum(),
    "adaptive-kl": adaptive,
    "dkd": decoupled,
    "cross-entropy": lambda p, q, label: -q[label].log(),
}


def values(seed: int) -> dict[str, float]:
    """Largest differences over all objectives on random logits with masked tokens and logits of -inf."""
    random = generator(seed)
    z = 3 * torch.randn(2, 3, 6, 11, generator=random, dtype=torch.float64)
    labels = torch.randint(1, 11, (3, 6), generator=random)
    labels[0, :3] = -100
    labels[2, 4:] = -100
    teacher = z[1].clone()
    teacher[..., 0] = -torch.inf
    found = {"value_error": 0.0, "slope_error": 0.0, "at_equality": 0.0}
    for name, formula in FORMULAS.items():
        student = z[0].clone()
        student[..., 0] = -torch.inf
        student.requires_grad_()
        loss = get(name)(Signal(logits=student), Signal(logits=teacher), {"labels": labels})["loss"]
        (slope,) = torch.autograd.grad(loss, student)
        finite = z[0][..., 1:].clone().requires_grad_()  # the same without the excluded class
        q, p = torch.softmax(finite, -1), torch.softmax(teacher[..., 1:], -1)
        places = [(b, t) for b in range(3) for t in range(5) if labels[b, t + 1] != -100]
        expected = torch.stack(
            [formula(p[b, t], q[b, t], int(labels[b, t + 1]) - 1) for b, t in places]
        ).mean()
        (wanted,) = torch.autograd.grad(expected, finite)
        found["value_error"] = max(found["value_error"], abs(float(loss.detach()) - float(expected.detach())))
        gap = torch.nan_to_num(slope[..., 1:] - wanted, nan=torch.inf).abs().max()
        excluded = torch.nan_to_num(slope[..., 0], nan=torch.inf).abs().max()
        found["slope_error"] = max(found["slope_error"], float(gap), float(excluded))
        if name != "cross-entropy":
            same = get(name)(Signal(logits=teacher.clone()), Signal(logits=teacher), {"labels": labels})
            found["at_equality"] = max(found["at_equality"], abs(float(same["loss"])))
    far = {"labels": torch.ones_like(labels)}
    found["jsd_half"] = float(get("jsd")(Signal(logits=50 * z[0]), Signal(logits=-50 * z[0]), far)["loss"])
    return found


# --- characters --------------------------------------------------------------------------------------------


def characters(seed: int, *, other: bool, device: str = "cpu") -> dict[str, dict[str, float]]:
    """The student after plain fine-tuning, forward KL, reverse KL, and forward KL from a stored top-16.

    With `other`, also after fine-tuning with ULD from a teacher of another tokenizer.
    """
    setting = lmkd.characters(seed, rate=RATE, device=device)
    found = {}
    for name, objective in (("sft", "cross-entropy"), ("fkl", "forward-kl"), ("rkl", "reverse-kl")):
        teacher = None if name == "sft" else setting.teacher
        student = lmkd.arm(setting, objective, seed, teacher=teacher, lr=RATE)
        found[name] = lmkd.judged(student, setting, seed)
    with tempfile.TemporaryDirectory() as folder:
        store = LogitStore.capture(setting.teacher, setting.rows, folder, k=K, batch_size=128)
        student = lmkd.arm(setting, "forward-kl", seed, teacher=store, lr=RATE)
        found["topk"] = {**lmkd.judged(student, setting, seed), "bytes_per_token": store.bytes_per_token}
    if other:
        found["uld"] = {"nll": charlm.held_out_nll(across(setting, seed).cpu(), setting.held)}
    return found


def across(setting: lmkd.Setting, seed: int) -> Any:
    """The student after cross-entropy and ULD on the rows of the other arms, from a teacher on 256 pieces of words."""
    train, _, alphabet = charlm.encoded()
    letters, pieces = tokenizers(alphabet, "".join(alphabet[i] for i in train.tolist()))
    ids = torch.tensor(pieces("".join(alphabet[i] for i in train.tolist()))["input_ids"])
    teacher = charlm.make(seed, len(pieces), 128, 2).to(setting.device)
    many = charlm.windows(ids, lmkd.TEACHER_STEPS * lmkd.BATCH, seed, 24)
    lmkd.trained(teacher, many, steps=lmkd.TEACHER_STEPS, seed=seed, lr=RATE, device=setting.device)
    texts = ["".join(alphabet[i] for i in row["input_ids"]) for row in setting.rows]
    texts = [text for text in texts if text.strip()]
    student = copy.deepcopy(setting.student).to(setting.device)
    return lmkd.trained(
        student, texts, steps=lmkd.STEPS, seed=seed, teacher=teacher, objective=ULD(), lr=RATE,
        device=setting.device, data_collator=CrossCollator(letters, pieces),
    )  # fmt: skip


def tokenizers(alphabet: str, text: str) -> tuple[Any, Any]:
    """One that reads single characters, numbered as in the alphabet, and one of 256 merged pieces."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    single = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    merged = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+|\n+| +|[^A-Za-z \n]+")
    merged.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=list(alphabet), show_progress=False)
    merged.train_from_iterator([text], trainer)
    found = [PreTrainedTokenizerFast(tokenizer_object=each) for each in (single, merged)]
    return found[0], found[1]


# --- SmolLM2-135M ------------------------------------------------------------------------------------------


STEPS = {"cuda": 150, "cpu": 30}  # of the warm-up, and of every arm


def full(seed: int, *, steps: int | None = None) -> dict[str, dict[str, float]]:
    """Every objective on the same rows; the model is loaded first, so that its lack is told at once."""
    steps = steps or STEPS[lmkd.best_device()]
    setting = lmkd.smollm(seed, steps=steps)

    def learnt(objective: Any, **options: Any) -> dict[str, float]:
        student = lmkd.arm(setting, objective, seed, steps=steps, lr=5e-4, **options)
        return lmkd.judged_tokens(student, setting, seed)

    found = {
        "teacher": lmkd.judged_tokens(setting.teacher, setting, seed),
        "warm": lmkd.judged_tokens(setting.student, setting, seed),
    }
    for name in FORMULAS:
        alone = {"teacher": None} if name == "cross-entropy" else {}
        found[name.replace("-", "_")] = learnt(name, **alone)
    found["gkd"] = learnt("jsd", policy=Policy(fraction=0.5, max_new_tokens=48, prompt_tokens=16))
    with tempfile.TemporaryDirectory() as folder:
        store = LogitStore.capture(setting.teacher, setting.rows, folder, k=FULL_K, batch_size=16)
        found["topk"] = {**learnt("forward-kl", teacher=store), "bytes_per_token": store.bytes_per_token}
    more = characters(seed, other=True, device=lmkd.best_device())
    return {**found, **{f"characters_{name}": more[name] for name in ("sft", "uld")}}
