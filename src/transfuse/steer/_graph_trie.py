"""Names as a trie of token ids in two arrays, for millions of them.

Entries are sorted, so that those with one beginning are a range; a node of the trie is such a range and its depth,
and its children are found where the next token changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Names", "Node", "Strings", "Trie"]

_REMEMBERED = 4096  # nodes whose children are kept
_WIDE = 8  # ranges up to this many entries are cheaper to look through again
_PARTS = np.arange(5)  # a gap between entries that differ is cut into four


class Node(NamedTuple):
    """Entries `first` to `last - 1` of a trie, which agree in `depth` tokens."""

    first: int
    last: int
    depth: int


class Trie:
    """Token sequences of which none begins another, in lexicographic order.

    Args:
        tokens: int32, the sequences one after the other.
        starts: int64 `[n + 1]`, where each begins.
        members: The sequences that take part, rising; None for all.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, members: np.ndarray | None = None):
        self.tokens, self.starts, self.members = tokens, starts, members
        self._children: dict[Node, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.starts) - 1 if self.members is None else len(self.members)

    @property
    def root(self) -> Node:
        """The node before the first token."""
        return Node(0, len(self), 0)

    def entry(self, place: int) -> int:
        """The number, among all sequences, of the `place`-th that takes part."""
        return place if self.members is None else int(self.members[place])

    def subset(self, members: np.ndarray) -> Trie:
        """The trie of some entries (numbers as `entry` gives them, rising), sharing the tokens."""
        return Trie(self.tokens, self.starts, members)

    def children(self, node: Node) -> np.ndarray:
        """Tokens that may follow, rising, int64; none after a complete sequence."""
        return self._split(node)[0]

    def step(self, node: Node, token: int) -> Node | None:
        """The node one token on; None where no entry goes on so."""
        tokens, borders = self._split(node)
        i = int(np.searchsorted(tokens, token))
        if i == len(tokens) or tokens[i] != token:
            return None
        return Node(int(borders[i]), int(borders[i + 1]), node.depth + 1)

    def number(self, node: Node) -> int:
        """The number of the sequence that is complete at `node`, else -1."""
        if node.last - node.first != 1:
            return -1
        entry = self.entry(node.first)
        return entry if self.starts[entry + 1] - self.starts[entry] == node.depth else -1

    def find(self, ids: Sequence[int]) -> int:
        """The number of a sequence, -1 where it is not in the trie."""
        node: Node | None = self.root
        for token in ids:
            node = self.step(node, token) if node is not None else None
        return -1 if node is None else self.number(node)

    def _split(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """Next tokens, and the borders of their ranges, one more."""
        known = self._children.get(node)
        if known is not None:
            return known
        first, last, depth = node
        if first == last or self.number(node) >= 0:
            return np.zeros(0, dtype=np.int64), np.array([first])
        borders = self._changes(first, last - 1, depth)
        found = self._column(borders[:-1], depth).astype(np.int64), borders
        if last - first > _WIDE:
            if len(self._children) >= _REMEMBERED:
                self._children.clear()
            self._children[node] = found
        return found

    def _changes(self, first: int, last: int, depth: int) -> np.ndarray:
        """Where a new token begins among entries `first` to `last`; `first` leads and `last + 1` ends the list.

        Sorted, so where two entries agree all between them do: gaps between entries that differ are cut finer until
        their ends are neighbours.
        """
        found = [np.array([first, last + 1])]
        low, high = np.array([first]), np.array([last])
        while len(low):
            places = low[:, None] + (high - low)[:, None] * _PARTS // _PARTS[-1]
            column = self._column(places, depth)
            apart = column[:, 1:] != column[:, :-1]
            low, high = places[:, :-1][apart], places[:, 1:][apart]
            wide = high - low > 1
            found.append(high[~wide])
            low, high = low[wide], high[wide]
        return np.sort(np.concatenate(found))

    def _column(self, places: np.ndarray, depth: int) -> np.ndarray:
        """The token at `depth` of the entries at these places."""
        entries = places if self.members is None else self.members[places]
        return self.tokens[self.starts[entries] + depth]


class Strings:
    """Texts in one array of bytes.

    Args:
        data: uint8, their UTF-8 one after the other.
        starts: int64 `[n + 1]`.
    """

    def __init__(self, data: np.ndarray, starts: np.ndarray):
        self.data, self.starts = data, starts

    @classmethod
    def of(cls, texts: Sequence[str]) -> Strings:
        """Pack texts."""
        encoded = [text.encode() for text in texts]
        starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(each) for each in encoded], out=starts[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.data[self.starts[i] : self.starts[i + 1]].tobytes().decode()


class Names:
    """Things of a graph: IRI, name and wrapped token ids of each, numbered in the trie's order.

    Args:
        trie: Of the wrapped names.
        iris: By number.
        labels: The names as text, by number.
        by_iri: int32, the numbers in the order of their IRIs.
    """

    def __init__(self, trie: Trie, iris: Strings, labels: Strings, by_iri: np.ndarray):
        self.trie, self.iris, self.labels, self.by_iri = trie, iris, labels, by_iri

    def __len__(self) -> int:
        return len(self.iris)

    def number(self, iri: str) -> int:
        """The number of an IRI, -1 where it is unknown."""
        place = bisect_left(range(len(self)), iri, key=lambda i: self.iris[int(self.by_iri[i])])
        found = int(self.by_iri[place]) if place < len(self) else -1
        return found if found >= 0 and self.iris[found] == iri else -1

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written to disk."""
        return {
            "tokens": self.trie.tokens,
            "starts": self.trie.starts,
            "iris": self.iris.data,
            "iri_starts": self.iris.starts,
            "labels": self.labels.data,
            "label_starts": self.labels.starts,
            "by_iri": self.by_iri,
        }

    @classmethod
    def of_arrays(cls, found: dict[str, np.ndarray]) -> Names:
        """The inverse of `arrays`."""
        return cls(
            Trie(found["tokens"], found["starts"]),
            Strings(found["iris"], found["iri_starts"]),
            Strings(found["labels"], found["label_starts"]),
            found["by_iri"],
        )
