"""Tokens as they are chosen, through transformers' own streamers."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from transfuse.core.errors import BadInput
from transfuse.core.generate import pad_batch
from transfuse.core.lockstep import decode, decode_prepared
from transfuse.core.streaming import RowStreamers
from transfuse.core.streams import Stream

TEXTS = ["The mayor of Port Ellery is", "New facts", "A question: who built the bridge?"]
NEW = 12


class Kept(BaseStreamer):
    """Keeps what it is given, and how often it was ended."""

    def __init__(self):
        self.values, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.values += value.tolist()

    def end(self):
        self.ends += 1


@pytest.fixture
def streams(tiny_lm, tiny_tokenizer):
    models = tiny_lm("llama"), tiny_lm("llama", seed=5)
    ids, mask = pad_batch([tiny_tokenizer(text)["input_ids"] for text in TEXTS], 0, side="left")
    return [Stream(model, ids, mask) for model in models]


def blend(logits):
    return logits[0] + 0.5 * logits[1]


def first(streams, row):
    return [Stream(s.model, s.input_ids[row : row + 1], s.attention_mask[row : row + 1]) for s in streams]


def test_a_streamer_of_transformers_prints_one_row(streams, tiny_tokenizer, capsys):
    """Without anything of ours: `put` for each token, `end` after the last."""
    one = first(streams, 0)
    streamer = TextStreamer(tiny_tokenizer)
    tokens = decode(one, blend, max_new_tokens=NEW, on_tokens=streamer.put)
    streamer.end()
    assert capsys.readouterr().out == tiny_tokenizer.decode(tokens[0]) + "\n"


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_texts_can_be_read_while_they_are_written(streams, tiny_tokenizer, skip_prompt):
    one, made = first(streams, 2), []
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=skip_prompt, timeout=60)

    def write():
        with RowStreamers([streamer]) as on_tokens:
            made.append(decode(one, blend, max_new_tokens=NEW, on_tokens=on_tokens))

    thread = threading.Thread(target=write)
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == tiny_tokenizer.decode(made[0][0])
    assert len([part for part in parts if part]) > 1


def test_each_row_ends_by_itself(streams):
    free = decode(streams, blend, max_new_tokens=NEW)
    row = free[1].tolist()
    at = next(i for i in range(1, NEW) if row[i] not in row[:i])  # where it will end
    end = row[at]
    kept = [Kept() for _ in TEXTS]
    alive = []

    def note(tokens):
        alive.append([k.ends for k in kept])

    with RowStreamers(kept, end) as on_tokens:

        def both(tokens):  # wrapped, as methods do that note what was chosen
            on_tokens(tokens)
            note(tokens)

        tokens = decode(
            streams, blend, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0, on_tokens=both
        ).tolist()
    assert [k.ends for k in kept] == [1, 1, 1]
    for row, streamer in zip(tokens, kept):
        assert streamer.values == (row[: row.index(end) + 1] if end in row else row)
    assert alive[at - 1][1] == 0 and alive[at][1] == 1  # with its own last token, not with the batch
    assert len(kept[1].values) < max(len(k.values) for k in kept)


def test_rows_that_end_otherwise_receive_padding(streams):
    """`ends` may name the padding token too: such a row ends one step later, with the padding."""
    kept = [Kept() for _ in TEXTS]
    with RowStreamers(kept, [2, 0]) as on_tokens:
        tokens = decode(
            streams, blend, max_new_tokens=4, pad_token_id=0, on_tokens=on_tokens,
            stopping_criteria=[lambda ids, scores: torch.tensor([True, False, False])][0],
        )  # fmt: skip
    assert kept[0].values == [int(tokens[0, 0]), 0]
    assert kept[1].values == tokens[1].tolist()


def test_a_failure_ends_the_streamers(streams):
    kept = [Kept() for _ in TEXTS]

    def fail(logits):
        if kept[0].values:
            raise ZeroDivisionError
        return blend(logits)

    with pytest.raises(ZeroDivisionError), RowStreamers(kept) as on_tokens:
        decode(streams, fail, max_new_tokens=4, on_tokens=on_tokens)
    assert [(len(k.values), k.ends) for k in kept] == [(1, 1)] * 3


def test_a_streamer_that_cannot_end_keeps_none_waiting():
    class Broken(Kept):
        def end(self):
            super().end()
            raise BrokenPipeError

    kept = [Kept(), Broken(), Kept(), Broken()]
    with pytest.raises(BrokenPipeError):
        RowStreamers(kept).end()
    assert [k.ends for k in kept] == [1] * 4


def test_as_custom_generate_and_refusals(streams):
    model, ids, mask = streams[0]

    def custom(
        model, input_ids, logits_processor, stopping_criteria, generation_config, *, on_tokens=None, **kwargs
    ):
        return decode_prepared(
            [Stream(model, input_ids, kwargs.get("attention_mask"))], lambda z: z[0], logits_processor,
            stopping_criteria, generation_config, kwargs, on_tokens=on_tokens,
        )  # fmt: skip

    def run(streamers, **options):
        with RowStreamers(streamers, 2) as on_tokens:
            return model.generate(
                input_ids=ids, attention_mask=mask, custom_generate=custom, on_tokens=on_tokens,
                max_new_tokens=4, **options,
            )  # fmt: skip

    kept = [Kept() for _ in TEXTS]
    out = run(kept, do_sample=False)
    assert [k.values for k in kept] == out[:, ids.shape[1] :].tolist()
    with pytest.raises(BadInput, match="2 streamers for 3 rows"):
        run([Kept(), Kept()])
    with pytest.raises(BadInput, match="which text wins shows at the end"):
        run([Kept() for _ in TEXTS], num_beams=2)
