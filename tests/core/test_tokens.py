"""One text under two tokenizers: places, groups and shared strings."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from transfuse.core.errors import BadInput
from transfuse.core.models import load_tokenizer
from transfuse.core.tokens import align, align_positions, encode, locate, pieces, shared_vocabulary

TEXTS = [
    "Hello  world", " leading and trailing ", "na\u00efve \u65e5\u672c\u8a9e \U0001f642!", "a\n\nb\tc\r\n",
    "\U0001f642", "\U0001d518x \u65e5", "e\u0301 \ufb01", "  ", "x = 1;  // 100 % of it\n\n\n    return [x]",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm():
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def gemma():
    return load_tokenizer("gemma3-270m")


@pytest.fixture(scope="module")
def wordpiece():
    """Lower-cases, and leaves spaces out."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "hello", "world", "##s", "na", "##ive", "!", "x"]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


@pytest.fixture(scope="module")
def prefixed():
    """Sentencepiece's habit: a space before the text, which the text does not have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "\u2581", "H", "i", "\u2581you", "!", "\u2581Hi"]
    raw = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def walk(ours, theirs):
    """The rule as it is told, for spans without gaps: advance the side that ends earlier, close where both end."""
    groups, i, j, a, b = [], 0, 0, [], []
    while i < len(ours) and j < len(theirs):
        e, f = ours[i][1], theirs[j][1]
        if e <= f:
            a.append(i)
            i += 1
        if f <= e:
            b.append(j)
            j += 1
        if e == f:
            groups.append((a, b))
            a, b = [], []
    return groups


def listed(ours, theirs):
    """Groups of `align` as lists of positions."""
    first, second = align(np.array(ours), np.array(theirs))
    return [
        ([i for i, k in enumerate(first) if k == n], [j for j, k in enumerate(second) if k == n])
        for n in range(max([*first, *second, -1]) + 1)
    ]


def runs(ends):
    return [(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def test_groups_against_the_walk():
    random.seed(0)
    for _ in range(300):
        size = random.randint(1, 40)
        sides = [
            runs([*sorted(random.sample(range(1, size), random.randint(0, size - 1))), size]) for _ in "ab"
        ]
        assert listed(*sides) == walk(*sides)


def test_a_cut_side_leaves_no_open_group():
    ours, theirs = runs([3, 5, 9]), runs([2, 5, 7, 9, 12])
    assert listed(ours, theirs[:3]) == walk(ours, theirs[:3]) == [([0, 1], [0, 1])]
    assert listed(ours, theirs) == [([0, 1], [0, 1]), ([2], [2, 3])]


def test_gaps_and_empty_spans():
    # A space left out by one side.
    assert listed([(0, 5), (5, 11)], [(0, 5), (6, 11)]) == [([0], [0]), ([1], [1])]
    assert listed([(0, 6)], [(1, 6)]) == [([0], [0])]
    # Special tokens: at the start of one side alone, at the end of both.
    assert listed([(0, 3), (3, 3)], [(0, 0), (0, 3), (3, 3)]) == [([0], [1]), ([1], [2])]
    assert listed([(0, 3), (3, 3), (3, 3)], [(0, 3), (3, 3)]) == [([0], [0]), ([1], [1])]
    # One inside a group keeps out of it.
    assert listed([(0, 2), (2, 2), (2, 4)], [(0, 4)]) == [([0, 2], [0])]
    # What one side holds for a special token is read by nobody else.
    assert listed([(0, 0), (5, 7)], [(0, 2), (2, 5), (5, 7)]) == [([1], [2])]
    assert listed([], [(0, 1)]) == [] == listed([], [])


def test_overlapping_spans_are_no_border():
    """Pieces of one character that share its span (offsets count characters)."""
    assert listed([(0, 1), (1, 4), (1, 4)], [(0, 1), (1, 4)]) == [([0], [0]), ([1, 2], [1])]
    assert listed([(0, 3), (1, 3)], [(0, 1), (1, 3)]) == [([0, 1], [0, 1])]


def test_positions():
    first, second = align_positions(2, 4)
    assert first.tolist() == [0, 1] and second.tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("text", TEXTS)
def test_places_of_real_tokenizers(text, smollm, gemma, tiny_tokenizer):
    """Spans follow each other, cover the text, and hold the token's bytes."""
    data = text.encode()
    for tokenizer in (smollm, gemma, tiny_tokenizer):
        ((ids, spans),) = encode(tokenizer, [text])
        assert ids == tokenizer(text)["input_ids"]
        found, special = pieces(tokenizer)
        at = 0
        for number, (start, end) in zip(ids, spans.tolist(), strict=True):
            assert start == at
            at = end
            assert data[start:end] == (b"" if special[number] else found[number])
        assert at == len(data)


@pytest.mark.parametrize("text", TEXTS)
def test_groups_of_real_tokenizers(text, smollm, gemma, tiny_tokenizer):
    tokenizers = (smollm, gemma, tiny_tokenizer)
    for one, other in ((a, b) for a in tokenizers for b in tokenizers):
        (_, ours), (_, theirs) = (encode(t, [text])[0] for t in (one, other))
        places = [[i for i, (a, b) in enumerate(s.tolist()) if a < b] for s in (ours, theirs)]
        told = walk(ours[places[0]].tolist(), theirs[places[1]].tolist())
        expected = [([places[0][i] for i in a], [places[1][j] for j in b]) for a, b in told]
        assert [g for g in listed(ours, theirs) if g != ([0], [0]) or ours[0, 1]] == expected
        if one is other:
            assert all(a == b and len(a) == 1 for a, b in listed(ours, theirs))


def test_chat_specials_are_empty(smollm, gemma):
    text = "<|im_start|>user\nhi<|im_end|>\n"
    (ids, ours), (_, theirs) = (encode(t, [text])[0] for t in (smollm, gemma))
    named = dict(zip(smollm.convert_ids_to_tokens(ids), ours.tolist(), strict=True))
    assert named["<|im_start|>"] == [0, 0] and named["<|im_end|>"] == [19, 19]
    assert named["user"] == [12, 16] and named["hi"] == [17, 19]
    shared = [(a, b) for a, b in listed(ours, theirs) if ours[a[0], 0] < ours[a[0], 1]]
    assert [text.encode()[slice(*ours[a[0]])] for a, _ in shared] == [b"user", b"\n", b"hi", b"\n"]
    assert all(len(a) == len(b) == 1 for a, b in shared)


def test_the_space_that_is_not_there(prefixed, smollm):
    text = "Hi you!"
    ((ids, spans),) = encode(prefixed, [text])
    assert prefixed.convert_ids_to_tokens(ids)[0] == "\u2581Hi"
    assert spans.tolist() == [[0, 2], [2, 6], [6, 7]]
    ((_, theirs),) = encode(smollm, [text])
    assert listed(spans, theirs) == [([i], [i]) for i in range(3)]


def test_offsets_where_the_bytes_do_not_spell_the_text(wordpiece, smollm):
    text = "Hello  WORLDs na\u00efve!"
    ((ids, spans),) = encode(wordpiece, [text])
    words = [text.encode()[a:b].decode() for a, b in spans.tolist() if a < b]
    assert words == ["Hello", "WORLD", "s", "na", "\u00efve", "!"]
    assert np.array_equal(locate(wordpiece, ids, text), spans)  # asked again of the tokenizer
    ((_, theirs),) = encode(smollm, [text])
    ends = [int(spans[a[-1], 1]) for a, _ in listed(spans, theirs)]
    assert ends == [5, 12, 13, 16, 20, 21]
    with pytest.raises(BadInput, match="spell"):
        locate(wordpiece, ids[:2], "something else")


def test_an_unfinished_sequence(smollm):
    ((ids, spans),) = encode(smollm, ["One two three four"])
    assert np.array_equal(locate(smollm, ids[:2], "One two three four"), spans[:2])


def test_shared_strings_by_hand(smollm, gemma, tiny_tokenizer):
    ours, theirs = shared_vocabulary(smollm, gemma)
    pairs = dict(zip(ours.tolist(), theirs.tolist(), strict=True))
    vocabulary = smollm.get_vocab(), gemma.get_vocab()
    assert pairs[vocabulary[0]["\u0120world"]] == vocabulary[1]["\u2581world"]
    assert pairs[vocabulary[0]["A"]] == vocabulary[1]["A"]  # not the byte <0x41>
    assert pairs[vocabulary[0]["\u010a"]] == vocabulary[1]["\n"]
    assert vocabulary[0]["<|im_start|>"] not in pairs
    assert len(set(pairs.values())) == len(pairs) > 30000
    ours, theirs = shared_vocabulary(smollm, gemma, by="piece")
    same = vocabulary[0].keys() & vocabulary[1].keys()
    assert {(int(i), int(j)) for i, j in zip(ours, theirs, strict=True)} == {
        (vocabulary[0][k], vocabulary[1][k]) for k in same
    }
    for by in ("text", "piece"):
        ours, theirs = shared_vocabulary(tiny_tokenizer, tiny_tokenizer, by=by)
        assert ours.tolist() == theirs.tolist() == sorted(tiny_tokenizer.get_vocab().values())
    with pytest.raises(BadInput, match="by"):
        shared_vocabulary(smollm, gemma, by="sound")


def test_a_long_text_takes_no_long_time(smollm, gemma):
    text = "The quick brown fox \U0001f98a jumps over 12 lazy dogs. " * 4000
    (_, ours), (_, theirs) = (encode(t, [text])[0] for t in (smollm, gemma))
    start = time.perf_counter()
    first, second = align(ours, theirs)
    assert time.perf_counter() - start < 1.0
    assert (first >= 0).all() and (second[1:] >= 0).all() and len(first) > 40000
