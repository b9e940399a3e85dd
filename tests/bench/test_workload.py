import pytest

from bench.workload import WORKLOADS, Request, trace


def test_mix_has_the_documented_proportions():
    requests = trace("mix", 100, 4000, seed=1)
    assert sum(each.evaluations for each in requests) / requests[-1].created == pytest.approx(100, rel=0.05)
    assert {each.steps for each in requests} == {20, 50, 250}
    assert {each.images for each in requests} == set(range(1, 9))
    assert {each.label for each in requests} == set(range(10))
    assert sum(each.guided for each in requests) / len(requests) == pytest.approx(0.3, abs=0.03)
    assert sum(each.steps == 20 for each in requests) / len(requests) == pytest.approx(0.7, abs=0.03)


def test_uniform_has_one_kind_of_request():
    requests = trace("uniform", 100, 4000)
    assert sum(each.evaluations for each in requests) / requests[-1].created == pytest.approx(100, rel=0.05)
    assert {(each.steps, each.images, each.guided) for each in requests} == {(50, 1, False)}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_fixes_the_trace(workload):
    assert trace(workload, 10, 30, seed=5) == trace(workload, 10, 30, seed=5)
    assert trace(workload, 10, 30, seed=5) != trace(workload, 10, 30, seed=6)


def test_at_another_rate_the_same_requests_come_closer_together():
    slow, fast = trace("mix", 10, 30), trace("mix", 20, 30)
    assert [each.created for each in slow] == pytest.approx([2 * each.created for each in fast])
    assert [(each.evaluations, each.seed, each.label) for each in slow] == [
        (a.evaluations, a.seed, a.label) for a in fast
    ]


def test_a_short_trace_is_the_beginning_of_a_long_one():
    assert trace("mix", 10, 30) == trace("mix", 10, 300)[:30]


def test_no_two_images_share_a_seed():
    seeds = [each.seed + i for each in trace("mix", 10, 200) for i in range(each.images)]
    assert len(set(seeds)) == len(seeds)


def test_guidance_doubles_the_evaluations():
    assert Request(0.0, 20, images=3).evaluations == 60
    assert Request(0.0, 20, images=3, guided=True).evaluations == 120


def test_an_unknown_workload_is_named():
    with pytest.raises(ValueError, match="'steady'"):
        trace("steady", 1, 1)
