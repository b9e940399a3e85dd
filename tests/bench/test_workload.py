import pytest

from bench.workload import WORKLOADS, Ask, trace


def test_the_mix_asks_for_what_it_says():
    asks = trace("mix", 100, 4000, seed=1)
    assert sum(ask.rows for ask in asks) / asks[-1].created == pytest.approx(100, rel=0.05)
    assert {ask.steps for ask in asks} == {20, 50, 250}
    assert {ask.images for ask in asks} == set(range(1, 9))
    assert {ask.label for ask in asks} == set(range(10))
    assert sum(ask.guided for ask in asks) / len(asks) == pytest.approx(0.3, abs=0.03)
    assert sum(ask.steps == 20 for ask in asks) / len(asks) == pytest.approx(0.7, abs=0.03)


def test_the_uniform_one_too():
    asks = trace("uniform", 100, 4000)
    assert sum(ask.rows for ask in asks) / asks[-1].created == pytest.approx(100, rel=0.05)
    assert {(ask.steps, ask.images, ask.guided) for ask in asks} == {(50, 1, False)}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_fixes_the_trace(workload):
    assert trace(workload, 10, 30, seed=5) == trace(workload, 10, 30, seed=5)
    assert trace(workload, 10, 30, seed=5) != trace(workload, 10, 30, seed=6)


def test_at_another_rate_the_same_asks_come_closer_together():
    slow, fast = trace("mix", 10, 30), trace("mix", 20, 30)
    assert [ask.created for ask in slow] == pytest.approx([2 * ask.created for ask in fast])
    assert [(ask.rows, ask.seed, ask.label) for ask in slow] == [(a.rows, a.seed, a.label) for a in fast]


def test_a_short_trace_is_the_beginning_of_a_long_one():
    assert trace("mix", 10, 30) == trace("mix", 10, 300)[:30]


def test_no_two_images_share_a_seed():
    seeds = [ask.seed + i for ask in trace("mix", 10, 200) for i in range(ask.images)]
    assert len(set(seeds)) == len(seeds)


def test_a_guided_ask_costs_twice():
    assert Ask(0.0, 20, images=3).rows == 60
    assert Ask(0.0, 20, images=3, guided=True).rows == 120


def test_an_unknown_workload_is_named():
    with pytest.raises(ValueError, match="'steady'"):
        trace("steady", 1, 1)
