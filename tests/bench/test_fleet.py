from dataclasses import replace
from random import Random
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import pytest

from bench.fleet import __main__ as program
from bench.fleet.arrivals import MEAN_EVALUATIONS, Diurnal, Flash, arrivals
from bench.fleet.check import compared, latencies
from bench.fleet.replica import Batching, Replica, engine_of
from bench.fleet.routers import CACHE_S, RayDefault
from bench.fleet.scaling import Delay, Scaler, Scaling, ray_desired
from bench.fleet.simulation import Fleet, simulate
from bench.load import Answer
from bench.simulation import CURVES, Case, jobs_of

CPU = CURVES["cpu"]
EVERY = ("random", "ray", "requests", "work", "work of all", "known work", "known rows")


with catch_warnings():
    simplefilter("ignore")  # Ray declares its fields in a way that pydantic deprecates
    from ray.serve.autoscaling_policy import _apply_delay_logic, _core_replica_queue_length_policy
    from ray.serve.config import AutoscalingConfig


def requests_of(fleet, load, count, **shape):
    rate = load * fleet.capacity * fleet.replicas
    return arrivals(rate, count * MEAN_EVALUATIONS / rate, **shape)


def test_one_replica_is_the_simulation_of_one():
    pairs: tuple[tuple[Batching, str], ...] = (("steps", "remaining"), ("requests", "peer"))
    for batching, policy in pairs:
        fleet = Fleet(CPU, batching=batching, max_batch_size=8, max_ongoing=10**9)
        requests = requests_of(fleet, 0.9, 150)
        alone = Case(CPU, policy=policy, batch_size=8).drive(jobs_of(requests))
        assert simulate(fleet, requests).ended.tolist() == [outcome.ended for outcome in alone]


@pytest.mark.parametrize("routing", EVERY)
def test_every_request_ends_once_and_no_work_is_lost(routing):
    fleet = Fleet(CPU, 5, routing, losses=(8.0, 9.0), startup_s=5.0, max_ongoing=4)
    requests = requests_of(fleet, 1.5, 200)
    result = simulate(fleet, requests)
    assert (result.ended > result.created).all()  # nan is not
    assert result.lost > 0
    assert result.computed == result.evaluations.sum() + result.lost
    assert (result.attempts >= 1).all()
    assert (result.attempts > 1).any()


@pytest.mark.parametrize("batching", ["steps", "requests"])
def test_littles_law(batching):
    fleet = Fleet(CPU, 4, "ray", batching, 16, losses=(10.0,))
    result = simulate(fleet, requests_of(fleet, 0.8, 200))
    # Requests in flight, counted as events pass, against what requests say themselves.
    assert result.in_system == pytest.approx(result.latency.sum())


def test_the_same_seed_gives_the_same_result():
    fleet = Fleet(CPU, 3, "requests", scaling=Scaling(upscale_delay_s=2, push_s=1, look_back_s=5))
    requests = requests_of(fleet, 1.2, 100, seed=7)
    assert requests == requests_of(fleet, 1.2, 100, seed=7)
    first, second = (simulate(fleet, requests).ended.tolist() for _ in range(2))
    assert first == second
    assert simulate(replace(fleet, seed=1), requests).ended.tolist() != first


@pytest.mark.parametrize("routing", ["random", "ray", "requests", "work"])
def test_full_replicas_reject_and_the_request_comes_back(routing, monkeypatch):
    fleet = Fleet(CPU, 16, routing, max_ongoing=1)  # two routers, which do not know of each other
    accept = Replica.accept

    def checked(self, spec):
        assert self.ongoing == 0
        accept(self, spec)

    monkeypatch.setattr(Replica, "accept", checked)
    assert np.isfinite(simulate(fleet, requests_of(fleet, 3.0, 100)).ended).all()


def test_a_router_believes_its_cache_for_ten_seconds():
    busy, idle = (Replica(name, engine_of("steps", CPU), 0.0) for name in range(2))
    router = RayDefault([busy, idle], Random(0))
    busy.ongoing, idle.ongoing = 0, 2
    for each in (busy, idle):
        router.sent(0, each, 1.0, 1.0)  # its acceptance says so
    busy.ongoing = 5  # what another router has sent
    idle.ongoing = 2
    # Its cache has 0 and 2, though the replicas have 5 and 2.
    assert {router.choose(0, 2.0, 100) for _ in range(9)} == {busy}
    assert {router.choose(0, 2.0 + CACHE_S, 100) for _ in range(9)} == {idle}


def test_the_shape_of_arrivals():
    crowd = arrivals(1000 * MEAN_EVALUATIONS, 10.0, rate=Flash(4.0, 2.0, 5.0))
    times = np.array([each.created for each in crowd])
    inside = ((times >= 4) & (times < 6)).sum()
    assert inside / 2 == pytest.approx(5 * (len(times) - inside) / 8, rel=0.05)
    day = np.array([each.created for each in arrivals(1000 * MEAN_EVALUATIONS, 10.0, rate=Diurnal(10.0))])
    noon, night = ((day > 4) & (day < 6)).sum(), (day < 1).sum() + (day > 9).sum()
    assert noon / night == pytest.approx((1 + 0.6 * 0.935) / (1 - 0.6 * 0.935), rel=0.1)
    assert np.mean([each.evaluations for each in crowd]) == pytest.approx(MEAN_EVALUATIONS, rel=0.05)


def test_delays_are_rays_own():
    random = Random(3)
    for _ in range(20):
        up, down = random.choice([0.0, 3.0, 30.0]), random.choice([0.0, 5.0, 60.0])
        config = AutoscalingConfig(upscale_delay_s=up, downscale_delay_s=down, max_replicas=99)
        state: dict[str, Any] = {}
        ours = theirs = 5
        delay, now = Delay(up, down), 0.0
        wanted = 5
        for _ in range(200):
            now += random.choice([0.5, 1.0, 7.0])
            if random.random() < 0.3:
                wanted = random.randint(1, 12)
            ours = delay.follow(wanted, ours, now)
            theirs, state = _apply_delay_logic(wanted, theirs, config, state, now)
            assert ours == theirs


def test_the_number_that_is_wanted_is_rays_own():
    class Context:
        target_num_replicas = 4

        def __init__(self, requests, running, target):
            self.total_num_requests, self.current_num_replicas = requests, running
            self.config = AutoscalingConfig(target_ongoing_requests=target, max_replicas=99)

    for requests in (0.0, 0.5, 7.0, 33.3):
        for running in (0, 1, 8):
            context: Any = Context(requests, running, 2.0)
            desired, _ = _core_replica_queue_length_policy(context)
            assert ray_desired(requests, running, 4, 2.0) == int(np.ceil(desired))


def test_a_crowd_brings_replicas_and_its_end_takes_them():
    scaling = Scaling("work", 1.0, 2, 20, 1.0, 3.0, 2.0, 5.0)
    fleet = Fleet(CPU, 2, "ray", scaling=scaling, startup_s=3.0)
    requests = requests_of(fleet, 0.4, 150, rate=Flash(10.0, 10.0, 6.0))
    result = simulate(fleet, requests)
    counts = [count for _, count in result.replicas]
    assert max(counts) > 3
    assert counts[-1] < max(counts)
    fixed = simulate(replace(fleet, scaling=None), requests)
    assert result.latency.mean() < fixed.latency.mean()
    assert result.device_s > fixed.device_s / 2


def test_what_was_pushed_is_what_is_decided_by():
    scaler = Scaler(Scaling(target=1.0, upper=50, push_s=10.0, look_back_s=10.0, upscale_delay_s=0.0))
    scaler.observe(0.0, 0, 0)
    for now in range(1, 10):
        scaler.observe(float(now), 20, 0)
        assert scaler.decide(float(now), 2, 2, 100.0) <= 2
    scaler.observe(10.0, 20, 0)
    assert scaler.decide(10.0, 2, 2, 100.0) == 19  # ten of eleven samples are 20


def test_batches_of_requests_fall_behind_where_steps_do_not():
    fleet = Fleet(CURVES["gpu"], 2, "ray", max_batch_size=32)
    requests = requests_of(fleet, 0.9, 1500)
    steps, batches = (simulate(replace(fleet, batching=kind), requests) for kind in ("steps", "requests"))
    assert np.percentile(batches.latency, 95) > 3 * np.percentile(steps.latency, 95)


def test_errors_are_shares_of_what_was_measured():
    assert compared([1.0, 1.0], [1.1, 1.1]) == ["1.00", "1.10", "+10%"] * 3


def test_a_failed_request_is_no_latency():
    request = arrivals(1000.0, 10.0)[0]
    assert latencies([Answer(request, "done", latency_s=2.0)]) == [2.0]
    with pytest.raises(RuntimeError, match="1 failed"):
        latencies([Answer(request, "rejected")])


def test_every_table_and_the_plot_are_written(tmp_path, capsys):
    program.main(["--quick", "--out", str(tmp_path), "--only", "batching", "--only", "loss"])
    assert "|gpu|0.9|steps|" in capsys.readouterr().out
    assert "#### loss" in (tmp_path / "scale-tables.md").read_text()
    assert (tmp_path / "scale.svg").read_text().startswith("<?xml")
