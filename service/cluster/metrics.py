"""Metrics of several processes as one text. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Merged(Collector):
    """Metrics of several processes, each with labels of its own."""

    def __init__(self, texts: Sequence[tuple[Mapping[str, str], str]]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        """One family of each name. A label that a sample has is kept."""
        families: dict[str, Metric] = {}
        for labels, text in self._texts:
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.samples.append(sample._replace(labels={**labels, **sample.labels}))
        return families.values()


def merged(texts: Sequence[tuple[Mapping[str, str], str]]) -> bytes:
    """Metrics in Prometheus's text format as one such text, those of each with its labels."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)
