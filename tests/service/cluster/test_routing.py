"""Which replica a session reaches, and the metrics of all."""

from __future__ import annotations

from collections import Counter

from service.cluster.metrics import merged
from service.cluster.policies import ranked

NAMES = [f"replica-{place}" for place in range(5)]
SESSIONS = [f"session-{place}" for place in range(1000)]


def test_sessions_are_spread_evenly() -> None:
    first = Counter(ranked(session, NAMES)[0] for session in SESSIONS)
    assert set(first) == set(NAMES)
    assert min(first.values()) > 150  # of 200; the standard deviation is 13


def test_a_replica_that_goes_moves_its_own_sessions_only() -> None:
    for session in SESSIONS:
        before, after = ranked(session, NAMES), ranked(session, NAMES[::-1][:-1])
        assert after == [name for name in before if name != NAMES[0]]


def test_metrics_of_replicas_become_one_text() -> None:
    text = """# HELP a_total Things.
# TYPE a_total counter
a_total{kind="x"} 1.0
# HELP b Seconds.
# TYPE b histogram
b_bucket{le="1.0"} 2.0
b_bucket{le="+Inf"} 3.0
b_count 3.0
b_sum 4.0
"""
    own = merged([({"kind": "y", "replica": "r"}, text)]).decode()
    assert 'a_total{kind="x",replica="r"} 1.0' in own
    both = merged([({"replica": "r"}, text), ({"replica": "s"}, text)]).decode()
    assert both.count("# TYPE a_total counter") == both.count("# TYPE b histogram") == 1
    for replica in "rs":
        assert f'a_total{{kind="x",replica="{replica}"}} 1.0' in both
        assert f'b_bucket{{le="+Inf",replica="{replica}"}} 3.0' in both
        assert f'b_sum{{replica="{replica}"}} 4.0' in both
