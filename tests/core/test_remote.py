"""A model behind a real server on this machine, against the same model in this process."""

from __future__ import annotations

import json
import math

import pytest
import torch

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.generate import pad_batch
from transfuse.core.llm import OpenAICompatible, Scripted, cached
from transfuse.core.lockstep import decode, follow
from transfuse.core.remote import BlackBox
from transfuse.core.streams import Stream, vocabulary_of

TEXTS = ["The mayor of Port Ellery is", "New facts", "A question: who built the bridge?"]
NEW = 6


def only(logits):
    return logits[0]


def offset(logits):
    base, expert, antiexpert = logits
    return base + 0.7 * (expert - antiexpert)


@pytest.fixture
def local(tiny_lm, tiny_tokenizer):
    """Factory of models that score exactly the tokenizer's tokens."""
    return lambda architecture="llama", **options: tiny_lm(architecture, vocab=len(tiny_tokenizer), **options)


@pytest.fixture
def prompts(tiny_tokenizer):
    return pad_batch([tiny_tokenizer(text)["input_ids"] for text in TEXTS], 0, side="left")


def ask(server, tokenizer, **options):
    return BlackBox(OpenAICompatible(server.url, "tiny", retries=1), tokenizer, **options)


@pytest.mark.parametrize("names", ["text", "number", "record"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_is_the_local_model(server, local, tiny_tokenizer, prompts, architecture, names):
    model = local(architecture)
    server.serve(model, tiny_tokenizer, names)
    box = ask(server, tiny_tokenizer, top=3)
    assert vocabulary_of(box) == len(tiny_tokenizer)
    ours = decode([Stream(box, *prompts)], only, max_new_tokens=NEW)
    assert torch.equal(ours, decode([Stream(model, *prompts)], only, max_new_tokens=NEW))
    body = server.requests[0][2]
    assert server.requests[0][0] == "/v1/completions"
    assert (body["max_tokens"], body["logprobs"], body["model"]) == (1, 3, "tiny")
    assert len(server.requests) == NEW * len(TEXTS)


def test_it_is_the_base_of_an_offset(server, local, tiny_tokenizer, prompts):
    """Beside two local models: only the tokens that were returned are ranked, and softmax is over them."""
    base, expert, antiexpert = (local(seed=seed) for seed in range(3))
    server.serve(base, tiny_tokenizer)
    top, scores, expected = 5, [], []

    def masked(logits):
        kept = logits[0].log_softmax(-1).topk(top)
        scored = torch.full_like(logits[0], -math.inf).scatter(1, kept.indices, kept.values)
        expected.append(offset([scored, *logits[1:]]))
        return expected[-1]

    others = [Stream(expert, *prompts), Stream(antiexpert, *prompts)]
    box = Stream(ask(server, tiny_tokenizer, top=top), *prompts)
    ours = decode([box, *others], offset, max_new_tokens=NEW, on_scores=scores.append)
    reference = decode([Stream(base, *prompts), *others], masked, max_new_tokens=NEW)
    assert torch.equal(ours, reference)
    for got, wanted in zip(scores, expected, strict=True):
        assert ((got > -math.inf).sum(1) == top).all()
        torch.testing.assert_close(got.softmax(-1), wanted.softmax(-1), rtol=1e-4, atol=1e-5)
    plain = decode([Stream(base, *prompts)], only, max_new_tokens=NEW)
    assert not torch.equal(ours, plain)


def test_beams_and_other_streams_first(server, local, tiny_tokenizer, prompts):
    model, other = local(), local(seed=4)
    server.serve(model, tiny_tokenizer, "number")
    box = ask(server, tiny_tokenizer, top=len(tiny_tokenizer))
    settings = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": [7, 40]}
    mean = lambda logits: logits[0].log_softmax(-1) + logits[1].log_softmax(-1)  # noqa: E731
    ours = decode([Stream(other, *prompts), Stream(box, *prompts)], mean, **settings)
    theirs = decode([Stream(other, *prompts), Stream(model, *prompts)], mean, **settings)
    assert torch.equal(ours, theirs)


def test_following_asks_at_every_position(server, local, tiny_tokenizer, prompts):
    model = local()
    server.serve(model, tiny_tokenizer)
    box, forced = Stream(ask(server, tiny_tokenizer, top=4), *prompts), torch.tensor([[5, 6, 7]] * 3)
    forced[0] = decode([box], only, max_new_tokens=3)[0]
    ours, theirs = follow([box], only, forced), follow([Stream(model, *prompts)], only, forced)
    assert torch.equal(ours.predictions, theirs.predictions)
    normal = follow([box], lambda z: z[0].log_softmax(-1), forced).logprobs
    torch.testing.assert_close(ours.logprobs, normal)
    assert (ours.logprobs[0] > theirs.logprobs[0]).all()  # four tokens share what 390 did
    assert (ours.logprobs[1:] == -math.inf).any()


@pytest.mark.parametrize("send", ["text", "chat"])
def test_text_and_chats_are_tokenized_by_the_server(server, local, tiny_tokenizer, send):
    """The slow loop writes the text so far down and reads it again at each step, as the server must."""
    model = local(seed=2)
    server.serve(model, tiny_tokenizer)
    system = {"system": "Be brief. "} if send == "chat" else {}
    box = ask(server, tiny_tokenizer, top=10, send=send, **system)
    ids = torch.tensor([tiny_tokenizer(TEXTS[0])["input_ids"]])
    ours = decode([Stream(box, ids)], only, max_new_tokens=NEW)[0].tolist()
    new, said = [], tiny_tokenizer.decode(ids[0])
    for _ in range(NEW):
        text = system.get("system", "") + said + tiny_tokenizer.decode(new)
        with torch.no_grad():
            logits = model(torch.tensor([tiny_tokenizer(text)["input_ids"]])).logits
        new.append(int(logits[0, -1].argmax()))
    assert ours == new
    path, _, body = server.requests[-1]
    if send == "text":
        assert path == "/v1/completions" and body["prompt"].startswith(TEXTS[0])
        return
    assert path == "/v1/chat/completions" and body["top_logprobs"] == 10 and body["logprobs"] is True
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant"]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    first = server.requests[0][2]
    assert [m["role"] for m in first["messages"]] == [
        "system",
        "user",
    ] and "add_generation_prompt" not in first


def test_special_tokens_that_the_server_puts_itself_are_left_off(server, local, tiny_tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    server.serve(local(), tokenizer)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert ids[0, 0] == 1
    decode([Stream(ask(server, tokenizer, send="text"), ids)], only, max_new_tokens=1)
    assert server.requests[-1][2]["prompt"] == TEXTS[0]


def test_ended_and_equal_rows_cost_nothing(server, local, tiny_tokenizer, prompts):
    model = local()
    server.serve(model, tiny_tokenizer)
    free = decode([Stream(model, *prompts)], only, max_new_tokens=NEW)
    end = int(free[1, 1])
    box = ask(server, tiny_tokenizer)
    ours = decode([Stream(box, *prompts)], only, max_new_tokens=NEW, eos_token_id=end)
    assert torch.equal(ours, decode([Stream(model, *prompts)], only, max_new_tokens=NEW, eos_token_id=end))
    written = sum(row.index(end) + 1 if end in row else NEW for row in ours.tolist())
    assert len(server.requests) == box.backend.usage.answers == box.backend.usage.output_tokens == written
    assert written < 3 * NEW
    read = sum(len(body["prompt"]) for _, _, body in server.requests)
    assert box.backend.usage.input_tokens == read
    server.requests.clear()
    same = Stream(box, prompts[0][:1].repeat(4, 1), prompts[1][:1].repeat(4, 1))
    decode([same], only, max_new_tokens=2)
    assert len(server.requests) == 2


def test_answers_are_kept_and_failures_tried_again(server, local, tiny_tokenizer, prompts, tmp_path):
    server.serve(local(), tiny_tokenizer)
    server.plan = [(429, {"retry-after-ms": "10"}, 0.0)]
    runs = []
    for _ in range(2):
        backend = cached(OpenAICompatible(server.url, "tiny"), tmp_path)
        runs.append(decode([Stream(BlackBox(backend, tiny_tokenizer), *prompts)], only, max_new_tokens=NEW))
        asked = len(server.requests)
        assert backend.usage.answers + backend.usage.cached == NEW * 3
    assert torch.equal(*runs)
    assert asked == NEW * 3 + 1  # one refusal, and nothing the second time
    assert backend.usage.cached == NEW * 3
    other = cached(OpenAICompatible(server.url, "tiny", extra_body={"top_k": 3}), tmp_path)
    decode([Stream(BlackBox(other, tiny_tokenizer), *prompts)], only, max_new_tokens=1)
    assert other.usage.cached == 0 and server.requests[-1][2]["top_k"] == 3


def answer(top):
    logprobs = None if top is None else {"top_logprobs": [top], "tokens": ["x"], "token_logprobs": [-1.0]}
    choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": logprobs}
    return json.dumps({"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice]}).encode()


def test_names_that_are_exactly_one_token_count(server, tiny_tokenizer):
    vocabulary = tiny_tokenizer.get_vocab()
    euro = "\\xe2\\x82"  # two thirds of a character: no token of this vocabulary, though each byte is one
    server.body = answer(
        {
            " of": -0.5, "Ġof": -0.75, "</s>": -1.0, "bytes:\\xe2": -2.0, "token_id:9": -3.0, f"bytes:{euro}": -0.1,
            "the mayor": -0.2, "token_id:99999": -0.3, "": -0.4, "\ufffd": -0.6,
        }
    )  # fmt: skip
    [scores] = decode_scores(server, tiny_tokenizer)
    expected = {vocabulary["Ġof"]: -0.5, vocabulary["</s>"]: -1.0, vocabulary["â"]: -2.0, 9: -3.0}
    assert {i: scores[i].item() for i in (scores > -math.inf).nonzero().flatten().tolist()} == expected


def decode_scores(server, tokenizer, **options):
    seen = []
    box = ask(server, tokenizer, **options)
    decode([Stream(box, torch.tensor([[5, 6]]))], only, max_new_tokens=1, on_scores=seen.append)
    return seen[0]


def test_what_cannot_be_used_is_refused(server, local, tiny_tokenizer, prompts):
    server.body = answer({"the mayor": -0.2, "quenby town": -3.0})
    with pytest.raises(IncompatibleModels, match=r"the mayor.*none of the tokens.*served model's tokenizer"):
        decode_scores(server, tiny_tokenizer)
    for empty in (None, {}):
        server.body = answer(empty)
        with pytest.raises(NotApplicable, match="returns no log-probabilities"):
            decode_scores(server, tiny_tokenizer)
    server.body, server.plan = None, [(400, {"message": "logprobs must be at most 5"}, 0.0)]
    with pytest.raises(BadInput, match="at most 5"):
        decode_scores(server, tiny_tokenizer, top=50)
    with pytest.raises(NotApplicable, match="does not tell log-probabilities"):
        decode([Stream(BlackBox(Scripted([]), tiny_tokenizer), *prompts)], only, max_new_tokens=1)
    asked = len(server.requests)
    for options, message in (
        ({"send": "fax"}, "send = 'fax'"),
        ({"system": "Be brief."}, "belongs to a chat"),
    ):
        with pytest.raises(BadInput, match=message):
            ask(server, tiny_tokenizer, **options)
    for top in (0, 2.5, True):
        with pytest.raises(BadInput, match="top = "):
            decode_scores(server, tiny_tokenizer, top=top)
    box = ask(server, tiny_tokenizer, max_length=10)
    with pytest.raises(BadInput, match="10 positions of BlackBox"):
        decode([Stream(box, *prompts)], only, max_new_tokens=1)
    small = ask(server, tiny_tokenizer, vocab_size=50)
    with pytest.raises(IncompatibleModels, match="scores 50 tokens"):
        decode([Stream(local(), *prompts), Stream(small, *prompts)], only, max_new_tokens=1)
    assert len(server.requests) == asked
