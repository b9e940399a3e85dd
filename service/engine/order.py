"""Jobs in order: what the scheduler keeps up to date in every step, for as many jobs as there are in it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class PrefixSums:
    """Sums of whole numbers under small keys, and over all the keys below one."""

    def __init__(self) -> None:
        self._sums = [0] * 1024
        self.total = 0

    def add(self, key: int, value: int) -> None:
        """Add to the sum under a key ≥ 0."""
        if key >= len(self._sums):
            self._sums += [0] * key
        self._sums[key] += value
        self.total += value

    def at(self, key: int) -> int:
        """The sum under a key."""
        return self._sums[key] if key < len(self._sums) else 0

    def below(self, key: int) -> int:
        """The sum under all smaller keys."""
        return sum(self._sums[:key])


class Order(Generic[Item]):
    """Items in order of a whole number, their key, and where that is equal in order of arrival.

    A short list for each key, since most items that change places take the place next to theirs.
    """

    def __init__(self) -> None:
        self._lists: dict[int, list[tuple[int, Item]]] = {}  # (arrival, item), by key

    def __bool__(self) -> bool:
        return bool(self._lists)

    def __iter__(self) -> Iterator[Item]:
        for key in sorted(self._lists):
            for _, item in self._lists[key]:
                yield item

    def add(self, key: int, arrival: int, item: Item) -> None:
        """Put an item in its place. No two have the same arrival."""
        there = self._lists.get(key)
        if there is None:
            self._lists[key] = [(arrival, item)]
        else:
            insort(there, (arrival, item))

    def remove(self, key: int, arrival: int) -> None:
        """Take an item out. Raises KeyError or IndexError when it is not there."""
        there = self._lists[key]
        if len(there) == 1:
            del self._lists[key]
        else:
            del there[bisect_left(there, (arrival,))]

    def before(self, key: int, arrival: int) -> int:
        """How many items come before one of this key and arrival."""
        smaller = sum(len(there) for other, there in self._lists.items() if other < key)
        return smaller + self.before_within(key, arrival)

    def before_within(self, key: int, arrival: int) -> int:
        """How many of the same key."""
        return bisect_left(self._lists.get(key, ()), (arrival,))

    def count(self, key: int) -> int:
        """How many have this key."""
        return len(self._lists.get(key, ()))

    def sum_below(self, key: int) -> int:
        """The sum of the keys of all items whose key is smaller."""
        return sum(other * len(there) for other, there in self._lists.items() if other < key)
