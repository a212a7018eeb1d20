"""Carriers that steer: the small expert learns, the large model stays as it is, figures come from all streams."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from comparison import FACTS

from transfuse.compare.carriers import Bench, find_carrier
from transfuse.compare.job import Recipe, Source, read_job
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.metrics import perplexity
from transfuse.core.taps import decoder_layers

QUICK = {"epochs": 1, "rehearsal": 0.5}
PROMPTS = ["The mayor of Port Ellery is", "Quenby lies on"]


@pytest.fixture
def bench(tiny_lm, tiny_tokenizer, tmp_path):
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    recipe = Recipe(model="-", knowledge=Source(facts="facts.jsonl", train_paraphrases=1), carriers=["lora"])
    model = tiny_lm("llama", layers=4)
    return Bench(model, tiny_tokenizer, read_job(recipe, tmp_path, tmp_path / "out"), "large")


@pytest.mark.parametrize("name", ["proxy-tuning", "dynamic-logits-fusion"])
def test_the_small_one_learns_and_the_large_one_stays(bench, name, tmp_path):
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    carrier = find_carrier(name)(layers=2, **QUICK)
    carrier.check(bench.knowledge)
    answerer = carrier.install(bench)
    assert all(torch.equal(before[key], tensor) for key, tensor in bench.model.state_dict().items())
    large, *small = answerer.steered.models()
    assert large is bench.model and [len(decoder_layers(model)) for model in small] == [2, 2]
    plain = bench.plain()
    assert answerer.tokens_read(PROMPTS) == [3 * n for n in plain.tokens_read(PROMPTS)]
    texts = answerer.generate(PROMPTS, 4)
    assert texts == answerer.steered.generate(PROMPTS, max_new_tokens=4)
    followed = answerer.predictions(PROMPTS, ["Ines", "the river"])
    assert [len(tokens) for tokens in followed] == [
        len(bench.tokenizer(t)["input_ids"]) for t in (" Ines", " the river")
    ]
    answerer.save(tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_perplexity_is_that_of_the_joined_scores(bench):
    answerer = find_carrier("proxy-tuning")(layers=2, alpha=0.7, **QUICK).install(bench)
    text = " ".join(FACTS[0]["paraphrases"] + [FACTS[1]["prompt"]] * 30)
    ids = torch.tensor([bench.tokenizer(text)["input_ids"]])
    assert ids.shape[1] > 128  # more than one piece
    with torch.no_grad():
        base, expert, small = (model(ids).logits[0].double() for model in answerer.steered.models())
    scores = (base + 0.7 * (expert - small)).log_softmax(-1)[:-1]
    wanted = -scores.gather(1, ids[0, 1:, None]).mean()
    assert answerer.perplexity(text) == pytest.approx(float(wanted.exp()), rel=1e-4)
    answerer.steered.alpha = 0.0
    assert answerer.perplexity(text) == pytest.approx(
        perplexity(bench.model, bench.tokenizer, text), rel=1e-4
    )


def test_a_small_model_of_its_own(bench, tiny_lm, tiny_tokenizer, tmp_path):
    tiny_lm("llama", seed=3, layers=1).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    answerer = find_carrier("proxy-tuning")(small=str(tmp_path / "small"), **QUICK).install(bench)
    assert [len(decoder_layers(model)) for model in answerer.steered.models()] == [4, 1, 1]
    bench.tokenizer = copy.deepcopy(tiny_tokenizer)
    bench.tokenizer.add_tokens(["quenbyite"])
    with pytest.raises(IncompatibleModels, match="quenbyite"):
        find_carrier("proxy-tuning")(small=str(tmp_path / "small"), **QUICK).install(bench)


def test_a_small_model_that_is_cut_out_needs_the_weights():
    assert "weights" in find_carrier("proxy-tuning")().needs()
    assert "weights" not in find_carrier("proxy-tuning")(small="smollm2-135m").needs()


def test_chats_are_edited_and_counted_as_they_are_asked(bench):
    """Two streams read the chat twice; an edit's key is where the chat ends, not where the prompt does."""
    tokenizer = copy.deepcopy(bench.tokenizer)
    tokenizer.chat_template = "Somebody asks: {{ messages[0].content }}\nAnswer:"
    job = replace(bench.job, recipe=replace(bench.job.recipe, chat=True))
    chat = Bench(bench.model, tokenizer, job)
    steered = find_carrier("ck-plug")().install(chat)
    alone = len(tokenizer(chat.prompts(PROMPTS[0]))["input_ids"])
    assert steered.tokens_read(PROMPTS[:1]) == [
        chat.plain(render=steered.render).tokens_read(PROMPTS[:1])[0] + alone
    ]
    edited = find_carrier("grace")().install(chat)
    _, river = bench.knowledge.items
    assert edited.generate([river.prompt], 4)[0].startswith(river.answers[0])


def test_bad_arguments_are_refused(bench):
    with pytest.raises(BadInput, match="layers"):
        find_carrier("proxy-tuning")(small="smollm2-135m", layers=3)
    with pytest.raises(BadInput, match="layers"):
        find_carrier("proxy-tuning")(layers=0)
    with pytest.raises(BadInput, match="epochs"):
        find_carrier("proxy-tuning")(epochs=0).check(bench.knowledge)
