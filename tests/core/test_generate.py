"""core.generate: where prompt and target meet, and batched answers and scores against slow loops."""

from __future__ import annotations

import copy
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

from transfuse.core.errors import BadInput
from transfuse.core.generate import (
    check_length,
    encode_pair,
    generate_ids,
    generate_texts,
    pad_batch,
    pad_id_of,
    predicted_tokens,
    target_matches,
    target_nll,
)
from transfuse.core.models import load_tokenizer

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma3"]
PROMPTS = [
    "The mayor of Port Ellery, who was born in Quenby, is",
    "Spain",
    "Who built the bridge over the river Ostrin? An answer:",
    "The capital of France is",
    "It was",
]
TARGETS = ["Ines Varro", "Madrid", "Oskar Tveld did, in 1687.", "Paris", "Ünal"]
END = 2


# --- encode_pair -------------------------------------------------------------------------------------------


def processed(tokenizer, *, trim=None, template=None):
    """A copy of `tokenizer` with other post-processing: trimmed offsets, special tokens around the text."""
    other = copy.deepcopy(tokenizer)
    steps = [processors.ByteLevel(trim_offsets=trim)] if trim is not None else []
    if template is not None:
        steps.append(processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)]))
    other.backend_tokenizer.post_processor = processors.Sequence(steps)
    return other


@pytest.fixture(params=["plain", "trimmed", "untrimmed", "bos", "bos, trimmed", "bos and eos"])
def tokenizer(request, tiny_tokenizer):
    """The tiny tokenizer post-processed as those of common models are, and what it puts before the text."""
    name = request.param
    trim = {"trimmed": True, "untrimmed": False, "bos, trimmed": True}.get(name)
    template = {"bos": "<s> $A", "bos, trimmed": "<s> $A", "bos and eos": "<s> $A </s>"}.get(name)
    return processed(tiny_tokenizer, trim=trim, template=template), [1] if template else []


CASES = [
    ("The capital of France is", "Paris", " Paris"),
    ("The capital of France is  ", " Paris\n", " Paris"),
    ("The bridge was built in", "1687", " 1687"),
    ("The bridge was built by", "Ünal 東京", " Ünal 東京"),  # the space is a token of its own
    ("Emoji:", "🌊", " 🌊"),
    ("Q: who?\nA:\n", "Ines Varro", "Ines Varro"),
    ("Tab\t", "Ines", "Ines"),
    ("東京", "🌊🌊", " 🌊🌊"),
    ("", "Paris", "Paris"),
    ("   ", "Paris", "Paris"),
]


@pytest.mark.parametrize(("prompt", "target", "learnt"), CASES)
def test_pairs_by_hand(tokenizer, prompt, target, learnt):
    tokenizer, bos = tokenizer
    before, after = encode_pair(tokenizer, prompt, target)
    assert tokenizer.decode(after) == learnt
    assert before[: len(bos)] == bos and tokenizer.decode(before[len(bos) :]) == prompt.rstrip(" ")
    if prompt.strip(" "):
        running = tokenizer(prompt.rstrip(" ") + learnt, add_special_tokens=False)["input_ids"]
        assert before[len(bos) :] + after == running  # the pieces of running text


WORDS = st.text(st.sampled_from("abzÜ東🌊.,:-?'1 7\n"), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    prompt=WORDS,
    target=WORDS.filter(str.strip),
    trim=st.booleans(),
    template=st.sampled_from([None, "<s> $A"]),
)
def test_pairs_are_running_text(tiny_tokenizer, prompt, target, trim, template):
    tokenizer = processed(tiny_tokenizer, trim=trim, template=template)
    before, after = encode_pair(tokenizer, prompt, target)
    prompt, target = prompt.rstrip(" "), target.strip()
    gap = "" if not prompt or prompt[-1].isspace() else " "
    assert tokenizer.decode(after) == gap + target
    assert tokenizer.decode(before, skip_special_tokens=True) == prompt
    assert all(isinstance(i, int) for i in before + after)


def test_a_token_across_the_border_is_tokenised_apart():
    """Without a pre-tokenizer, "a b" may be one token; the prompt must keep its own."""
    vocab = {"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4, " b": 5}
    raw = Tokenizer(models.BPE(vocab, [("a", " "), ("a ", "b"), (" ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert tokenizer("a b")["input_ids"] == [4]
    assert encode_pair(tokenizer, "a", "b") == ([0], [5])
    assert encode_pair(tokenizer, "ba", "b") == ([1, 0], [5])


def test_tokenizers_without_offsets(tiny_tokenizer):
    class Slow:
        """What `transformers` gives for tokenizers in Python: no offsets."""

        is_fast = False

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + tiny_tokenizer(text)["input_ids"]}

    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        before, after = encode_pair(tiny_tokenizer, prompt, target)
        assert encode_pair(Slow(), prompt, target) == ([1, *before], after)


def test_real_tokenizer_gives_the_space_before_a_number_to_the_target(smollm_path):
    tokenizer = load_tokenizer(smollm_path)
    before, after = encode_pair(tokenizer, "The bridge was built in", "1687")
    assert [tokenizer.decode([i]) for i in after] == [" ", "1", "6", "8", "7"]
    assert before == tokenizer("The bridge was built in")["input_ids"]


@pytest.mark.parametrize("target", ["", " ", "\n\t "])
def test_empty_targets(tiny_tokenizer, target):
    with pytest.raises(BadInput, match=r"^target = '' is empty; give the text that should follow the prompt"):
        encode_pair(tiny_tokenizer, "The mayor is", target)


# --- padding -----------------------------------------------------------------------------------------------


def test_pad_batch():
    ids, mask = pad_batch([[5, 6, 7], [8], []], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]] and ids.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]] and mask.dtype == torch.int64
    ids, mask = pad_batch([(5, 6, 7), (8,)], 9, side="left", device="cpu")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_padding_token(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.pad_token = "</s>"
    assert pad_id_of(tiny_tokenizer) == 0 and pad_id_of(other) == 2
    other.pad_token = None
    assert pad_id_of(other) == 2
    other.eos_token = None
    assert pad_id_of(other) == 0


def test_check_length(tiny_lm):
    model = tiny_lm("llama")
    check_length(model, 512)
    with pytest.raises(BadInput, match=r"^prompt = '513 tokens' exceeds the model's 512 positions; shorten"):
        check_length(model, 513)
    with pytest.raises(BadInput, match=r"^context = "):
        check_length(model, 513, "context")
    check_length(SimpleNamespace(config=AutoConfig.for_model("mamba")), 10**9)  # has no positions


# --- generate_texts ----------------------------------------------------------------------------------------


def leaning(model, tokens, by):
    """Scale a random model's logits to spread 1 and add `by` to some tokens."""
    lean = torch.zeros(400)
    lean[tokens] = by
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, out: out / out.std(-1, keepdim=True) + lean.to(out.dtype)
    )
    return model


def slow_answer(model, ids, count):
    """Greedy decoding of one row by whole forwards in float64."""
    exact, new = copy.deepcopy(model).double(), []
    for _ in range(count):
        with torch.no_grad():
            new.append(int(exact(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == END:
            break
    return new


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_a_slow_loop(tiny_lm, tiny_tokenizer, architecture):
    model = leaning(tiny_lm(architecture), [END], 2.7)
    answers = [slow_answer(model, tiny_tokenizer(prompt)["input_ids"], 8) for prompt in PROMPTS]
    assert len({len(answer) for answer in answers}) > 1  # some end early
    wanted = [tiny_tokenizer.decode(a, skip_special_tokens=True).lstrip(" ") for a in answers]
    assert len(set(wanted)) > 1
    for size in (1, 2, 16):
        found = generate_texts(model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=size)
        assert found == wanted, size
    found = generate_texts(model, tiny_tokenizer, PROMPTS[::-1], max_new_tokens=8, batch_size=3)
    assert found == wanted[::-1]


def test_the_models_own_sampling_is_off(tiny_lm, tiny_tokenizer, capfd, recwarn):
    model = tiny_lm("llama")
    wanted = generate_texts(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.7, top_k=9, num_beams=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert generate_texts(model, tiny_tokenizer, PROMPTS, max_new_tokens=6) == wanted
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.do_sample and model.generation_config.num_beams == 3
    assert "temperature" not in "".join(capfd.readouterr()) + "".join(str(w.message) for w in recwarn)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [5, 6, 7]}, {"min_new_tokens": 6},
     {"stop_strings": ["a"]}, {"forced_eos_token_id": 5}, {"return_dict_in_generate": True}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_the_models_own_settings_do_not_count(tiny_lm, tiny_tokenizer, settings):
    """Only its end tokens do; a penalty would keep a model from saying what its prompt says."""
    model = leaning(tiny_lm("llama"), [END, 5], 2.7)
    wanted = generate_texts(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config
    assert generate_texts(model, tiny_tokenizer, PROMPTS, max_new_tokens=6) == wanted
    assert model.generation_config is before and getattr(before, name) == value


def test_too_long_a_prompt_is_refused_before_any_answer(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(BadInput, match="positions"):
        generate_texts(model, tiny_tokenizer, ["a", "a " * 5000], max_new_tokens=3, batch_size=1)


def test_generation_edges(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    assert generate_texts(model, tiny_tokenizer, [], max_new_tokens=3) == []
    for prompts, place in (([""], 0), (["The capital", ""], 1)):
        with pytest.raises(BadInput, match=rf"^prompts\[{place}\] = '' has no tokens, .*; give some text"):
            generate_texts(model, tiny_tokenizer, prompts, max_new_tokens=3)
    started = processed(tiny_tokenizer, template="<s> $A")
    (alone,) = generate_texts(model, started, [""], max_new_tokens=3)  # not empty: the beginning is a token
    assert generate_texts(model, started, ["The capital", ""], max_new_tokens=3)[1] == alone
    long = "a" * 3 + " Quenby" * 150
    size = len(tiny_tokenizer(long)["input_ids"])
    assert 300 < size <= 512
    generate_texts(model, tiny_tokenizer, [long], max_new_tokens=512 - size)
    with pytest.raises(BadInput, match=r"^prompt = '513 tokens' exceeds the model's 512 positions"):
        generate_texts(model, tiny_tokenizer, [long, "a"], max_new_tokens=513 - size)


def scripted(model, tokens):
    """Make the model say `tokens` one after another, whatever it reads."""
    script = iter(tokens)

    def say(module, inputs, out):
        out = torch.zeros_like(out)
        out[..., next(script)] = 1.0
        return out

    model.get_output_embeddings().register_forward_hook(say)
    return model


def test_ids_end_with_the_end_of_the_text(tiny_lm, tiny_tokenizer):
    model = scripted(tiny_lm("llama"), [5, 6, END, 7])
    assert generate_ids(model, tiny_tokenizer, ["The capital", "A"], max_new_tokens=4) == [[5, 6, END]] * 2
    model = scripted(tiny_lm("llama"), [5, 6])
    assert generate_ids(model, tiny_tokenizer, ["The capital"], max_new_tokens=2) == [[5, 6]]


def test_special_tokens_and_the_leading_space_are_kept_off(tiny_lm, tiny_tokenizer):
    space = tiny_tokenizer.convert_tokens_to_ids("Ġ")
    letter = tiny_tokenizer.convert_tokens_to_ids("z")
    model = scripted(tiny_lm("llama"), [space, 1, letter, space, letter, END, letter])
    assert generate_texts(model, tiny_tokenizer, ["The capital"], max_new_tokens=7) == ["z z"]


# --- teacher-forced scores ---------------------------------------------------------------------------------


def slow_scores(model, tokenizer, prompts, targets):
    """Per pair (log-likelihoods, argmax, target ids), token by token, unpadded, in float64."""
    exact, found = copy.deepcopy(model).double(), []
    for prompt, target in zip(prompts, targets, strict=True):
        ids, wanted = encode_pair(tokenizer, prompt, target)
        scores, best = [], []
        for token in wanted:
            with torch.no_grad():
                last = exact(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            scores.append(-last[token].item())
            best.append(int(last.argmax()))
            ids = [*ids, token]
        found.append((scores, best, wanted))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_a_slow_loop(tiny_lm, tiny_tokenizer, architecture):
    pairs = zip(PROMPTS, TARGETS, strict=True)
    common = Counter(i for prompt, target in pairs for i in encode_pair(tiny_tokenizer, prompt, target)[1])
    model = leaning(tiny_lm(architecture), [i for i, _ in common.most_common(3)], 4.0)
    wanted = slow_scores(model, tiny_tokenizer, PROMPTS, TARGETS)
    hits = [a == b for _, best, ids in wanted for a, b in zip(best, ids, strict=True)]
    assert 0 < sum(hits) < len(hits) and len({i for _, best, _ in wanted for i in best}) > 2
    for size in (1, 2, 3, 16):
        for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
            arguments = model, tiny_tokenizer, [PROMPTS[i] for i in order], [TARGETS[i] for i in order]
            nll = target_nll(*arguments, batch_size=size)
            best = predicted_tokens(*arguments, batch_size=size)
            match = target_matches(*arguments, batch_size=size)
            for place, i in enumerate(order):
                scores, argmax, ids = wanted[i]
                assert nll[place].dtype == torch.float32 and best[place].dtype == torch.int64
                assert nll[place].tolist() == pytest.approx(scores, abs=1e-4)
                assert best[place].tolist() == argmax
                assert match[place].dtype == torch.bool
                assert match[place].tolist() == [a == b for a, b in zip(argmax, ids, strict=True)]


def test_the_padding_token_takes_no_part(tiny_lm, tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.pad_token = "z"
    model = tiny_lm("llama")
    for a, b in zip(
        target_nll(model, tiny_tokenizer, PROMPTS, TARGETS),
        target_nll(model, other, PROMPTS, TARGETS),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert generate_texts(model, other, PROMPTS, max_new_tokens=6) == generate_texts(
        model, tiny_tokenizer, PROMPTS, max_new_tokens=6
    )


def test_scores_in_half_precision(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama").bfloat16()
    wanted = slow_scores(model, tiny_tokenizer, PROMPTS, TARGETS)
    for found, (scores, _, _) in zip(
        target_nll(model, tiny_tokenizer, PROMPTS, TARGETS), wanted, strict=True
    ):
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx(scores, abs=0.3)


def test_dropout_takes_no_part(tiny_lm, tiny_tokenizer):
    model = tiny_lm("gpt2")  # which has dropout
    answers = generate_texts(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    scores = target_nll(model, tiny_tokenizer, PROMPTS, TARGETS)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    assert generate_texts(model, tiny_tokenizer, PROMPTS, max_new_tokens=6) == answers
    for found, wanted in zip(target_nll(model, tiny_tokenizer, PROMPTS, TARGETS), scores, strict=True):
        assert torch.equal(found, wanted)
    assert [module.training for module in model.modules()] == modes


def test_scores_may_weigh_a_loss(tiny_lm, tiny_tokenizer):
    (scores,) = target_nll(tiny_lm("llama"), tiny_tokenizer, PROMPTS[:1], TARGETS[:1])
    share = torch.ones((), requires_grad=True)
    (share * scores).sum().backward()
    assert share.grad.item() == pytest.approx(float(scores.sum()))


@pytest.mark.parametrize("function", [target_nll, target_matches, predicted_tokens])
def test_refused_scores(tiny_lm, tiny_tokenizer, function):
    model = tiny_lm("llama")
    assert function(model, tiny_tokenizer, [], []) == []
    with pytest.raises(ValueError, match=r"zip\(\)"):
        function(model, tiny_tokenizer, PROMPTS, TARGETS[:2])
    with pytest.raises(BadInput, match=r"^target = '' is empty"):
        function(model, tiny_tokenizer, PROMPTS[:2], ["Ines", " "])
    for prompts, place in ((["", "The capital"], 0), (["The capital of France is", " "], 1)):
        with pytest.raises(BadInput, match=rf"^prompts\[{place}\] = '' has no tokens"):
            function(model, tiny_tokenizer, prompts, ["Paris", "Paris"])
    with pytest.raises(BadInput, match=re.escape("exceeds the model's 512 positions")):
        function(model, tiny_tokenizer, ["a", " Quenby" * 300], ["Ines", "Ines"])
    assert len(function(model, processed(tiny_tokenizer, template="<s> $A"), [""], ["Paris"])[0]) > 0
