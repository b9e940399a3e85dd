"""The alerts as a PrometheusRule, for the Prometheus Operator: docker/alerts.yml below a head of its own.

`python -m tests.prometheus_rule` writes it (`make rules`); test_kubernetes.py compares. Kustomize can read a
file into a ConfigMap or a Secret only, and the operator reads neither.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parent.parent
ALERTS = ROOT / "docker" / "alerts.yml"
RULE = ROOT / "docker" / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml"
HEAD = """\
# Written by `make rules` from docker/alerts.yml; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ddpm
spec:
"""


def prometheus_rule(alerts: str) -> str:
    """The manifest with the rules of `alerts`, the text of a rules file."""
    return HEAD + indent(alerts, "  ")


if __name__ == "__main__":
    RULE.write_text(prometheus_rule(ALERTS.read_text()))
