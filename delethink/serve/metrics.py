"""Metrics of the server for Prometheus: names of vLLM, and those of chunked thinking."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from delethink.serve.events import BoundaryCrossed, ThinkingEnded, TraceEnded
from delethink.serve.jobs import Admission, ChoiceEvent, JobBoard

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_GAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)
_CHUNKS = (0, 1, 2, 3, 5, 8, 13, 23, 40, 60, 100, 200)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, model_name: str, admission: Admission, board: JobBoard) -> None:
        self.registry = CollectorRegistry()
        self._name = model_name
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of queries.")
        self.sampled_tokens = self._counter("vllm:generation_tokens", "Sampled tokens.")
        self.first_token_s = self._histogram(
            "vllm:time_to_first_token_seconds", "Time to the first token.", _SECONDS
        )
        self.gap_s = self._histogram(
            "vllm:inter_token_latency_seconds", "Time between pieces of a trace.", _GAPS
        )
        self.whole_s = self._histogram(
            "vllm:e2e_request_latency_seconds", "Time of a whole trace.", _SECONDS
        )
        self._finished = Counter(
            "vllm:request_success",
            "Traces by their finish reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._ends = Counter(
            "delethink_thinking_ends",
            "Ends of thinking by their reason.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        self._errors = Counter(
            "delethink_request_errors",
            "Requests answered with an error, by its HTTP status.",
            ("model_name", "status"),
            registry=self.registry,
        )
        self._boundaries = self._counter("delethink_boundaries", "Boundaries crossed.")
        self._carried = self._counter("delethink_carried_tokens", "Carried tokens.")
        self._reencoded = self._counter(
            "delethink_reencoded_tokens", "Prompt tokens of later chunks and separate answers."
        )
        self._forced = self._counter("delethink_forced_ends", "Ends of thinking by force.")
        self._loops = self._counter("delethink_loops", "Traces ended because they repeated.")
        self._nudges = self._counter("delethink_nudges", "Boundaries after a loop.")
        self._chunks = self._counter("delethink_chunks", "Chunks of thinking.")
        self._cancelled = self._counter("delethink_cancelled", "Traces cancelled by their clients.")
        self._chunks_of_trace = self._histogram(
            "delethink_chunks_of_trace", "Chunks of a trace.", _CHUNKS
        )
        self._gauge("vllm:num_requests_running", "Traces being sampled.").set_function(
            lambda: admission.running
        )
        self._gauge("vllm:num_requests_waiting", "Traces that wait.").set_function(
            lambda: admission.waiting
        )
        self._gauge("delethink_retries_attached", "Retries that found their trace.").set_function(
            lambda: board.attached
        )

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(name, text, ("model_name",), registry=self.registry)
        counter: Counter = made.labels(self._name)
        return counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)
        histogram: Histogram = made.labels(self._name)
        return histogram

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge: Gauge = Gauge(name, text, ("model_name",), registry=self.registry).labels(self._name)
        return gauge

    def count(self, event: ChoiceEvent) -> None:
        """Count an event of a trace."""
        told = event.event
        if isinstance(told, BoundaryCrossed):
            self._boundaries.inc()
            self._carried.inc(told.carried_tokens)
            self._nudges.inc(told.is_nudge)
        elif isinstance(told, ThinkingEnded):
            self._count_end(told)
        elif isinstance(told, TraceEnded):
            usage = told.usage
            self._chunks.inc(usage.chunks)
            self._chunks_of_trace.observe(usage.chunks)
            self._reencoded.inc(usage.reencoded_tokens)
            self.prompt_tokens.inc(usage.prompt_tokens)
            self.sampled_tokens.inc(usage.completion_tokens)
            self._finished.labels(self._name, "length" if told.is_cut else "stop").inc()

    def _count_end(self, ended: ThinkingEnded) -> None:
        self._ends.labels(self._name, ended.reason.value).inc()
        if ended.reason.is_forced:
            self._forced.inc()
        if ended.reason.value == "loop":
            self._loops.inc()

    def count_error(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._errors.labels(self._name, str(status)).inc()

    def count_cancelled(self) -> None:
        """Count a trace whose client left."""
        self._cancelled.inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        metrics: bytes = generate_latest(self.registry)
        return metrics
