"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llm.inference.batching import Request

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServingMetrics:
    """Counters of one server. ``gauges`` are read when somebody asks: by name, what each is and how it is found."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self._answers = Counter("llm_serve_http_requests", "Answers, by HTTP status", ["path", "status"], registry=own)
        self._ended = Counter("llm_serve_requests", "Texts, by how they ended", ["finish"], registry=own)
        self._prompt = Counter("llm_serve_prompt_tokens", "Tokens of prompts", registry=own)
        self._shared = Counter("llm_serve_shared_prompt_tokens", "Those that were computed before", registry=own)
        self._added = Counter("llm_serve_generated_tokens", "Tokens that were written", registry=own)
        self._first = Histogram(
            "llm_serve_time_to_first_token_seconds", "From arrival to the first token", buckets=_SECONDS, registry=own
        )
        self._next = Histogram("llm_serve_token_seconds", "Between a text's tokens", buckets=_SECONDS, registry=own)

    def gauge(self, name: str, told: str, value: Callable[[], float]) -> None:
        """One that is looked up when somebody asks."""
        Gauge(f"llm_serve_{name}", told, registry=self.registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        """An answer was begun."""
        self._answers.labels(path, str(status)).inc()

    def token(self, seconds: float, first: bool) -> None:
        """A token came, so long after the request or the token before."""
        (self._first if first else self._next).observe(seconds)

    def finished(self, request: Request, finish: str) -> None:
        """A text has ended."""
        self._ended.labels(finish).inc()
        if request.started is not None:
            self._prompt.inc(len(request.text.row.prompt))
            self._shared.inc(request.shared)
        self._added.inc(len(request.text.completion.tokens))

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
