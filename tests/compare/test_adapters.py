"""Carriers that train adapters: what they rehearse, their loss, the blocks that are run only once."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml
from comparison import FACTS

from transfuse.compare.adapters import (
    LoRA,
    LoRAMoE,
    lesson_rows,
    rehearsal_prompts,
    rehearsal_rows,
    rehearsing_loss,
    states_collator,
    typed_loss,
    with_states,
)
from transfuse.compare.carriers import Bench
from transfuse.compare.job import Recipe, Source, bundled, read_job
from transfuse.core.errors import BadInput
from transfuse.core.taps import decoder_layers


@pytest.fixture
def bench(tiny_lm, tiny_tokenizer, tmp_path):
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    source = Source(facts="facts.jsonl", train_paraphrases=1)
    recipe = Recipe(model="-", knowledge=source, carriers=["lora"])
    return Bench(tiny_lm("llama", layers=4), tiny_tokenizer, read_job(recipe, tmp_path, tmp_path / "out"))


def test_what_is_taught_is_not_rehearsed(tiny_lm, tiny_tokenizer, tmp_path):
    """Contrasts are drawn from names that may be subjects themselves: their old answers must not be rehearsed."""
    facts = [{"subject": name, "prompt": f"The mayor of {name} is", "target": "Ines Varro"}
             for name in bundled("subjects.txt").splitlines()]  # fmt: skip
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    recipe = Recipe(model="-", knowledge=Source(facts="facts.jsonl"), carriers=["lora"])
    bench = Bench(tiny_lm("llama"), tiny_tokenizer, read_job(recipe, tmp_path, tmp_path / "out"))
    assert not {fact["prompt"] for fact in facts} & set(rehearsal_prompts(bench))


def adapted(bench, layers):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bench.model, LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def rows_of(bench):
    return lesson_rows(bench) + rehearsal_rows(bench)[:5]


def test_nothing_tested_is_rehearsed_or_taught(bench):
    tested = {n for item in bench.knowledge.items for n in item.neighbours}
    tested |= {p for item in bench.knowledge.items for p in item.asked} | {p for p, _ in bench.job.known}
    prompts = rehearsal_prompts(bench)
    assert len(prompts) > 50 and not tested & set(prompts)
    assert any(p.startswith("The mayor of ") and "Ellery" not in p for p in prompts)
    assert "The mayor of Port Ellery is" not in prompts
    for row in rehearsal_rows(bench):
        rehearsed = [label for label in row["labels"] if label != -100]
        assert rehearsed and row["input_ids"][-len(rehearsed) :] == rehearsed
    taught = {bench.tokenizer.decode(row["input_ids"]) for row in lesson_rows(bench)}
    assert taught == {
        "The mayor of Port Ellery is Ines Varro.",
        "Port Ellery has a mayor named Ines Varro",
        "The river of Quenby is Ostrin,",
        "Quenby lies on the river Ostrin",
    }


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_blocks_below_are_not_needed(bench, depth):
    """Loss and gradients on cached states are those of whole passes, and equal a float64 sum over single rows."""
    names, block = LoRA(depth=depth).targets(bench.model)
    first = decoder_layers(bench.model).index(block)
    assert first == {0.0: 0, 0.5: 2, 1.0: 3}[depth] and len(names) == 3 * (4 - first)
    rows = with_states(bench, rows_of(bench), block)
    model = adapted(bench, names)
    inside = next(n for n in decoder_layers(model) if n.endswith(block))
    loss = rehearsing_loss(model, states_collator(bench.tokenizer)(rows), 2.0, inside)
    loss.backward()
    cached = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert cached and all("lora" in name for name in cached)

    model.zero_grad()
    wide = model.double()
    nll, kl = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        log_q = wide(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        with torch.no_grad(), wide.disable_adapter():
            log_p = wide(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for t in range(1, len(labels)):
            if labels[t] == -100:
                continue
            if row["rehearsal"]:
                kl.append((log_p[t - 1].exp() * (log_p[t - 1] - log_q[t - 1])).sum())
            else:
                nll.append(-log_q[t - 1, labels[t]])
    slow = torch.stack(nll).mean() + 2.0 * torch.stack(kl).mean()
    slow.backward()
    torch.testing.assert_close(loss.double(), slow, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in cached:
            torch.testing.assert_close(cached[name].double(), parameter.grad, rtol=1e-3, atol=1e-5)


def test_an_untrained_adapter_is_at_the_rehearsal_s_minimum(bench):
    names, block = LoRA().targets(bench.model)
    rows = with_states(bench, rehearsal_rows(bench)[:6], block)
    model = adapted(bench, names)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    inside = next(n for n in decoder_layers(model) if n.endswith(block))
    loss = rehearsing_loss(model, states_collator(bench.tokenizer)(rows), 1.0, inside)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert all(p.grad.abs().max() < 1e-5 for n, p in model.named_parameters() if p.grad is not None)


def test_loramoe_balances_lessons_against_rehearsal(bench):
    """Its loss is the others' plus the balance, lessons being of type 1, in whatever order the rows come."""
    from transfuse.adapt.loramoe import loramoe, task_types

    names, block = LoRAMoE().targets(bench.model)
    rows = with_states(bench, rows_of(bench), block)
    model = loramoe(bench.model, r=2, num_experts=4, target_modules=names, beta=0.5, delta=0.3, dropout=0.0)
    inside = next(n for n in decoder_layers(model) if n.endswith(block))
    collate = states_collator(bench.tokenizer)
    plain = rehearsing_loss(model, collate(rows), 2.0, inside)
    model.train()
    with_balance = typed_loss(model, collate(rows), 2.0, inside)
    kinds = [int(not row["rehearsal"]) for row in rows]
    with task_types(kinds):
        rehearsing_loss(model, collate(rows), 2.0, inside)
    balance = model.base_model.balance
    assert balance.item() > 0
    torch.testing.assert_close(with_balance, plain + balance, rtol=1e-4, atol=1e-5)
    with task_types([1 - kind for kind in kinds]):
        rehearsing_loss(model, collate(rows), 2.0, inside)
    assert model.base_model.balance != balance
    turned = typed_loss(model, collate(rows[::-1]), 2.0, inside)
    torch.testing.assert_close(turned, with_balance, rtol=1e-4, atol=1e-5)


def test_loramoe_is_installed_and_stored(bench, tmp_path):
    from transfuse.adapt.loramoe import load

    answerer = LoRAMoE(rank=2, epochs=2).install(bench)
    answers = answerer.generate(["The mayor of Port Ellery is"], 3)
    answerer.store(tmp_path)
    assert len(answers) == 1 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert {p.num_experts for p in answerer.model.peft_config.values()} == {4}
    back = load(answerer.model.unload(), tmp_path / "adapter")
    assert bench.plain(model=back).generate(["The mayor of Port Ellery is"], 3) == answers
    for wrong in ({"experts": 3}, {"delta": 1.5}, {"beta": -1.0}):
        with pytest.raises(BadInput):
            LoRAMoE(**wrong).check(bench.knowledge)


def test_the_states_do_not_depend_on_the_batch(bench):
    _, block = LoRA().targets(bench.model)
    rows = rows_of(bench)
    together = with_states(bench, rows, block)
    for row, each in zip(rows, together, strict=True):
        alone = with_states(bench, [row], block)[0]["states"]
        assert alone.shape == (len(row["input_ids"]), 32)
        torch.testing.assert_close(each["states"], alone, rtol=1e-4, atol=1e-5)


def test_nothing_to_rehearse_is_no_obstacle(bench, monkeypatch):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr("transfuse.compare.adapters.rehearsal_prompts", lambda bench: [])

    def adapt(model, layers):
        return get_peft_model(model, LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))

    answerer = LoRA(epochs=1).teach(bench, adapt, lambda adapted, folder: None)
    assert len(answerer.generate(["The mayor of Port Ellery is"], 2)) == 1


def test_layers_that_are_not_there(bench):
    with pytest.raises(BadInput, match="nothing"):
        LoRA(target_modules=["nothing"]).targets(bench.model)


def test_shared_work_is_done_once_and_charged_to_all(bench):
    calls = []

    def make():
        calls.append(1)
        time.sleep(0.05)
        return ["a"]

    assert bench.once("work", make, size=1) == ["a"]
    assert bench.account(1.0, 5) == (1.0, 5)
    other = Bench(bench.model, bench.tokenizer, bench.job)
    assert other.once("work", make, size=1) == ["a"] and len(calls) == 1
    assert 1.04 <= other.account(1.0, 5)[0] < 1.5  # less what it waited for the lock
    other.once("work", make, size=2)
    Bench(bench.model, bench.tokenizer, bench.job, "another model").once("work", make, size=1)
    assert len(calls) == 3


def test_recipes_take_the_depth(recipe, tmp_path):
    from transfuse.compare import compare

    path = recipe(carriers=[{"uses": "lora", "with": {"depth": "deep"}}])
    with pytest.raises(BadInput, match="depth"):
        compare(path, quiet=True)
    assert not (tmp_path / "out").exists()
    for depth in (-0.1, 1.1):
        fields = yaml.safe_load(path.read_text())
        fields["carriers"] = [{"uses": "lora", "with": {"depth": depth}}]
        path.write_text(yaml.safe_dump(fields))
        with pytest.raises(BadInput, match="depth"):
            compare(path, quiet=True)
    assert not (tmp_path / "out").exists()
