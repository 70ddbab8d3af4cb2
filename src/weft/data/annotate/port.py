"""Who answers the roles: rules that are built in, or a chat model behind the port, with a cache of what it said."""

import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from weft.config import Config
from weft.llm import BatchConfig, Cached, HttpConfig, Port, Reply, Request, Result, open_port

log = logging.getLogger(__name__)


class Rules(Config):
    """No model: rules that are the same on every machine. Provenance calls them `rules`."""

    kind: Literal["rules"] = "rules"


AnnotatorConfig = Annotated[Rules | HttpConfig | BatchConfig, pydantic.Field(discriminator="kind")]


def open_annotator(config: Rules | HttpConfig | BatchConfig, cache: Path | None) -> Port | None:
    """The port of a model, None for the rules.

    Args:
        cache: a folder of replies. Every process adds to a file of its own, and begins by reading all of them.

    Raises:
        UsageError: the key's environment variable is not set.
    """
    if isinstance(config, Rules):
        return None
    port = open_port(config)
    if cache is None:
        return port
    cache.mkdir(parents=True, exist_ok=True)
    known = {key: reply for file in sorted(cache.glob("*.jsonl")) for key, reply in _replies(file)}
    return _Known(Cached(port, cache / f"{socket.gethostname()}-{os.getpid()}.jsonl"), known)


class _Known:
    """Answers what others have asked before."""

    def __init__(self, port: Port, known: dict[str, Reply]) -> None:
        self._port, self._known, self.model = port, known, port.model

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        asked = list(requests)
        keys = [request.key(self.model) for request in asked]
        for request, key in zip(asked, keys, strict=True):
            if key in self._known:
                yield request, self._known[key]
        missing = [request for request, key in zip(asked, keys, strict=True) if key not in self._known]
        if missing:
            yield from self._port.complete(missing)


def _replies(file: Path) -> Iterator[tuple[str, Reply]]:
    """Without a last line that its process may still be writing."""
    whole, newline, _ = file.read_bytes().rpartition(b"\n")
    for line in whole.splitlines() if newline else ():
        try:
            record = json.loads(line)
            yield record.pop("key"), Reply(**record)
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s: a damaged line is left out; its request is sent again", file)
