"""Nobody can take what others ask for, and who is refused is told when there will be room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.admission import COMES_BACK_S, REMEMBERED, Slots
from service.errors import ClientLimitError, QueueFullError


def full(capacity: int = 16, most: int = 16, due: float = 10.0) -> Slots:
    """All that `greedy` may have, in jobs of one image; job i is due at `due` + i."""
    slots = Slots(capacity, most)
    for i in range(most):
        assert slots.refusal("greedy", 1, 0.0) is None
        slots.take(str(i), "greedy", 1, due + i)
    return slots


def test_one_client_alone_may_have_everything() -> None:
    slots = full()
    assert slots.of("greedy") == slots.taken == 16
    assert isinstance(slots.refusal("greedy", 1, 0.0), QueueFullError)


def test_what_is_freed_goes_to_who_was_refused() -> None:
    slots = full()
    assert isinstance(slots.refusal("other", 4, 0.0), QueueFullError)
    for i in range(4):
        slots.give_back(str(i))
        assert isinstance(slots.refusal("greedy", 1, 0.0), ClientLimitError)
    assert slots.refusal("other", 4, 0.0) is None


def test_the_share_is_the_same_for_all_that_have_slots() -> None:
    slots = Slots(16, 16)
    slots.take("a", "greedy", 4, 1.0)
    slots.take("b", "other", 1, 1.0)
    assert slots.refusal("greedy", 4, 0.0) is None  # half of 16 in all
    error = slots.refusal("greedy", 5, 0.0)
    assert isinstance(error, ClientLimitError)
    assert "4 images in flight, and may have 8" in error.detail
    slots.give_back("b")
    assert slots.refusal("greedy", 12, 0.0) is None


def test_who_does_not_come_back_holds_nothing_for_long() -> None:
    slots = full()
    error = slots.refusal("gone", 1, 0.0)
    assert error is not None
    until = error.retry_after_s + COMES_BACK_S
    for i in range(2):
        slots.give_back(str(i))
    assert isinstance(slots.refusal("greedy", 1, until - 0.01), ClientLimitError)
    assert slots.refusal("greedy", 1, until) is None


def test_a_client_without_slots_gets_one_request_however_large() -> None:
    slots = Slots(16, 4)
    for i in range(8):
        slots.take(str(i), f"client {i}", 1, 1.0)
    assert slots.share("new", 0.0) == 1
    assert slots.refusal("new", 8, 0.0) is None
    slots.take("new", "new", 8, 1.0)
    slots.give_back("0")
    assert isinstance(slots.refusal("new", 1, 0.0), ClientLimitError)


def test_a_limit_for_one_client_leaves_room_for_another_at_once() -> None:
    slots = full(most=12)
    assert isinstance(slots.refusal("greedy", 1, 0.0), ClientLimitError)
    assert slots.refusal("other", 4, 0.0) is None


def test_retry_after_is_when_enough_jobs_are_done() -> None:
    slots = Slots(16, 16)
    for name, count, due in (("a", 8, 40.0), ("b", 4, 30.0), ("c", 4, 56.0)):
        slots.take(name, "greedy", count, due)
    waits = {}
    for wanted in (4, 5, 12, 13, 16):
        error = slots.refusal("other", wanted, 2.0)
        assert error is not None
        waits[wanted] = error.retry_after_s
    assert waits == {4: 28.0, 5: 38.0, 12: 38.0, 13: 54.0, 16: 54.0}
    slots.expect("b", 50.0)
    error = slots.refusal("other", 4, 2.0)
    assert error is not None
    assert error.retry_after_s == 38.0


def test_a_client_over_its_share_waits_for_its_own_jobs() -> None:
    slots = Slots(16, 16)
    slots.take("own", "greedy", 8, 100.0)
    slots.take("other", "other", 4, 1.0)
    error = slots.refusal("greedy", 1, 0.0)
    assert isinstance(error, ClientLimitError)
    assert error.retry_after_s == 100.0


def test_a_wait_is_a_second_at_least() -> None:
    error = full(due=-5.0).refusal("other", 1, 0.0)
    assert error is not None
    assert error.retry_after_s == 1.0


def test_any_number_of_addresses_takes_little_memory() -> None:
    slots = full()
    for i in range(2 * REMEMBERED):
        assert slots.refusal(f"192.0.2.{i}", 1, 0.0) is not None
    assert len(slots._asking) == REMEMBERED
    slots.share("greedy", 1e6)
    assert not slots._asking


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.booleans()), max_size=60),
    st.integers(6, 24),
    st.integers(1, 24),
)
def test_whatever_is_asked_nobody_gets_more_than_a_share(
    asked: list[tuple[int, int, bool]], capacity: int, most: int
) -> None:
    slots = Slots(capacity, min(most, capacity))
    held: dict[str, tuple[str, int]] = {}
    for number, (who, wanted, ends) in enumerate(asked):
        name, owner = str(number), str(who)
        had = sum(count for of, count in held.values() if of == owner)
        others = {of for of, _ in held.values()} - {owner} | set(slots._asking) - {owner}
        error = slots.refusal(owner, wanted, 0.0)
        share = min(slots.most, capacity // (1 + len(others)))
        fits = sum(count for _, count in held.values()) + wanted <= capacity
        assert (error is None) == (fits and (not had or had + wanted <= max(1, share)))
        if error is None:
            slots.take(name, owner, wanted, 1.0)
            held[name] = owner, wanted
        if ends and held:
            slots.give_back(first := next(iter(held)))
            del held[first]
        assert slots.taken == sum(count for _, count in held.values()) <= capacity
        assert all(slots.of(of) > 0 for of, _ in held.values())
    for name in held:
        slots.give_back(name)
    assert (slots.taken, dict(slots._by_owner)) == (0, {})


@pytest.mark.parametrize("clients", [2, 3])
def test_under_steady_greed_everybody_gets_a_share(clients: int) -> None:
    """All ask for more all the time, the first of them first, and jobs end one after the other."""
    slots = full(capacity=12, most=12)
    running = [str(i) for i in range(12)]
    names = ["greedy", *(f"other {i}" for i in range(1, clients))]
    for turn in range(200):
        slots.give_back(running.pop(0))
        for name in names:
            if slots.refusal(name, 1, float(turn)) is None:
                slots.take(f"{name} {turn}", name, 1, turn + 12.0)
                running.append(f"{name} {turn}")
    assert {name: slots.of(name) for name in names} == dict.fromkeys(names, 12 // clients)
