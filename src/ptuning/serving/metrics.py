"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The server's own figures; names of prompts are labels only where there is such a prompt."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter(
            "ptuning_requests_total",
            "Requests by path and status.",
            ["path", "status"],
            registry=own,
        )
        self.rows = Counter("ptuning_rows_total", "Rows answered.", ["prompt"], registry=own)
        self.seconds = Histogram(
            "ptuning_request_seconds",
            "Seconds from a request's head to its answer, its body's way included.",
            ["path"],
            buckets=_SECONDS,
            registry=own,
        )
        self.batches = Histogram(
            "ptuning_batch_rows", "Rows of a batch.", buckets=_SIZES, registry=own
        )
        self._waiting = Gauge("ptuning_waiting_rows", "Rows that wait for the model.", registry=own)
        self._prompts = Gauge("ptuning_prompts", "Prompts served.", registry=own)
        self._refused = Gauge(
            "ptuning_prompts_refused", "Prompts that cannot be served.", registry=own
        )

    def ended(self, path: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def watch(
        self, waiting: Callable[[], int], prompts: Callable[[], int], refused: Callable[[], int]
    ) -> None:
        """Where the gauges look."""
        self._waiting.set_function(waiting)
        self._prompts.set_function(prompts)
        self._refused.set_function(refused)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
