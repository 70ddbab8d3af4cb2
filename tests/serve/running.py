"""A server in this process, on a free port, and clients of it."""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from weft.serve.app import Served, create_app
from weft.serve.hosts import in_thread
from weft.serve.limits import Limits
from weft.serve.run import Server, server_of
from weft.serve.scheduler import Scheduler
from weft.serve.settings import ServeConfig

PATIENCE = 60.0
"""Seconds after which a test gives up waiting: machines that run tests are slow and busy."""


@dataclass
class Running:
    """A server that answers."""

    url: str
    app: Any
    scheduler: Scheduler
    limits: Limits
    server: Server

    def openai(self, key: str = "none") -> openai.OpenAI:
        """The stock client; nothing is asked twice."""
        # certificates take long to read, and are for nothing here
        http = openai.DefaultHttpxClient(verify=False, trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, http_client=http)

    def http(self, key: str | None = None) -> httpx2.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False, verify=False)


@contextmanager
def running(
    models: Mapping[str, Any],
    *,
    slots: int = 4,
    context: int | None = None,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    public_url: str = "",
) -> Iterator[Running]:
    """Serve models by their names until the block ends."""
    limits = limits or Limits()
    host = in_thread(models, slots=slots, context=context)
    scheduler = Scheduler(host, queue=limits.queue, queue_seconds=limits.queue_seconds)
    app = create_app(scheduler, [Served(name) for name in models], keys=keys, limits=limits, public_url=public_url)
    server = server_of(app, scheduler, ServeConfig(port=0, slots=slots, limits=limits))
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    scheduler.start()
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(f"http://127.0.0.1:{socket.getsockname()[1]}", app, scheduler, limits, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        asyncio.run(scheduler.drain(0))


def until(is_so: Any, *, seconds: float = PATIENCE) -> None:
    """Wait for what no event tells of."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)
