"""What a server counts, for Prometheus: numbers of requests, seconds and tokens, and nothing of what was asked."""

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weft.generation import Usage
from weft.serve.scheduler import Scheduler


class Counters:
    """One server's."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self._registry}
        self._outcomes = Counter("weft_requests", "Requests by outcome", ["endpoint", "outcome"], **kept)
        self._seconds = Histogram("weft_request_seconds", "From arrival to outcome", ["endpoint"], **kept)
        self._first = Histogram("weft_first_piece_seconds", "From arrival to the first text or picture", **kept)
        self._tokens = Counter("weft_tokens", "Read and written", ["kind"], **kept)
        for name, what, read in (
            ("weft_waiting", "Requests without a slot", lambda: scheduler.load.waiting),
            ("weft_running", "Requests being answered", lambda: scheduler.load.running),
            ("weft_slots", "Answers that can be written at once", lambda: scheduler.load.slots),
            ("weft_steps", "Steps of the engines so far", lambda: scheduler.steps),
            (
                "weft_late_steps",
                "Most steps begun for one request whose caller was gone",
                lambda: scheduler.most_late_steps,
            ),
        ):
            Gauge(name, what, **kept).set_function(read)

    def first(self, seconds: float) -> None:
        self._first.observe(seconds)

    def made(self, usage: Usage) -> None:
        for kind, number in (
            ("prompt", usage.prompt_tokens),
            ("text", usage.text_tokens),
            ("image", usage.image_tokens),
        ):
            self._tokens.labels(kind).inc(number)

    def outcome(self, endpoint: str, outcome: str, seconds: float) -> None:
        self._outcomes.labels(endpoint, outcome).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)
