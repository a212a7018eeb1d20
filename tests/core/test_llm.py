"""Text backends: a real local model, a real HTTP server on this machine, the script, the cache over them."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time

import pytest

from transfuse.core.errors import BadInput, Unavailable
from transfuse.core.files import sha256_json
from transfuse.core.llm import Local, OpenAICompatible, Scripted, cached, parse_json
from transfuse.core.llm import cache as cache_module

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "towns": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "towns"],
    "additionalProperties": False,
}


# A local model.


def test_greedy_equals_one_prompt_at_a_time(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    prompts = ["The capital", "A question: who built the bridge over", "New", "The mayor of Port Ellery"]
    batched = Local(model, tiny_tokenizer, batch_size=3).complete(prompts, max_tokens=7)
    for prompt, got in zip(prompts, batched, strict=True):
        ids = tiny_tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert got.text == tiny_tokenizer.decode(out, skip_special_tokens=True)
        assert (got.input_tokens, got.output_tokens) == (ids.shape[1], len(out))
        assert got.truncated == (len(out) == 7 and int(out[-1]) != tiny_tokenizer.eos_token_id)


def test_samples_follow_the_softmax(tiny_lm, tiny_tokenizer):
    import torch

    from transfuse.core.llm.decode import generate_rows

    model, draws, temperature = tiny_lm("gpt2", seed=3), 4000, 1.7
    row = tiny_tokenizer("The mayor")["input_ids"]
    rows = [row] * draws
    got = generate_rows(
        model, tiny_tokenizer, rows, max_new_tokens=1, batch_size=500, temperature=temperature, seed=5,
        draws=range(draws),
    )  # fmt: skip
    with torch.no_grad():
        p = (model(torch.tensor([row])).logits[0, -1].double() / temperature).softmax(-1)
    top = p.topk(5)
    for probability, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        text = tiny_tokenizer.decode([token], skip_special_tokens=True)
        same = sum(float(q) for t, q in enumerate(p) if tiny_tokenizer.decode([t]) == text)
        share = sum(text == answer for answer, _, _ in got) / draws
        assert probability <= same + 1e-12
        assert abs(share - same) < 4.5 * (same * (1 - same) / draws) ** 0.5  # 4.5 standard errors


def test_top_k_samples_follow_the_softmax_of_the_likeliest(tiny_lm, tiny_tokenizer):
    import torch

    from transfuse.core.llm.decode import generate_rows

    model, draws, temperature = tiny_lm("gpt2", seed=5), 3000, 0.2
    row = tiny_tokenizer("The mayor")["input_ids"]
    got = generate_rows(
        model, tiny_tokenizer, [row] * draws, max_new_tokens=1, batch_size=500, temperature=temperature, top_k=3,
        seed=5, draws=range(draws),
    )  # fmt: skip
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0, -1].double().tolist()
    kept = sorted(range(len(logits)), key=lambda t: -logits[t])[:3]
    masses = [math.exp((logits[t] - logits[kept[0]]) / temperature) for t in kept]
    texts = [tiny_tokenizer.decode([t]) for t in kept]
    assert len(set(texts)) == 3 and {answer for answer, _, _ in got} == set(texts)
    for text, mass in zip(texts, masses, strict=True):
        p = mass / sum(masses)
        share = sum(answer == text for answer, _, _ in got) / draws
        assert abs(share - p) < 4.5 * (p * (1 - p) / draws) ** 0.5  # 4.5 standard errors


def test_the_likeliest_alone_is_the_greedy_answer(tiny_lm, tiny_tokenizer):
    """With a schema too: the likeliest are taken among what the grammar allows."""
    backend = Local(tiny_lm("llama"), tiny_tokenizer)
    prompts = ["The capital", "New facts", "New facts"]
    for schema in (None, PERSON):
        how = {"max_tokens": 24, "schema": schema}
        greedy = [c.text for c in backend.complete(prompts, **how)]
        one = backend.complete(prompts, temperature=1.5, top_k=1, seed=1, **how)
        free = backend.complete(prompts, temperature=1.5, seed=1, **how)
        many = backend.complete(prompts, temperature=1.5, top_k=10**6, seed=1, **how)
        assert [c.text for c in one] == greedy != [c.text for c in free] == [c.text for c in many]


def test_samples_do_not_depend_on_the_batch_and_leave_the_global_state(tiny_lm, tiny_tokenizer):
    import torch

    model, prompts = tiny_lm("qwen2"), ["The capital of", "New facts", "A question", "A question"]
    before = torch.get_rng_state()
    options = {"max_tokens": 8, "temperature": 1.0, "seed": 11}
    together = [c.text for c in Local(model, tiny_tokenizer).complete(prompts, **options)]
    apart = [c.text for c in Local(model, tiny_tokenizer, batch_size=1).complete(prompts, **options)]
    turned = [c.text for c in Local(model, tiny_tokenizer).complete(prompts[:2][::-1], **options)][::-1]
    assert together == apart and together[:2] == turned
    assert together[2] != together[3], "equal prompts must get different samples"
    other = Local(model, tiny_tokenizer).complete(prompts, **{**options, "seed": 12})
    assert [c.text for c in other] != together
    free = [
        Local(model, tiny_tokenizer).complete(prompts[:1], max_tokens=8, temperature=1.0) for _ in range(4)
    ]
    assert len({c[0].text for c in free}) > 1, "without a seed each call samples anew"
    assert torch.equal(before, torch.get_rng_state())


def test_a_random_model_is_held_to_the_schema(tiny_lm, tiny_tokenizer):
    """Unconstrained, these samples are noise; every finished answer must satisfy the schema all the same."""
    backend = Local(tiny_lm("llama"), tiny_tokenizer)
    options = {"max_tokens": 120, "temperature": 1.0, "schema": PERSON, "seed": 2}
    answers = backend.complete(["Invent a person."] * 12, **options)
    done = [a for a in answers if not a.truncated]
    assert len(done) >= 6 and len({a.text for a in done}) > 3
    for answer in done:
        value = json.loads(answer.text)
        assert answer.parsed == value and set(value) == set(PERSON["required"])
        assert len(value["name"]) <= 12 and 0 <= value["age"] <= 120 and 1 <= len(value["towns"]) <= 2
    for answer in answers:
        assert answer.truncated == (answer.parsed is None)


def test_the_real_model_answers_in_json_and_follows_its_chat_template(smollm):
    backend = Local(*smollm)
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 30}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    questions = [f"What is the capital of {land}? Answer in JSON." for land in ("France", "Italy")]
    france, italy = backend.complete(questions, max_tokens=40, schema=schema)
    assert "Paris" in france.parsed["capital"] and set(italy.parsed) == {"capital"}
    talk = [
        {"role": "user", "content": "My name is Ottilie."},
        {"role": "assistant", "content": "Hello Ottilie!"},
        {"role": "user", "content": "What is my name?"},
    ]
    [answer] = backend.complete([talk], max_tokens=12)
    model, tokenizer = smollm
    inputs = tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
    assert answer.input_tokens == inputs["input_ids"].shape[1]
    assert backend.usage.answers == 3
    assert backend.usage.input_tokens == france.input_tokens + italy.input_tokens + answer.input_tokens
    assert backend.usage.output_tokens == france.output_tokens + italy.output_tokens + answer.output_tokens

    [short] = backend.complete(questions[:1], max_tokens=4, schema=schema)
    assert short.truncated and short.parsed is None and short.output_tokens == 4


def test_grammar_admits_every_script(smollm):
    from transfuse.core.llm.decode import grammar, grammar_tokenizer

    model, tokenizer = smollm
    text = json.dumps(
        {"name": "Žofie 東京 🙂", "age": 7, "towns": ["Œ\n"]}, ensure_ascii=False, separators=(",", ":")
    )
    matcher = grammar(grammar_tokenizer(model, tokenizer), PERSON)
    ids = tokenizer(text).input_ids
    assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_stop_texts_end_a_row_and_are_left_off(smollm):
    prompts = ["Tell me about the river Rhine.", "Say: hello"]
    full = Local(*smollm).complete(prompts, max_tokens=24)
    stop = full[0].text.split()[5]
    short = Local(*smollm).complete(prompts, max_tokens=24, stop=["never said", stop])
    assert short[0].text == full[0].text[: full[0].text.index(stop)] and not short[0].truncated
    assert 0 < short[0].output_tokens < full[0].output_tokens
    assert stop in full[1].text or short[1] == full[1]


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[token] for token in range(3, 90)]},
        {"suppress_tokens": list(range(90))},
        {"return_dict_in_generate": True},
        {"forced_eos_token_id": 2},
    ],
)
def test_settings_of_the_model_do_not_act(tiny_lm, tiny_tokenizer, setting):
    """The likeliest token is taken, and a schema held to, whatever the model's generation configuration says."""
    listed = {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 6, "maxItems": 6}
    plain, other = tiny_lm("llama"), tiny_lm("llama")
    for name, value in setting.items():
        setattr(other.generation_config, name, value)
    for options in ({"max_tokens": 10}, {"max_tokens": 60, "schema": listed}):
        wanted, got = (Local(m, tiny_tokenizer).complete(["The mayor"], **options) for m in (plain, other))
        assert got == wanted
    assert len(got[0].parsed) == 6


def test_a_model_in_training_mode_answers_as_in_evaluation(tiny_lm, tiny_tokenizer):
    model = tiny_lm("gpt2")
    wanted = Local(model, tiny_tokenizer).complete(["The mayor of"], max_tokens=10)
    model.train()
    assert Local(model, tiny_tokenizer).complete(["The mayor of"], max_tokens=10) == wanted
    assert all(module.training for module in model.modules())


def test_a_long_prompt_is_refused_before_the_others_are_read(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama")
    monkeypatch.setattr(model, "forward", None)  # would fail
    with pytest.raises(BadInput, match="512 positions"):
        Local(model, tiny_tokenizer, batch_size=1).complete(["short", "word " * 600], max_tokens=4)


def test_identity_follows_settings_beside_the_weights(tiny_lm, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    model = tiny_lm("llama")
    backend = Local(model, tiny_tokenizer)
    seen = [backend.identity]
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    seen.append(backend.identity)
    model.generation_config.eos_token_id = [2, 50]
    seen.append(backend.identity)
    backend = Local(get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"])), tiny_tokenizer)
    seen.append(backend.identity)
    model.model.layers[0].mlp.down_proj.scaling["default"] = 3.0
    seen.append(backend.identity)
    assert len(set(seen)) == 5
    model.config._name_or_path = "moved/elsewhere"
    assert backend.identity == seen[-1]


def test_identity_follows_weights_and_adapters(tiny_lm, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    model = tiny_lm("llama")
    backend = Local(model, tiny_tokenizer)
    first = backend.identity
    assert Local(tiny_lm("llama"), tiny_tokenizer).identity == first
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    assert backend.identity != first
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    on = Local(adapted, tiny_tokenizer).identity
    with adapted.disable_adapter():
        assert Local(adapted, tiny_tokenizer).identity != on


def test_local_refuses_what_it_cannot_do(tiny_lm, tiny_tokenizer):
    backend = Local(tiny_lm("llama"), tiny_tokenizer)
    with pytest.raises(BadInput, match="no chat template"):
        backend.complete([[{"role": "system", "content": "Be brief."}]], max_tokens=4)
    with pytest.raises(BadInput, match="512 positions"):
        backend.complete(["word " * 600], max_tokens=4)
    with pytest.raises(BadInput, match="cannot be enforced"):
        backend.complete(["x"], max_tokens=4, schema={"not": {"type": "string"}})
    with pytest.raises(BadInput, match="batch_size = 0 is not a whole number"):
        Local(backend.model, tiny_tokenizer, batch_size=0)
    endless, ends = tiny_lm("llama"), copy.deepcopy(tiny_tokenizer)
    endless.generation_config.eos_token_id = ends.eos_token = None
    with pytest.raises(BadInput, match="has no token that ends a text; set"):
        Local(endless, ends).complete(["x"], max_tokens=4, schema={"type": "boolean"})
    assert backend.usage.answers == 0


# A server.


def test_the_request_is_the_protocol(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cret")
    server.text = '```json\n{"name": "Ada", "age": 36, "towns": ["Ost"]}\n```'
    backend = OpenAICompatible(server.url + "/", "small", api_key_env="A_KEY")
    [answer] = backend.complete(
        ["Invent a person."], max_tokens=50, temperature=0.5, schema=PERSON, stop=["END"], seed=9
    )
    assert answer.parsed == {"name": "Ada", "age": 36, "towns": ["Ost"]}
    assert (answer.input_tokens, answer.output_tokens, answer.truncated) == (7, 3, False)
    path, authorization, body = server.requests[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer s3cret"
    assert body["messages"] == [{"role": "user", "content": "Invent a person."}]
    expected = {"model": "small", "max_tokens": 50, "temperature": 0.5, "stop": ["END"], "seed": 9}
    assert {key: body[key] for key in expected} == expected
    assert body["response_format"]["json_schema"]["schema"] == PERSON
    assert "s3cret" not in backend.identity


def test_a_server_hears_of_top_k_only_when_told(server):
    backend = OpenAICompatible(server.url, "small", extra_body={"min_p": 0.1})
    backend.complete(["hello"], max_tokens=5, temperature=1.0)
    backend.complete(["hello"], max_tokens=5, temperature=1.0, top_k=7)
    (_, _, without), (_, _, told) = server.requests
    assert "top_k" not in without and told == {**without, "top_k": 7} and told["min_p"] == 0.1
    assert not backend.takes_top_k and Scripted([]).takes_top_k


def test_an_answer_that_breaks_the_schema_is_not_parsed(server):
    backend = OpenAICompatible(server.url, "small")
    for text in ('{"name": "Ada", "age": -1, "towns": ["Ost"]}', '{"name": "Ada"', "Ada, 36"):
        server.text = text
        [answer] = backend.complete(["Invent a person."], max_tokens=50, schema=PERSON)
        assert answer.text == text and answer.parsed is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.plan = [(status, {"retry-after-ms": "20"}, 0.0)] * 2
    backend = OpenAICompatible(server.url, "small")
    [answer] = backend.complete(["hello"], max_tokens=5)
    assert answer.text == "You said: hello" and len(server.requests) == 3
    assert backend.usage.answers == 1 and backend.usage.input_tokens == 7


def test_back_off_grows(server):
    server.plan = [(429, {}, 0.0)] * 3
    OpenAICompatible(server.url, "small").complete(["hello"], max_tokens=5)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3 and gaps[0] > 0.3 and gaps[1] > 0.65 and gaps[2] > 1.3, gaps


def test_a_slow_answer_is_tried_again_then_given_up(server):
    server.plan = [(200, {}, 1.0)]
    backend = OpenAICompatible(server.url, "small", timeout=0.4, retries=1)
    assert backend.complete(["hello"], max_tokens=5)[0].text == "You said: hello"
    assert len(server.requests) == 2
    server.plan = [(200, {}, 1.0)] * 2
    with pytest.raises(Unavailable, match="did not answer in time; raise timeout"):
        backend.complete(["hello"], max_tokens=5)


def test_refusals_say_what_to_change(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cret")
    backend = OpenAICompatible(server.url, "small", api_key_env="A_KEY", retries=0)
    cases = [
        (401, BadInput, "check the key in A_KEY"),
        (404, BadInput, "'small' is not known to"),
        (400, BadInput, "was refused by .*too long"),
        (429, Unavailable, r"kept failing \(status 429\)"),
        (502, Unavailable, r"kept failing \(status 502\)"),
        (408, Unavailable, r"kept failing \(status 408\)"),
    ]
    for status, kind, message in cases:
        server.plan = [(status, {"message": "too long"}, 0.0)]
        with pytest.raises(kind, match=message) as caught:
            backend.complete(["hello"], max_tokens=5)
        assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)
    broken = [
        b"<html>a login page</html>", b"[]", b"{}", b"\xff\xfe{", b'{"choices": [null]}', b'{"choices": {"a": 1}}',
        b'{"choices": [{"index": 0}]}', b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}',
    ]  # fmt: skip
    for body in broken:
        server.body = body
        with pytest.raises(Unavailable, match="does not speak the chat protocol"):
            backend.complete(["hello"], max_tokens=5)


def test_the_newer_name_of_the_limit_is_used_when_asked_for(server):
    server.plan = [(400, {"message": "Unsupported: use 'max_completion_tokens' instead"}, 0.0)]
    assert (
        OpenAICompatible(server.url, "small").complete(["hello"], max_tokens=5)[0].text == "You said: hello"
    )
    assert server.requests[1][2]["max_completion_tokens"] == 5 and "max_tokens" not in server.requests[1][2]


def test_requests_run_side_by_side_in_order(server):
    server.plan = [(200, {}, 0.15)] * 12
    backend = OpenAICompatible(server.url, "small", concurrency=4)
    start = time.monotonic()
    answers = backend.complete([f"n{i}" for i in range(12)], max_tokens=5)
    assert [a.text for a in answers] == [f"You said: n{i}" for i in range(12)]
    assert server.most == 4 and time.monotonic() - start < 12 * 0.15


def test_equal_prompts_are_sampled_with_seeds_of_their_own(server):
    OpenAICompatible(server.url, "small", concurrency=1).complete(
        ["a", "b", "a"], max_tokens=5, temperature=1.0, seed=4
    )
    [first, other, again] = [body["seed"] for _, _, body in server.requests]
    assert first == other == 4 != again and 0 <= again < 2**31
    for seed in (0, 1):  # neighbouring seeds are other samples, not the same ones moved by one
        OpenAICompatible(server.url, "small").complete(["c"] * 5, max_tokens=5, temperature=1.0, seed=seed)
    assert len({body["seed"] for _, _, body in server.requests[3:]}) == 10


def test_unreachable_and_ill_configured_servers():
    with pytest.raises(Unavailable, match=r"127.0.0.1:9/v1 cannot be reached; start the server"):
        OpenAICompatible("http://127.0.0.1:9/v1", "small", retries=0).complete(["x"], max_tokens=5)
    with pytest.raises(BadInput, match="api_key_env = 'NO_SUCH_KEY_HERE' is not set"):
        OpenAICompatible("http://127.0.0.1:9/v1", "small", api_key_env="NO_SUCH_KEY_HERE")
    with pytest.raises(BadInput, match="is not a URL"):
        OpenAICompatible("localhost:8000", "small")
    with pytest.raises(BadInput, match="is not a URL"):
        OpenAICompatible("http://localhost:port/v1", "small")
    for name, value in {"concurrency": 0, "retries": -1, "timeout": 0}.items():
        with pytest.raises(BadInput, match=f"^{name} = {value} is not"):
            OpenAICompatible("http://127.0.0.1:9/v1", "small", **{name: value})


def test_keys_as_files_hold_them(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cret\n")
    OpenAICompatible(server.url, "small", api_key_env="A_KEY", retries=0).complete(["x"], max_tokens=5)
    assert server.requests[0][1] == "Bearer s3cret"
    monkeypatch.setenv("A_KEY", "s3cr\u00e9t")
    with pytest.raises(BadInput, match="holds characters that no key has") as caught:
        OpenAICompatible(server.url, "small", api_key_env="A_KEY")
    assert "s3cr" not in str(caught.value)


def test_a_server_that_counts_no_tokens(server):
    for usage, read in ((None, 0), ({}, 0), ({"prompt_tokens": 3}, 3), ({"prompt_tokens": None}, 0)):
        server.usage = usage
        [answer] = OpenAICompatible(server.url, "small").complete(["x"], max_tokens=5)
        assert (answer.input_tokens, answer.output_tokens) == (read, 0)


def test_half_characters_of_a_server_are_replaced(server, tmp_path):
    """A text cut inside a surrogate pair can be neither stored nor tokenized."""
    server.text = "ab\ud83d"
    backend = cached(OpenAICompatible(server.url, "small"), tmp_path)
    assert backend.complete(["x"], max_tokens=5)[0].text == "ab\ufffd"
    assert backend.complete(["x"], max_tokens=5)[0].cached
    server.text = r'{"a": "\ud83d"}'
    [answer] = backend.complete(["y"], max_tokens=5, schema={"type": "object"})
    assert answer.parsed is None and answer.text == server.text


def test_prompts_of_next_tokens_are_checked(server):
    backend = OpenAICompatible(server.url, "small")
    for prompts, message in (
        ("ab", "is one prompt; give a list"),
        ([[]], r"prompts\[0\] = \[\] is not a prompt"),
        ([None], r"prompts\[0\] = None is not a prompt"),
    ):
        with pytest.raises(BadInput, match=message):
            backend.next_tokens(prompts, top=2)
    assert not server.requests


# Requests, script, cache.


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("one", {}, "is one prompt; give a list"),
        ([3], {}, r"prompts\[0\] = 3 is not a prompt"),
        (["fine", ""], {}, r"prompts\[1\] = '' is empty"),
        ([[]], {}, "is not a prompt"),
        ([[{"role": "user"}]], {}, "is not a message"),
        ([[{"role": "robot", "content": "x"}]], {}, "'robot' is not a role"),
        (["x"], {"max_tokens": 0}, "max_tokens = 0"),
        (["x"], {"temperature": -1}, "temperature = -1"),
        (["x"], {"temperature": float("nan")}, "temperature = nan"),
        (["x"], {"top_k": 0}, "top_k = 0 is not a whole number from 1"),
        (["x"], {"top_k": 2.0}, "top_k = 2.0"),
        (["x"], {"top_k": True}, "top_k = True"),
        (["x"], {"stop": "END"}, "stop = 'END'"),
        (["x"], {"stop": [""]}, "stop"),
        (["x"], {"seed": -1}, "seed = -1"),
        (["x"], {"schema": {"type": "nonsense"}}, "is not a JSON schema"),
        (["x"], {"schema": 3}, "is not a JSON schema"),
        (["a\ud800"], {}, r"prompts\[0\] = .* holds half a character"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_asked(prompts, options, message):
    backend = Scripted(["unused"])
    with pytest.raises(BadInput, match=message):
        backend.complete(prompts, **{"max_tokens": 5, **options})
    assert backend.requests == []


def test_scripted_answers_in_order_or_by_function():
    backend = Scripted(["one", "two words"])
    assert [c.text for c in backend.complete(["a b", "c"], max_tokens=5)] == ["one", "two words"]
    assert (backend.usage.answers, backend.usage.input_tokens, backend.usage.output_tokens) == (2, 3, 3)
    with pytest.raises(BadInput, match="are used up"):
        backend.complete(["d"], max_tokens=5)
    echo = Scripted(lambda text: json.dumps({"n": len(text)}))
    assert echo.complete(["abc"], max_tokens=5, schema={"type": "object"})[0].parsed == {"n": 3}
    assert Scripted(["a b c d"]).complete(["x"], max_tokens=2)[0].truncated
    assert Scripted([]).complete([], max_tokens=2) == []


def test_parse_json():
    schema = {"type": "array", "items": {"type": "integer"}}
    assert parse_json("[1, 2]", schema) == [1, 2]
    assert parse_json("Here you are:\n```json\n[3]\n```\nGood?", schema) == [3]
    assert parse_json('["a"]', schema) is None and parse_json("[1,", schema) is None
    fenced = '```json\n["```python\\nx\\n```", "y"]\n```'  # a fence inside a string ends nothing
    assert parse_json(fenced, {}) == ["```python\nx\n```", "y"]
    assert parse_json("```json\n[3]", schema) is None and parse_json("```json\n[3] and\n```", schema) is None


@pytest.mark.parametrize("text", ["NaN", '{"a": -Infinity}', "1e999", r'["\ud800"]', "[" * 100_000])
def test_what_json_cannot_hold_is_not_parsed(text):
    assert parse_json(text, {}) is None


def test_cache_hits_ask_nothing(tmp_path):
    inner = Scripted(lambda text: f"re: {text}")
    backend = cached(inner, tmp_path / "answers")
    first = backend.complete(["a", "b"], max_tokens=5)
    again = cached(inner, tmp_path / "answers").complete(["b", "c", "a"], max_tokens=5)
    assert [c.text for c in again] == ["re: b", "re: c", "re: a"]
    assert [c.cached for c in first] == [False, False] and [c.cached for c in again] == [True, False, True]
    assert [request[-1]["content"] for request in inner.requests] == ["a", "b", "c"]
    assert inner.usage.answers == 3 and inner.usage.cached == 0
    assert (backend.usage.answers, backend.usage.cached) == (2, 0)
    backend.complete(["a"], max_tokens=5)
    assert (backend.usage.answers, backend.usage.cached, backend.usage.output_tokens) == (2, 1, 4)


def test_whatever_changes_the_answer_changes_the_key(tmp_path):
    def asked(count, script="one", **options):
        inner = Scripted([script] * 9)
        cached(inner, tmp_path).complete(["a"], **{"max_tokens": 5, **options})
        assert len(inner.requests) == (1 if count else 0), options

    asked(True, script="other")
    assert len(list(tmp_path.glob("*/*.json"))) == 1
    for options in (
        {}, {"max_tokens": 6}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}, {"stop": ["x"]},
        {"temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_k": 4}, {"schema": {"type": "object"}},
        {"schema": {"properties": {"a": {}, "b": {}}}}, {"schema": {"properties": {"b": {}, "a": {}}}},
    ):  # fmt: skip
        asked(True, **options)
        asked(False, **options)


def test_names_of_answers_are_older_than_some_fields(tmp_path):
    """What was cached before `top` and `top_k` existed is still found."""
    inner = Scripted(["one"])
    store = cached(inner, tmp_path)
    store.complete(["a"], max_tokens=5)
    request = {
        "backend": inner.identity, "max_tokens": 5, "temperature": 0.0, "schema": None, "stop": [], "seed": None,
        "messages": [{"role": "user", "content": "a"}], "draw": 0,
    }  # fmt: skip
    name = sha256_json(request)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.glob("*/*.json")] == [
        f"{name[:2]}/{name}.json"
    ]
    assert store.takes_top_k
    assert not cached(OpenAICompatible("http://localhost:1", "small"), tmp_path).takes_top_k


def test_cached_samples_keep_their_number(tmp_path):
    """Two equal prompts are two samples; asking for three later adds one and repeats none."""
    count = iter(range(100))
    backend = cached(Scripted(lambda text: f"sample {next(count)}"), tmp_path)
    options = {"max_tokens": 5, "temperature": 1.0}
    assert [c.text for c in backend.complete(["a", "a"], **options)] == ["sample 0", "sample 1"]
    assert [c.text for c in backend.complete(["a", "a", "a"], **options)] == [
        "sample 0",
        "sample 1",
        "sample 2",
    ]


def test_local_samples_are_those_of_the_whole_call_after_a_partial_hit(tmp_path, tiny_lm, tiny_tokenizer):
    backend = Local(tiny_lm("llama"), tiny_tokenizer)
    options = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
    whole = [c.text for c in backend.complete(["New facts"] * 3, **options)]
    store = cached(backend, tmp_path)
    store.complete(["New facts"], **options)
    assert [c.text for c in store.complete(["New facts"] * 3, **options)] == whole


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"messages": [], "text": 1, "more": 2}', "\x00"])
def test_a_damaged_cache_file_is_asked_again(tmp_path, damage):
    backend = cached(Scripted(lambda text: "fine"), tmp_path)
    backend.complete(["a"], max_tokens=5)
    [file] = tmp_path.glob("*/*.json")
    file.write_text(damage)
    assert backend.complete(["a"], max_tokens=5)[0] == backend.complete(["a"], max_tokens=5)[0].__class__(
        "fine", 1, 1
    )
    assert json.loads(file.read_text())["text"] == "fine"


def test_an_interrupted_call_keeps_what_came_in(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_FLUSH", 2)
    inner = Scripted(["a", "b", "c"])
    with pytest.raises(BadInput):
        cached(inner, tmp_path).complete([f"p{i}" for i in range(5)], max_tokens=5)
    assert len(list(tmp_path.glob("*/*.json"))) == 2


def test_importing_the_backends_loads_neither_torch_nor_openai():
    code = "import sys, transfuse.core.llm; print(bool({'torch', 'openai', 'llguidance'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
