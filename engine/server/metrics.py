"""The server's metrics for Prometheus, by vLLM's names (vllm/v1/metrics), which its dashboards and autoscalers read.

Gauges and the prefix cache's counters are read from the replicas when somebody asks; the rest is counted as requests
go. Times are the replicas' own: a simulated one's pass as fast as its simulated time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.scheduling.request import Request
from engine.server.live import Gauges

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
         160.0, 640.0, 2560.0)  # fmt: skip
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
            960.0, 1920.0, 7680.0)  # fmt: skip
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Metrics:
    """Counts what is served; `page` is what /metrics answers."""

    def __init__(self, model: str, gauges: Callable[[], Sequence[Gauges]]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        labels = ("model_name", "engine")
        values = (model, "0")

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Any:
            made = Histogram(f"vllm:{name}", what, labels, buckets=buckets, registry=self._registry)
            return made.labels(*values)

        def counter(name: str, what: str) -> Any:
            return Counter(f"vllm:{name}", what, labels, registry=self._registry).labels(*values)

        self.ttft = histogram("time_to_first_token_seconds", "Time to first token (s).", _TTFT)
        self.itl = histogram("inter_token_latency_seconds", "Time between output tokens (s).", _ITL)
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean time per output token (s).", _ITL)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token (s).", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first batch (s).", _REQUEST)
        self._inference = histogram("request_inference_time_seconds", "First batch to last token (s).", _REQUEST)
        self._prefill = histogram("request_prefill_time_seconds", "First batch to first token (s).", _REQUEST)
        self._decode = histogram("request_decode_time_seconds", "First to last token (s).", _REQUEST)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generation = histogram("request_generation_tokens", "Output tokens of a request.", _TOKENS)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.generation_tokens = counter("generation_tokens", "Output tokens.")
        self._preemptions = counter("num_preemptions", "Preemptions of finished requests.")
        success = Counter(
            "vllm:request_success", "Finished requests.", (*labels, "finished_reason"), registry=self._registry
        )
        self._success = {reason: success.labels(*values, reason) for reason in ("stop", "length", "abort")}
        self._registry.register(_Replicas(model, gauges))

    def finished(self, request: Request, reason: str, tokens: int) -> None:
        """A request got its last token, which is its `tokens`-th, or lost its client."""
        self._success.get(reason, self._success["abort"]).inc()
        if reason == "abort" or not tokens or request.scheduled_at is None:
            return
        first, last = request.token_times[0], request.token_times[tokens - 1]
        self._e2e.observe(last - request.arrived_at)
        self._queue.observe(request.scheduled_at - request.arrived_at)
        self._inference.observe(last - request.scheduled_at)
        self._prefill.observe(first - request.scheduled_at)
        self._decode.observe(last - first)
        if tokens > 1:
            self._tpot.observe((last - first) / (tokens - 1))
        self._prompt.observe(request.prompt_tokens)
        self._generation.observe(tokens)
        self._prompt_tokens.inc(request.prompt_tokens)
        self._preemptions.inc(request.preemptions)

    def page(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


class _Replicas:
    """Reads the replicas when the page is asked for; a collector of prometheus_client."""

    def __init__(self, model: str, gauges: Callable[[], Sequence[Gauges]]) -> None:
        self._model, self._gauges = model, gauges

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["model_name", "engine"]
        found = [(str(number), gauges) for number, gauges in enumerate(self._gauges())]
        families: list[tuple[Any, str, str, Callable[[Gauges], float]]] = [
            (GaugeMetricFamily, "num_requests_running", "Requests that run.", lambda each: each.running),
            (GaugeMetricFamily, "num_requests_waiting", "Requests in the queue.", lambda each: each.waiting),
            (GaugeMetricFamily, "kv_cache_usage_perc", "Share of the KV blocks in use.", lambda each: each.kv_usage),
            (CounterMetricFamily, "prefix_cache_queries", "Prompt tokens looked up.", lambda each: each.prefix_queries),
            (CounterMetricFamily, "prefix_cache_hits", "Prompt tokens found.", lambda each: each.prefix_hits),
        ]
        for family, name, what, value in families:
            made = family(f"vllm:{name}", what, labels=labels)
            for engine, gauges in found:
                made.add_metric([self._model, engine], value(gauges))
            yield made
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache.", labels=["engine", "block_size", "num_gpu_blocks"]
        )
        for engine, gauges in found:
            info.add_metric([engine, str(gauges.block_size), str(gauges.num_blocks)], 1)
        yield info
