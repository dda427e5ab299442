"""Metrics for Prometheus (`/metrics`): the scheduler's counters, histograms over requests."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mor.serving.engine import Engine
from mor.serving.outputs import Delta

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """Figures of one engine, in a registry of their own.

    Args:
        engine: the engine.

    Attributes:
        registry: of prometheus_client.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Counters(engine))
        self._engine = engine
        self._last_token: dict[tuple[int, int], float] = {}
        depths = range(engine.limits.num_recursions + 1)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

        self._rows = histogram("mor_batch_rows", "Rows of a pass.", _ROWS, "kind")
        self._host = histogram(
            "mor_step_host_seconds",
            "Seconds of a step outside the model.",
            [s / 100 for s in _SECONDS],
        )
        self._depth = histogram("mor_exit_depth", "Recursion steps of a token.", list(depths))
        self._ttft = histogram("mor_ttft_seconds", "Seconds to the first token.", _SECONDS)
        self._gap = histogram("mor_inter_token_seconds", "Seconds between tokens.", _SECONDS)

    def observe(self, deltas: Sequence[Delta], now: float) -> None:
        """Count a step of the engine.

        Args:
            deltas: what it brought.
            now: time on the engine's clock.
        """
        last = self._engine.last_pass
        if last.kind != "idle":
            self._rows.labels(last.kind).observe(last.rows)
            self._host.observe(last.host_seconds)
        for delta in deltas:
            key = delta.request_id, delta.index
            if delta.token_ids:
                before = self._last_token.get(key)
                if before is not None:
                    self._gap.observe(now - before)
                self._last_token[key] = now
            for depth in delta.depths:
                self._depth.observe(depth)
            if delta.finish_reason is not None:
                self._last_token.pop(key, None)
                if delta.timings is not None and delta.timings.first_token is not None:
                    self._ttft.observe(delta.timings.first_token)

    def text(self) -> bytes:
        """The figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _Counters(Collector):
    """The scheduler's own counters, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.scheduler.stats()
        used = stats.blocks - stats.blocks_free
        for name, text, value in (
            ("mor_requests_running", "Sequences that run.", stats.running),
            ("mor_requests_waiting", "Requests that wait to be admitted.", stats.waiting),
            ("mor_kv_blocks", "Blocks of keys and values.", stats.blocks),
            ("mor_kv_blocks_used", "Blocks that sequences use.", used),
            ("mor_kv_blocks_cached", "Free blocks that hold a prefix.", stats.blocks_cached),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("mor_tokens", "Tokens sampled.", stats.sampled_tokens),
            ("mor_preemptions", "Sequences whose blocks others took.", stats.preemptions),
            ("mor_prefix_tokens", "Tokens of admitted sequences.", stats.prefix_tokens),
            ("mor_prefix_hit_tokens", "Of these, found in the cache.", stats.prefix_hit_tokens),
        ):
            yield CounterMetricFamily(name, text, value=value)
