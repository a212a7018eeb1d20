"""Which words a text calls for: entities, a trie of knowledge terms, and the tokens those words begin with."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from transfuse.core.errors import BadInput
from transfuse.core.extras import require
from transfuse.core.generate import encode_pair

__all__ = [
    "Extractor",
    "KnowledgeTrie",
    "Source",
    "TokenFinder",
    "lemma",
    "nouns",
    "spacy_nouns",
    "words_for",
]

Extractor = Callable[[str], Sequence[str]]
"""From a text to its entities: lower-case lemmas in the order of the text, repetitions kept."""

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_POSSESSIVE = re.compile(r"['’]s?$")
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n+")

# Function words, and the verbs, adjectives and adverbs that are too common to stand for a thing.
_STOP = frozenset(
    """
    about above across actual after again against all almost alone along already also although always among
    and another any anyone anything are around ask became because become been before began begin behind being
    below best better between big both bring but call came can cannot certain clear come common could cut deep
    did different does doing done down due during each early easy either else enough especially even ever every
    everyone everything exist far few find first five follow for former found four from full further gave get
    give given goes going gone good got great had happen hard has have having help hence her here hers herself
    high him himself his hold how however important instead into its itself just keep kept kind know known
    large last late later lead least led left less let like little live long look lot low made main make making
    many may mean meant might mine more most move much must near need neither never new next nine none nor not
    nothing now off often old once one only onto open other others our ours out over own part per perhaps put
    quite rather reach read real really right run said same saw say second see seem seen set seven several shall
    she short should show shown since six small some someone something soon still stop such take taken tell ten
    than that the their them then there therefore these they thing think third this those though three through
    throughout thus till together told too took toward towards try turn two type under unless until upon use
    used using usual usually various very via want was way well went were what whatever when where whereas
    whether which while who whole whom whose why wide will with within without work would yes yet you young
    your yours yourself
    """.split()  # noqa: SIM905
)
_IRREGULAR = {
    "analyses": "analysis", "axes": "axis", "bases": "base", "bonuses": "bonus", "buses": "bus",
    "calories": "calorie", "children": "child", "cookies": "cookie", "crises": "crisis", "feet": "foot",
    "gases": "gas", "geese": "goose", "halves": "half", "headaches": "headache", "hypotheses": "hypothesis",
    "knives": "knife", "leaves": "leaf", "lenses": "lens", "lives": "life", "men": "man", "mice": "mouse",
    "movies": "movie", "nuclei": "nucleus", "oxen": "ox", "people": "person", "shelves": "shelf",
    "shoes": "shoe", "teeth": "tooth", "viruses": "virus", "wives": "wife", "wolves": "wolf", "women": "woman",
}  # fmt: skip
_SINGULAR = frozenset(("atlas", "bias", "canvas", "lens", "news", "series", "species"))
_NOT_ADVERBS = frozenset(
    (
        "ally",
        "anomaly",
        "assembly",
        "belly",
        "butterfly",
        "dragonfly",
        "family",
        "firefly",
        "italy",
        "jelly",
        "july",
        "supply",
    )
)


def lemma(word: str) -> str:
    """Singular of a lower-case English noun, by rules and a short list of exceptions."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 3 or word[-1] != "s" or word.endswith(("ss", "us", "is", "ics")) or word in _SINGULAR:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "shes", "ches", "xes", "zzes", "oes")) else word[:-1]


def nouns(text: str) -> list[str]:
    """Entities of a text without a tagger: lemmas of words of three letters or more that are no stop words.

    Verbs and adjectives outside the stop words are kept, which a tagger would leave out.
    """
    found = []
    for match in _WORD.finditer(text.lower()):
        word = _POSSESSIVE.sub("", match.group())
        base = lemma(word)
        adverb = base.endswith("ly") and base not in _NOT_ADVERBS and len(base) > 4
        if len(base) > 2 and not (adverb or {word, base} & _STOP or "'" in word or "’" in word):
            found.append(base)
    return found


def spacy_nouns(pipeline: str = "en_core_web_sm") -> Extractor:
    """An extractor that asks spaCy for nouns and proper nouns that are no stop words.

    Args:
        pipeline: Name or folder of an installed spaCy pipeline with a tagger and a lemmatiser.

    Raises:
        MissingExtra: spaCy is not installed.
        BadInput: the pipeline is not installed.
    """
    library: Any = require("spacy", extra="spacy")
    try:
        tagger = library.load(pipeline)
    except OSError as error:
        remedy = f"run: python -m spacy download {pipeline}"
        raise BadInput("pipeline", pipeline, "is not an installed spaCy pipeline", remedy) from error

    def extract(text: str) -> list[str]:
        tokens = [t for t in tagger(text) if t.pos_ in ("NOUN", "PROPN") and not t.is_stop]
        return [t.lemma_.lower() for t in tokens if t.lemma_.strip()]

    return extract


class KnowledgeTrie:
    """Strings of knowledge terms, found by what they begin with.

    A string is the words of one relation, its subject first: "vaccine immune system". The trie is the sorted list
    of them, so that all strings with a common beginning lie side by side. As in the paper the beginning need not
    end with a word: "car" finds "car engine" and "carbon atom".

    Args:
        strings: Space-separated terms, lower-cased and stored once each.
        extractor: Entities of a text, for passages and for what is being written; `nouns` by default.

    Raises:
        BadInput: there is no string.
    """

    def __init__(self, strings: Iterable[str], extractor: Extractor | None = None):
        self.extractor = nouns if extractor is None else extractor
        self.strings = sorted({" ".join(string.lower().split()) for string in strings} - {""})
        if not self.strings:
            raise BadInput(
                "strings", [], "leaves the trie empty", "give passages that name at least one thing"
            )

    @classmethod
    def from_passages(
        cls, passages: str | Sequence[str], extractor: Extractor | None = None
    ) -> KnowledgeTrie:
        """One string per sentence: its entities in order, the first of them taken for the subject.

        The paper cuts sentences into relations by open information extraction; such strings can be given to
        the constructor.

        Args:
            passages: One text or several.
            extractor: As for the constructor.

        Raises:
            BadInput: no passage, or nothing found in them.
        """
        texts = [passages] if isinstance(passages, str) else list(passages)
        extract = nouns if extractor is None else extractor
        sentences = [sentence for text in texts for sentence in _SENTENCE.split(text)]
        return cls([" ".join(extract(sentence)) for sentence in sentences], extractor)

    def query(self, entities: Iterable[str], hops: int = 1) -> Counter[str]:
        """Words of all strings that begin with one of the entities.

        Args:
            entities: Lower-case terms.
            hops: How often the words found are looked up in turn, 1 being the entities alone.

        Returns:
            Each word with its occurrences in the strings found, a string counting once.

        Raises:
            BadInput: hops below 1.
        """
        if hops < 1:
            raise BadInput("hops", hops, "looks nothing up", "give 1 or more")
        asked: set[str] = set()
        strings: set[int] = set()
        wanted = set(entities) - {""}
        for _ in range(hops):
            asked |= wanted
            for entity in wanted:
                first = bisect_left(self.strings, entity)
                strings |= set(range(first, bisect_left(self.strings, entity + chr(0x10FFFF), first)))
            wanted = {word for n in strings for word in self.strings[n].split()} - asked
        return Counter(word for n in sorted(strings) for word in self.strings[n].split())


def words_for(
    trie: KnowledgeTrie,
    text: str,
    *,
    hops: int = 1,
    memory: int = 16,
    limit: int | None = 64,
    drop_written: bool = True,
) -> list[str]:
    """The knowledge words K that a text calls for, the most frequent first.

    Args:
        trie: Where they are looked up.
        text: What has been written so far.
        hops: As for `KnowledgeTrie.query`.
        memory: How many distinct entities are looked up: those mentioned last.
        limit: Largest size of K; None for no limit.
        drop_written: Leave out the entities of the text itself.
    """
    entities = trie.extractor(text)
    recent: deque[str] = deque(maxlen=memory)
    for entity in entities:
        if entity in recent:
            recent.remove(entity)
        recent.append(entity)
    found = trie.query(recent, hops)
    for word in set(entities) if drop_written else ():
        found.pop(word, None)
    return [word for word, _ in found.most_common(limit)]


class Source(NamedTuple):
    """What a row draws on.

    Attributes:
        trie: Its knowledge; None for none.
        topic: The text its first entities come from; None for the prompt as it stands.
    """

    trie: KnowledgeTrie | None
    topic: str | None = None


class TokenFinder:
    """The tokens that the knowledge words of a text begin with.

    Args:
        tokenizer: Of the model that writes.
        leading_space: Encode words as they stand in running text, after a space. Where a text or line begins
            there is none, and both forms count. False takes the bare form everywhere.
        **looked_up: As for `words_for`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, leading_space: bool = True, **looked_up: Any):
        self.tokenizer, self.leading_space, self.looked_up = tokenizer, leading_space, looked_up
        self._known: dict[str, tuple[int, int]] = {}

    def __call__(self, source: Source, prompt: list[int], new: list[int]) -> Counter[int]:
        """Ids, each with the number of words that begin with it.

        Args:
            source: Where words are looked up.
            prompt: Ids of the prompt.
            new: Ids written after it.
        """
        if source.trie is None:
            return Counter()
        written = prompt + new if source.topic is None else new
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        text = text if source.topic is None else f"{source.topic}\n{text}"
        last = self.tokenizer.decode((prompt + new)[-1:], skip_special_tokens=True)
        words = words_for(source.trie, text, **self.looked_up)
        return self.first(words, start=not last or last[-1].isspace())

    def first(self, words: Iterable[str], *, start: bool = False) -> Counter[int]:
        """Ids, each with the number of words that begin with it.

        Args:
            words: Distinct words.
            start: Whether the next word stands at the start of a text or line.
        """
        counted: Counter[int] = Counter()
        for word in words:
            if word not in self._known:
                bare = self.tokenizer(word, add_special_tokens=False)["input_ids"][0]
                self._known[word] = (encode_pair(self.tokenizer, "a", word)[1][0], bare)
            spaced, bare = self._known[word]
            forms = {bare} if not self.leading_space else {spaced, bare} if start else {spaced}
            counted.update(forms)
        return counted
