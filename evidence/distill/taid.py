"""Does a target that slides from student to teacher beat forward and reverse KL on a small language model?

quick: characters of English prose, a GRU teacher and a GRU student that is much smaller. full: the same student under
Llama teachers of three sizes, then SmolLM2-135M over six of its own blocks (recorded, no rule; on a CPU with the first
seed alone).
"""

from __future__ import annotations

from typing import Any

from _shared import lmkd

from transfuse.distill.survey_kd_llm import get
from transfuse.distill.taid import TAID

SLUG = "taid"
CLAIM = (
    "MT-Bench of TinyLlama-1.1B taught by Phi-3-mini / TinyLlama by Llama-2-7B / Pythia-410M by StableLM-Zephyr-3B: "
    "TAID 4.05 / 4.27 / 3.05, linear TAID 3.44 / 4.18 / 2.88, forward KL 2.71 / 3.99 / 2.74, reverse KL 3.48 / 3.92 / "
    "2.53; it neither averages over modes like forward KL nor collapses like reverse KL."
)
RULE = {
    "quick": (
        "taid.nll <= fkl.nll - 0.01 in 3/3 seeds; taid.sample_nll <= fkl.sample_nll - 0.05 in 3/3 seeds; "
        "taid.nll <= rkl.nll - 0.05 in 3/3 seeds"
    ),
    "full": (
        "taid_256.nll <= fkl_256.nll - 0.01 in 5/5 seeds; taid_256.sample_nll <= fkl_256.sample_nll - 0.05 in 5/5 "
        "seeds; taid_256.nll <= rkl_256.nll - 0.05 in 5/5 seeds"
    ),
}
SEEDS = {"quick": 3, "full": 5}
NOTES = (
    "Reverse KL keeps the best NLL of its own samples under the teacher; the rule asks TAID to beat it on held-out "
    "text only. Linear against adaptive schedule is reported without a rule. Learning rate, batch and number of "
    "samples were chosen on seeds 100 to 102, which are not recorded. Full, on a CPU: ahead of forward KL in all five "
    "seeds on held-out text and of its samples, but in one of them by less than the margins, which were set for a GRU "
    "teacher. Sharper teachers do not help this student: from 64 to 256 wide it goes from 2.193 to 2.214 nats. At "
    "SmolLM2-135M, 30 updates, TAID lies between forward and reverse KL in both figures."
)

# On either device: width and layers of the teachers, their updates, and every arm's at SmolLM2-135M.
SCALES = {
    "cuda": ({128: (128, 2), 256: (256, 4), 384: (384, 6)}, 600, 100),
    "cpu": ({64: (64, 2), 128: (128, 2), 256: (256, 4)}, 400, 30),
}


def arms() -> dict[str, Any]:
    """Objectives by arm."""
    return {
        "fkl": get("forward-kl"),
        "rkl": get("reverse-kl"),
        "linear": TAID(t_start=0.3, alpha=0.0),
        "taid": TAID(t_start=0.3),
    }


def baselines() -> dict[str, Any]:
    """The paper's further ones, in the full tier."""
    return {
        "tvd": get("total-variation"),
        "jsd": get("jsd", beta=0.1),
        "skl": get("skew-kl"),
        "srkl": get("skew-reverse-kl"),
        "akl": get("adaptive-kl"),
        "dkd": get("dkd", alpha=1.0, beta=0.5),
    }


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    return full(seed) if tier == "full" else measured(lmkd.characters(seed), arms(), seed, lmkd.STEPS)


def measured(
    setting: lmkd.Setting, objectives: dict[str, Any], seed: int, steps: int
) -> dict[str, dict[str, float]]:
    """The teacher's and every arm's figures on characters; plain fine-tuning for as many updates is "sft"."""
    held = setting.held[: len(setting.held) // 48 * 48].view(-1, 48)
    found = {"teacher": {"nll": lmkd.nll(setting.teacher, held, setting.device)}}
    for name, objective in {"sft": get("cross-entropy"), **objectives}.items():
        teacher = None if name == "sft" else setting.teacher
        student = lmkd.arm(setting, objective, seed, steps=steps, teacher=teacher)
        found[name] = lmkd.judged(student, setting, seed)
    return found


def full(
    seed: int,
    *,
    scale: tuple[dict[int, tuple[int, int]], int, int] | None = None,
    warm_steps: int = lmkd.WARM_STEPS,
    steps: int = lmkd.STEPS,
) -> dict[str, dict[str, float]]:
    """SmolLM2-135M, loaded first, so that its lack is told at once; then three teacher sizes on characters."""
    device = lmkd.best_device()
    sizes, teacher_steps, token_steps = scale or SCALES[device]
    found = over_tokens(seed, token_steps) if device == "cuda" or seed == 0 else {}
    for width, size in sizes.items():
        setting = lmkd.characters(
            seed, size=size, teacher_steps=teacher_steps, warm_steps=warm_steps, steps=steps, device=device
        )
        more = baselines() if width == 256 else {}
        figures = measured(setting, {**arms(), **more}, seed, steps)
        found.update({f"{name}_{width}": each for name, each in figures.items()})
    return found


def over_tokens(seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Every arm's figures at SmolLM2-135M."""
    setting = lmkd.smollm(seed, steps=steps)
    found = {"smollm_teacher": lmkd.judged_tokens(setting.teacher, setting, seed)}
    for name, objective in {"sft": get("cross-entropy"), **arms()}.items():
        teacher = None if name == "sft" else setting.teacher
        student = lmkd.arm(setting, objective, seed, steps=steps, teacher=teacher, lr=5e-4)
        found[f"smollm_{name}"] = lmkd.judged_tokens(student, setting, seed)
    return found
