"""Pictures fetched by their URLs, before a build reads them: politely, within limits, and never by surprise.

    out/pictures/NAME        what sources look for: the SHA-256 of a URL, or the name that was asked for
    out/objects/aa/SHA256    the same bytes by their content, once each
    out/fetch.jsonl          for every URL that was tried: when, the status, and the content's SHA-256 or a reason

Off by default. Names are resolved once for each request and the connection goes to the address that was checked, at
every redirect anew (`urls.py`). Robots rules and opt-out headers are kept. A URL that was fetched, or refused for good,
is not asked for again.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import ssl
import threading
import time
import urllib.robotparser
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pydantic
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from weft.atomic import write_bytes_once
from weft.config import Config
from weft.data.sources import SOURCES, SourceConfig
from weft.data.sources.base import has_picture, parse_json, root_of
from weft.data.sources.draft import url_name
from weft.data.sources.files import values
from weft.data.sources.mmc4 import Mmc4
from weft.data.stage import RecordError
from weft.data.urls import PORTS, Network, Refused, port_of, public_address, read_url
from weft.errors import UsageError
from weft.images import MAX_BYTES

if TYPE_CHECKING:
    import httpx2

AGENT = "weft"
MAX_REDIRECTS = 5
ROBOTS_BYTES = 500 * 2**10
HOST_FAILURES = 3
"""So many requests to a host that came to nothing, one after the other, and it is not asked again in this run."""
LONGEST_DELAY = 30.0
BATCH = 10_000
"""URLs that are held at a time."""
PASSING = ("dns", "timeout", "network", "host_dead", "busy")
"""Reasons that may be gone the next time."""
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_SAFE_NAME = re.compile(r"\w[\w.-]{0,200}")


class FetchConfig(Config):
    """How pictures are fetched."""

    enabled: bool = False
    """Nothing is fetched without it."""
    contact: str = pydantic.Field(min_length=5, max_length=200, pattern=r"^[\x21-\x7e]+$")
    """An address, or a page, where whoever runs a server can complain: part of the user agent."""
    ports: tuple[PositiveInt, ...] = PORTS
    max_bytes: PositiveInt = MAX_BYTES
    seconds: PositiveFloat = 10.0
    """For one URL, from the first name to the last byte."""
    threads: PositiveInt = 16
    per_host: PositiveInt = 2
    """Requests to one host at the same time."""
    delay: NonNegativeFloat = 0.0
    """Seconds between two requests that follow each other to a host; its robots.txt can ask for more."""
    respect_noml: bool = False
    """Count noml as an opt-out too."""

    @property
    def agent(self) -> str:
        return f"{AGENT}/{importlib.metadata.version('weft')} (+{self.contact})"


@dataclass(frozen=True)
class Wanted:
    url: str
    name: str | None = None
    """Of the file; None: the SHA-256 of the URL."""
    sha256: str | None = None
    """Of the bytes, where it is known."""

    @property
    def file(self) -> str:
        return self.name or url_name(self.url)


@dataclass(frozen=True)
class Fetched:
    """Every URL is in one of the counts."""

    fetched: int
    known: int
    """Fetched or refused for good before, or twice on the list."""
    refused: Counter[str]
    """By reason."""

    def to_json(self) -> dict[str, Any]:
        return {"fetched": self.fetched, "known": self.known, "refused": dict(self.refused)}


def wanted_of(ledger: Path) -> Iterator[Wanted]:
    """Pictures that a build lost because they had not been fetched, by its ledger."""
    with open(ledger, encoding="utf-8") as lines:
        for entry in map(json.loads, lines):
            if entry["reason"] == "image_remote" and entry["image"]:
                yield Wanted(entry["image"])


def wanted_in(sources: Iterable[SourceConfig]) -> Iterator[Wanted]:
    """Pictures that sources name by URL and that are not where they look for pictures.

    Raises:
        UsageError: a source holds nothing.
    """
    for source in sources:
        if isinstance(source, Mmc4):
            for unit in SOURCES[source.kind].plan(source).units:
                root = root_of(source.path)
                lines = (line for _, line in values(root, unit, parse=bytes) if isinstance(line, bytes))
                pictures = source.images or (root / unit.file).parent
                yield from (item for item in wanted_of_mmc4(lines) if not has_picture(pictures, item.file))
            continue
        if "on_bad_image" in type(source).model_fields:
            # where one lost picture costs the record, the others are not named
            source = source.model_copy(update={"on_bad_image": "image"})
        for unit in SOURCES[source.kind].plan(source).units:
            for record in SOURCES[source.kind].read(source, unit):
                for loss in record.losses:
                    if loss.reason == "image_remote" and loss.image:
                        yield _of_page(loss.image)


def _of_page(url: str) -> Wanted:
    """Readers look for it under the name that the page's own spelling gives."""
    return Wanted(f"https:{url}", url_name(url)) if url.startswith("//") else Wanted(url)


def wanted_of_mmc4(lines: Iterable[bytes]) -> Iterator[Wanted]:
    """Pictures of MMC4's records under the names that its reader looks for. Records that cannot be read have none."""
    for line in lines:
        with contextlib.suppress(RecordError, AttributeError, KeyError, TypeError):
            for info in parse_json(line)["image_info"]:
                url, name = info.get("raw_url"), info["image_name"]
                if isinstance(url, str) and isinstance(name, str):
                    yield Wanted(url, name)


def fetch(wanted: Iterable[Wanted], config: FetchConfig, out: Path, network: Network | None = None) -> Fetched:
    """Fetch what is not there yet. One URL's failure is a line of the log, and others go on.

    Raises:
        UsageError: fetching is not enabled.
    """
    if not config.enabled:
        raise UsageError(
            "fetching pictures is off", where="weft.data.fetch", fix="set enabled: true if you want requests to be sent"
        )
    out.mkdir(parents=True, exist_ok=True)
    log = _Log(out / "fetch.jsonl")
    fetcher = _Fetcher(config, out, network or Network(), log)
    counts, known, items = Counter[str](), 0, iter(wanted)
    with contextlib.closing(log), ThreadPoolExecutor(config.threads) as pool:
        while batch := list(itertools.islice(items, BATCH)):
            lanes: dict[str, deque[Wanted]] = {}
            files = set[str]()
            for item in batch:
                if item.file in files or log.is_settled(item.url) or _is_there(out, item.file):
                    known += 1
                else:
                    files.add(item.file)
                    lanes.setdefault(_host_of(item.url), deque()).append(item)
            # as many lanes as a host may see at once: none waits for another one's host
            work = [lane for lane in lanes.values() for _ in range(min(config.per_host, len(lane)))]
            for done in pool.map(fetcher.drain, work):
                counts += done
    fetched = counts.pop("", 0)
    return Fetched(fetched, known, counts)


def count_hosts(wanted: Iterable[Wanted], out: Path) -> Counter[str]:
    """How many pictures of each host `fetch` would ask for. Holds a hash of each in memory."""
    log, files, hosts = _Log(out / "fetch.jsonl"), set[bytes](), Counter[str]()
    for item in wanted:
        name = hashlib.blake2b(item.file.encode(), digest_size=16).digest()
        if name not in files and not log.is_settled(item.url) and not _is_there(out, item.file):
            files.add(name)
            hosts[_host_of(item.url)] += 1
    return hosts


class _Log:
    """Remembers what came of every URL. Threads share it."""

    def __init__(self, file: Path) -> None:
        self._settled: set[str] = set()
        self._lock = threading.Lock()
        if file.is_file():
            for line in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # of a process that died while it wrote
                    self._remember(json.loads(line))
        self._path = file
        self._file: IO[str] | None = None

    def is_settled(self, url: str) -> bool:
        return url in self._settled

    def add(self, entry: dict[str, Any]) -> None:
        with self._lock:
            self._remember(entry)
            if self._file is None:
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(json.dumps(entry, ensure_ascii=True) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _remember(self, entry: dict[str, Any]) -> None:
        # what was fetched is known by its file, which somebody may have deleted
        if entry["reason"] is not None and entry["reason"] not in PASSING:
            self._settled.add(entry["url"])


@dataclass(frozen=True)
class _Rules:
    robots: urllib.robotparser.RobotFileParser

    def allow(self, url: str) -> bool:
        return self.robots.can_fetch(AGENT, url)

    @property
    def delay(self) -> float:
        return float(self.robots.crawl_delay(AGENT) or 0)


class _Fetcher:
    """Fetches one URL after the other in each of several threads, which share what is known of hosts."""

    def __init__(self, config: FetchConfig, out: Path, network: Network, log: _Log) -> None:
        self._config, self._out, self._network, self._log = config, out, network, log
        self._tls = ssl.create_default_context()
        self._lock = threading.Lock()
        self._slots: dict[str, threading.BoundedSemaphore] = {}
        self._robots: dict[str, _Rules] = {}
        self._robots_locks: dict[str, threading.Lock] = {}
        self._failures = Counter[str]()
        self._delays: dict[str, float] = {}
        self._turns: dict[str, float] = {}
        """When a host may be asked again."""

    def drain(self, lane: deque[Wanted]) -> Counter[str]:
        """Work off a host's lane, which other threads may share; how often each reason was met, "" for success."""
        counts = Counter[str]()
        while True:
            try:
                item = lane.popleft()
            except IndexError:
                return counts
            self._wait(_host_of(item.url))
            counts[self._settle(item)] += 1

    def _wait(self, host: str) -> None:
        """Until it is this thread's turn to ask a host."""
        with self._lock:
            turn = max(time.monotonic(), self._turns.get(host, 0.0))
            self._turns[host] = turn + min(self._delays.get(host, self._config.delay), LONGEST_DELAY)
        time.sleep(max(0.0, turn - time.monotonic()))

    def _settle(self, item: Wanted) -> str:
        began = time.time()
        entry: dict[str, Any] = {"url": item.url, "time": round(began, 3), "status": None, "reason": None}
        try:
            status, data = self._picture(item)
            entry |= {"status": status, "sha256": self._store(item, data), "bytes": len(data)}
        except Refused as refused:
            entry |= {"status": refused.status, "reason": refused.reason, "message": refused.message}
        self._log.add(entry)
        return entry["reason"] or ""

    def _picture(self, item: Wanted) -> tuple[int, bytes]:
        deadline = time.monotonic() + self._config.seconds
        host = _host_of(item.url)
        if self._failures[host] >= HOST_FAILURES:
            raise Refused("host_dead", f"{HOST_FAILURES} requests to {host} in a row came to nothing")
        if not _SAFE_NAME.fullmatch(item.file):
            raise Refused("name", f"{item.file[:80]!r} is no name for a picture")
        try:
            url = read_url(item.url, self._config.ports)
            for _ in range(MAX_REDIRECTS + 1):
                rules = self._rules(url, deadline)
                if not rules.allow(str(url)):
                    raise Refused("opt_out", f"robots.txt of {url.host} does not allow it")
                self._delays[_host_of(str(url))] = max(self._config.delay, rules.delay)
                answer = self._get(url, deadline, self._config.max_bytes, "image/")
                if isinstance(answer, bytes):
                    break
                url = answer
            else:
                raise Refused("redirects", f"more than {MAX_REDIRECTS} redirects")
        except Refused as refused:
            self._failures[host] = self._failures[host] + 1 if refused.reason in PASSING else 0
            raise
        self._failures[host] = 0
        if item.sha256 is not None and hashlib.sha256(answer).hexdigest() != item.sha256:
            raise Refused("hash", "other bytes than the source's SHA-256 names", 200)
        return 200, answer

    def _rules(self, url: "httpx2.URL", deadline: float) -> _Rules:
        """What the host's robots.txt allows; without one, everything."""
        origin = f"{url.scheme}://{url.netloc.decode('ascii')}"
        with self._lock:
            lock = self._robots_locks.setdefault(origin, threading.Lock())
        with lock:
            if origin not in self._robots:
                self._robots[origin] = self._read_rules(f"{origin}/robots.txt", deadline)
            return self._robots[origin]

    def _read_rules(self, text: str, deadline: float) -> _Rules:
        parser = urllib.robotparser.RobotFileParser()
        parser.parse([])
        try:
            url = read_url(text, self._config.ports)
            for _ in range(MAX_REDIRECTS + 1):
                answer = self._get(url, deadline, ROBOTS_BYTES, "")
                if isinstance(answer, bytes):
                    parser.parse(answer.decode("utf-8", errors="replace").splitlines())
                    return _Rules(parser)
                url = answer
        except Refused as refused:
            # a server that says no, or that is broken, has not said yes
            if refused.status in (401, 403):
                parser.parse(["User-agent: *", "Disallow: /"])
            elif refused.reason in PASSING or refused.reason.startswith("address"):
                raise
        return _Rules(parser)

    def _get(self, url: "httpx2.URL", deadline: float, max_bytes: int, kind: str) -> "bytes | httpx2.URL":
        """The body of one answer, or where it redirects to.

        Raises:
            Refused: for whatever reason there is nothing to take.
        """
        import httpx2

        address = public_address(url.raw_host.decode("ascii"), port_of(url), self._network)
        left = deadline - time.monotonic()
        if left <= 0:
            raise Refused("timeout", f"nothing in {self._config.seconds:g} s")
        request = httpx2.Request(
            "GET",
            url.copy_with(host=address),
            headers={
                "Host": url.netloc.decode("ascii"),
                "User-Agent": self._config.agent,
                "Accept": "image/*" if kind else "text/plain",
                "Accept-Encoding": "identity",
                "Connection": "close",
            },
            extensions={
                "timeout": dict.fromkeys(("connect", "read", "write", "pool"), left),
                "sni_hostname": url.raw_host.decode("ascii"),
            },
        )
        with self._slot(url.host), httpx2.HTTPTransport(verify=self._tls, trust_env=False) as transport:
            # each read has a time limit of its own; a server that sends a byte now and then is stopped by this
            timer = threading.Timer(left, transport.close)
            timer.start()
            try:
                response = transport.handle_request(request)
                with contextlib.closing(response):
                    return self._take(url, response, deadline, max_bytes, kind)
            except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
                if isinstance(error, httpx2.TimeoutException) or time.monotonic() >= deadline:
                    raise Refused("timeout", f"not whole in {self._config.seconds:g} s") from error
                raise Refused("network", type(error).__name__) from error
            finally:
                timer.cancel()

    def _take(
        self, url: "httpx2.URL", response: "httpx2.Response", deadline: float, max_bytes: int, kind: str
    ) -> "bytes | httpx2.URL":
        import httpx2

        status, headers = response.status_code, response.headers
        if status in (301, 302, 303, 307, 308) and "location" in headers:
            try:
                target = str(url.join(headers["location"]))
            except httpx2.InvalidURL as error:
                raise Refused("url", f"redirect to no URL: {error}", status) from error
            return read_url(target, self._config.ports)
        if status != 200:
            raise Refused("busy" if status == 429 or status >= 500 else "status", f"status {status}", status)
        opted_out = opt_out_of(headers.get_list("x-robots-tag"), self._config.respect_noml) if kind else None
        if opted_out is not None:
            raise Refused("opt_out", f"X-Robots-Tag: {opted_out}", status)
        found = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not found.startswith(kind) or found == "image/svg+xml":
            raise Refused("content_type", f"{found or 'nothing'!r}, no picture", status)
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise Refused("encoding", f"compressed as {headers['content-encoding']}, which was not asked for", status)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > max_bytes:
            raise Refused("too_large", f"{int(length):,} bytes, more than {max_bytes:,}", status)
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > max_bytes:
                raise Refused("too_large", f"more than {max_bytes:,} bytes", status)
            if time.monotonic() >= deadline:
                raise Refused("timeout", f"not whole in {self._config.seconds:g} s", status)
        if kind and not body:
            raise Refused("empty", "no bytes", status)
        return bytes(body)

    def _slot(self, host: str) -> threading.BoundedSemaphore:
        with self._lock:
            return self._slots.setdefault(host, threading.BoundedSemaphore(self._config.per_host))

    def _store(self, item: Wanted, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        stored = self._out / "objects" / name[:2] / name
        if not stored.is_file():
            write_bytes_once(stored, data)
        place = self._out / "pictures" / item.file
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            # not a symbolic link: pictures must not lead out of their folder
            os.link(stored, place)
        return name


def opt_out_of(headers: Iterable[str], noml: bool = False) -> str | None:
    """The directive of `X-Robots-Tag` headers that says no, to everybody or to this agent."""
    wanted = OPT_OUTS | ({"noml"} if noml else set())
    for header in headers:
        agent = ""
        for piece in header.lower().split(","):
            name, colon, rest = piece.partition(":")
            if colon and name.strip() in _WITH_VALUE:
                continue
            if colon:
                agent, piece = name.strip(), rest
            if agent in ("", "*", AGENT) and piece.strip() in wanted:
                return piece.strip()
    return None


def _is_there(out: Path, name: str) -> bool:
    return _SAFE_NAME.fullmatch(name) is not None and (out / "pictures" / name).is_file()


def _host_of(url: str) -> str:
    """For lanes and counts; what it says is never trusted."""
    return url.partition("://")[2].partition("/")[0].lower()
