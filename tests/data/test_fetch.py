"""Nothing is fetched that must not be, nothing without limits, and nothing unasked."""

import hashlib
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import png
from weft.atomic import write_bytes_once
from weft.data.fetch import FetchConfig, Fetched, Wanted, fetch, opt_out_of, wanted_of, wanted_of_mmc4
from weft.data.sources.draft import url_name
from weft.data.urls import Network, Refused, public_address, read_url
from weft.errors import UsageError
from weft.images import read_image

PUBLIC = "93.184.216.34"
PATIENCE = 30.0


class Server:
    """Answers pictures on this machine; what a test puts into `behave` by path comes before."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        """(host, path), in the order of requests."""
        self.headers: list[dict[str, str]] = []
        self.running = self.most = 0
        self.behave: dict[str, Callable[[Any], None]] = {"/robots.txt": lambda handler: handler.say(b"", 404)}
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with server.lock:
                    server.seen.append((self.headers["Host"].partition(":")[0], self.path))
                    server.headers.append(dict(self.headers))
                    server.running += 1
                    server.most = max(server.most, server.running)
                try:
                    server.behave.get(self.path, lambda handler: handler.say(png()))(self)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with server.lock:
                        server.running -= 1

            def say(self, body: bytes, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> None:
                self.send_response(status)
                given = {name.lower() for name, _ in headers}
                own = (("Content-Type", "image/png"), ("Content-Length", str(len(body))))
                for name, value in (*headers, *(each for each in own if each[0].lower() not in given)):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str, host: str = "pictures.example.org") -> str:
        return f"http://{host}:{self.port}{path}"

    def pictures(self) -> list[str]:
        return [path for _, path in self.seen if path != "/robots.txt"]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


NAMES = {
    "pictures.example.org": [PUBLIC],
    "other.example.org": [PUBLIC],
    "private.example.org": ["10.1.2.3"],
    "half.example.org": [PUBLIC, "192.168.1.1"],
    "six.example.org": ["2606:2800:220:1:248:1893:25c8:1946"],
    "loop.example.org": ["127.0.0.1"],
    "metadata.example.org": ["169.254.169.254"],
    "mapped.example.org": ["::ffff:10.0.0.1"],
    "nothing.example.org": [],
}


def resolve(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise OSError("no such name")
    return NAMES[host]


NETWORK = Network(resolve, lambda address: {PUBLIC: "127.0.0.1"}.get(address, address))
"""Public addresses lead to this machine; what is refused never gets that far."""


def config(server: Server, **changes: Any) -> FetchConfig:
    return FetchConfig(**{"enabled": True, "contact": "mail@example.org", "ports": (80, 443, server.port), **changes})


def run(server: Server, out: Path, *paths: str | Wanted, network: Network = NETWORK, **changes: Any) -> Fetched:
    wanted = [path if isinstance(path, Wanted) else Wanted(server.url(path)) for path in paths]
    return fetch(wanted, config(server, **changes), out, network)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "fetch.jsonl").read_text().splitlines()]


HOSTILE_BY_REASON = {
    "scheme": [
        "",
        "picture.png",
        "//pictures.example.org/a.png",
        "file:///etc/passwd",
        "ftp://pictures.example.org/a.png",
        "data:image/png;base64,AAAA",
        "gopher://1.1.1.1/",
        "javascript:alert(1)",
        "jar:http://pictures.example.org!/a.png",
        "dict://127.0.0.1:11211/",
    ],
    "host": [
        "http:///a.png",
        "https://",
        "http://localhost/",
        "http://LOCALHOST./",
        "http://a.localhost/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1./",
        "http://metadata.google.internal/",
        "http://pictures%2eexample.org/",
        "http://pictures..example.org/",
        "http://intranet/",
        "http://printer.local/",
    ],
    "address_loopback": [
        "http://127.0.0.1/",
        "http://127.1.2.3/",
        "http://[::1]/",
        "http://loop.example.org/",
    ],
    "address_unspecified": [
        "http://0.0.0.0/",
        "http://[::]/",
    ],
    "address_private": [
        "http://0.1.2.3/",
        "http://10.0.0.1/",
        "http://192.168.0.1/",
        "http://172.16.9.9/",
        "http://[fc00::1]/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://private.example.org/",
        "http://half.example.org/",
    ],
    "url": [
        "http://0177.0.0.1/",
        "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/",
        "http://\u2460\u2461\u2466.0.0.1/",
        "http://127.0.0.1\\@pictures.example.org/",
        "http://pictures.example.org\t/",
        "http://pictures.example.org/\na.png",
        " http://pictures.example.org/",
        "http://pictures.example.org/a\x00.png",
        "http://[::1",
        "http://pictures.example.org:port/",
        "http://" + "a" * 9000 + ".example.org/",
    ],
    "address_mapped": [
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://mapped.example.org/",
    ],
    "address_translated": [
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[::127.0.0.1]/",
    ],
    "address_reserved": [
        "http://100.64.0.1/",
    ],
    "address_link_local": [
        "http://169.254.1.1/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
    ],
    "address_multicast": [
        "http://224.0.0.1/",
        "http://[ff02::1]/",
    ],
    "address_metadata": [
        "http://169.254.169.254/latest/meta-data/",
        "http://metadata.example.org/",
        "http://[fd00:ec2::254]/",
        "http://168.63.129.16/",
        "http://100.100.100.200/",
    ],
    "credentials": [
        "http://user@pictures.example.org/",
        "http://user:word@pictures.example.org/",
        "http://pictures.example.org@127.0.0.1/",
        "http://@127.0.0.1/",
        "http://pictures.example.org%2f@127.0.0.1/",
    ],
    "port": [
        "http://pictures.example.org:22/",
        "http://pictures.example.org:99999/",
        "http://pictures.example.org:0/",
        "https://pictures.example.org:6379/",
    ],
    "dns": [
        "http://nothing.example.org/",
        "http://unknown.example.org/",
    ],
}
HOSTILE = {url: reason for reason, urls in HOSTILE_BY_REASON.items() for url in urls}


def test_hostile_urls_are_refused_each_for_its_reason(server, tmp_path):
    assert len(HOSTILE) >= 60
    good = {server.url("/first.png"): None, server.url("/last.png"): None}
    first, last = map(Wanted, good)
    found = fetch([first, *map(Wanted, HOSTILE), last], config(server), tmp_path, NETWORK)
    assert {entry["url"]: entry["reason"] for entry in log(tmp_path)} == HOSTILE | good
    assert found.refused == Counter(HOSTILE.values())
    assert (found.fetched, found.known) == (2, 0)
    assert sorted(server.pictures()) == ["/first.png", "/last.png"]
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {url_name(url) for url in good}


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example.org/a.png",
        "https://Pictures.Example.ORG./a%20b.png?x=1",
        "http://bücher.example.org/ä.png",
        "http://93.184.216.34/a.png",
        "http://[2606:2800:220:1:248:1893:25c8:1946]/a.png",
    ],
)
def test_public_urls_pass(url):
    host = read_url(url).raw_host.decode()
    assert public_address(host, 80, Network(lambda host, port: [PUBLIC]))


def test_the_connection_goes_to_the_address_that_was_checked(server, tmp_path):
    """A name may stand for another address each time it is asked: it is asked once for each request."""
    answers = itertools.chain([[PUBLIC]] * 2, itertools.repeat(["127.0.0.1"]))
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    found = run(server, tmp_path, "/a.png", network=Network(rebinding, NETWORK.dial))
    assert found.fetched == 1
    assert len(asked) == len(server.seen) == 2  # robots.txt and the picture
    assert {host for host, _ in server.seen} == {"pictures.example.org"}
    again = run(server, tmp_path, "/b.png", network=Network(rebinding, NETWORK.dial))
    assert again.refused == {"address_loopback": 1}
    assert len(server.seen) == 2


def redirect(target: str) -> Callable[[Any], None]:
    return lambda handler: handler.say(b"", 302, (("Location", target),))


@pytest.mark.parametrize(
    "target, reason",
    [
        ("http://169.254.169.254/latest", "address_metadata"),
        ("http://127.0.0.1/", "address_loopback"),
        ("http://private.example.org/", "address_private"),
        ("file:///etc/passwd", "scheme"),
        ("http://pictures.example.org:22/", "port"),
        ("http://user@pictures.example.org/", "credentials"),
        ("http://pictures.example.org:port/", "url"),
        ("/here", "redirects"),
    ],
)
def test_every_redirect_is_checked_like_the_first_url(server, tmp_path, target, reason):
    server.behave["/here"] = redirect(target)
    assert run(server, tmp_path, "/here").refused == {reason: 1}
    assert server.pictures() == ["/here"] * (6 if reason == "redirects" else 1)


def test_five_redirects_are_followed_also_to_another_host(server, tmp_path):
    for i in range(4):
        server.behave[f"/{i}"] = redirect(f"/{i + 1}")
    server.behave["/4"] = redirect(server.url("/end.png", "other.example.org"))
    assert run(server, tmp_path, "/0").fetched == 1
    assert server.seen[-1] == ("other.example.org", "/end.png")
    assert ("other.example.org", "/robots.txt") in server.seen


def test_pictures_are_kept_by_content_and_found_by_sources(server, tmp_path):
    server.behave["/other.png"] = lambda handler: handler.say(png(1))
    named = Wanted(server.url("/c.png"), name="0123456789ab.jpg", sha256=hashlib.sha256(png()).hexdigest())
    assert run(server, tmp_path, "/a.png", "/b.png", "/other.png", named).fetched == 4
    objects = {file.name for file in (tmp_path / "objects").rglob("*") if file.is_file()}
    assert objects == {hashlib.sha256(data).hexdigest() for data in (png(), png(1))}
    for url, data in ((server.url("/a.png"), png()), (server.url("/other.png"), png(1))):
        assert read_image(tmp_path / "pictures", url_name(url)) == data
    assert read_image(tmp_path / "pictures", "0123456789ab.jpg") == png()
    entry = next(entry for entry in log(tmp_path) if entry["url"] == named.url)
    assert (entry["status"], entry["reason"], entry["sha256"], entry["bytes"]) == (200, None, named.sha256, len(png()))


def test_equal_pictures_that_arrive_at_the_same_time_are_one_file(server, tmp_path, monkeypatch):
    both, linked = threading.Barrier(2, timeout=PATIENCE), threading.Event()
    turns = itertools.count()

    def write(path: Path, data: bytes) -> None:
        turn = next(turns)
        both.wait()
        if turn:
            assert linked.wait(PATIENCE)  # the other one's picture has its name already
        write_bytes_once(path, data)

    def link(source: Path, name: Path, link: Any = os.link) -> None:
        link(source, name)
        if name.parent.name == "pictures":
            linked.set()

    monkeypatch.setattr("weft.data.fetch.write_bytes_once", write)
    monkeypatch.setattr("os.link", link)
    assert run(server, tmp_path, "/a.png", "/b.png", per_host=2).fetched == 2
    files = [file.stat() for file in tmp_path.rglob("*") if file.is_file() and file.name != "fetch.jsonl"]
    assert ([each.st_nlink for each in files], len({each.st_ino for each in files})) == ([3, 3, 3], 1)


def test_what_was_fetched_or_refused_for_good_is_not_asked_for_again(server, tmp_path):
    server.behave["/gone.png"] = lambda handler: handler.say(b"", 404)
    server.behave["/busy.png"] = lambda handler: handler.say(b"", 503)
    paths = ("/a.png", "/a.png", "/gone.png", "/busy.png")
    first = run(server, tmp_path, *paths)
    assert (first.fetched, first.known, first.refused) == (1, 1, {"status": 1, "busy": 1})
    before = len(server.seen)
    second = run(server, tmp_path, *paths)
    assert (second.fetched, second.known, second.refused) == (0, 3, {"busy": 1})
    assert server.seen[before:] == [("pictures.example.org", path) for path in ("/robots.txt", "/busy.png")]


def test_requests_name_who_asks_and_hold_no_more(server, tmp_path):
    server.behave["/a.png"] = lambda handler: handler.say(png(), 200, (("Set-Cookie", "id=1"),))
    run(server, tmp_path, "/a.png", "/b.png", per_host=1)
    for headers in server.headers:
        assert headers["User-Agent"].startswith("weft/")
        assert headers["User-Agent"].endswith("(+mail@example.org)")
        assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}


def endless(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "image/png")
    handler.end_headers()
    while True:
        handler.wfile.write(b"\0" * 65536)


def dripping(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "image/png")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"\0")
        time.sleep(0.05)


def dripping_headers(handler: Any) -> None:
    for letter in b"HTTP/1.0 200 OK\r\nX: " + b"y" * 200:
        handler.wfile.write(bytes([letter]))
        time.sleep(0.05)


def silent(handler: Any) -> None:
    time.sleep(2)


def cut_short(handler: Any) -> None:
    handler.say(png(), 200, (("Content-Length", "100000"),))


def say(*headers: tuple[str, str], body: bytes = b"x", status: int = 200) -> Callable[[Any], None]:
    return lambda handler: handler.say(body, status, headers)


@pytest.mark.parametrize(
    "behave, reason",
    [
        (endless, "too_large"),
        (say(("Content-Length", "99999999")), "too_large"),
        (dripping, "timeout"),
        (dripping_headers, "timeout"),
        (silent, "timeout"),
        (cut_short, "network"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"), "network"),
        (lambda handler: None, "network"),
        (say(("Content-Type", "text/html")), "content_type"),
        (say(("Content-Type", "image/svg+xml")), "content_type"),
        (say(("Content-Type", "")), "content_type"),
        (say(("Content-Encoding", "gzip")), "encoding"),
        (say(body=b""), "empty"),
        (say(status=403), "status"),
        (say(status=204), "status"),
        (say(status=429), "busy"),
        (say(("X-Robots-Tag", "noai")), "opt_out"),
        (say(("X-Robots-Tag", "otherbot: noai"), ("X-Robots-Tag", "weft: nofollow, NoIndex")), "opt_out"),
    ],
)
def test_answers_are_taken_only_within_limits(server, tmp_path, behave, reason):
    server.behave["/bad"] = behave
    began = time.monotonic()
    found = run(server, tmp_path, "/bad", "/good.png", seconds=0.6, max_bytes=200_000)
    assert found.refused == {reason: 1}
    assert found.fetched == 1
    assert time.monotonic() - began < 3


def test_bytes_that_a_source_knows_the_hash_of_must_have_it(server, tmp_path):
    assert run(server, tmp_path, Wanted(server.url("/a.png"), sha256="0" * 64)).refused == {"hash": 1}


ROBOTS = b"User-agent: *\nDisallow: /private\n\nUser-agent: weft\nDisallow: /not-for-weft\n"


@pytest.mark.parametrize(
    "robots, refused",
    [
        (say(body=ROBOTS), {"/not-for-weft/a.png"}),
        (say(body=b"User-agent: *\nDisallow: /private\n"), {"/private/a.png"}),
        (say(body=b"<html>not found</html>"), set()),
        (say(status=404), set()),
        (say(status=403), {"/a.png", "/private/a.png", "/not-for-weft/a.png"}),
    ],
)
def test_robots_txt_is_kept_and_read_once(server, tmp_path, robots, refused):
    server.behave["/robots.txt"] = robots
    paths = ("/a.png", "/private/a.png", "/not-for-weft/a.png")
    run(server, tmp_path, *paths)
    reasons = {entry["url"]: entry["reason"] for entry in log(tmp_path)}
    assert reasons == {server.url(path): "opt_out" if path in refused else None for path in paths}
    assert set(server.pictures()) == set(paths) - refused
    assert server.seen.count(("pictures.example.org", "/robots.txt")) == 1


def test_a_server_whose_rules_cannot_be_read_is_left_alone(server, tmp_path):
    server.behave["/robots.txt"] = say(status=500)
    found = run(server, tmp_path, *(f"/{i}.png" for i in range(6)), per_host=1)
    assert found.refused == {"busy": 3, "host_dead": 3}
    assert server.pictures() == []


@pytest.mark.parametrize(
    "headers, noml, found",
    [
        ([], False, None),
        (["nofollow"], False, None),
        (["noimageai"], False, "noimageai"),
        (["nofollow, NOINDEX"], False, "noindex"),
        (["googlebot: noindex"], False, None),
        (["googlebot: noindex, noai"], False, None),
        (["weft: noai"], False, "noai"),
        (["*: noai"], False, "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noimageindex"], False, "noimageindex"),
        (["max-image-preview: none"], False, None),
        (["noml"], False, None),
        (["noml"], True, "noml"),
    ],
)
def test_opt_outs_of_headers(headers, noml, found):
    assert opt_out_of(headers, noml) == found


def test_a_host_sees_two_requests_at_a_time(server, tmp_path):
    def slow(handler: Any) -> None:
        time.sleep(0.05)
        handler.say(png())

    paths = [f"/{i}.png" for i in range(8)]
    server.behave |= dict.fromkeys(paths, slow)
    assert run(server, tmp_path, *paths).fetched == 8
    assert server.most == 2


def test_a_host_that_others_redirect_to_sees_no_more(server, tmp_path):
    running, most, lock = 0, 0, threading.Lock()

    def slow(handler: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        handler.say(png())

    server.behave["/end.png"] = slow
    hosts = [f"{letter}.example.org" for letter in "abcd"]
    network = Network(lambda host, port: [PUBLIC], NETWORK.dial)
    server.behave |= {f"/{i}": redirect(server.url("/end.png")) for i in range(2)}
    wanted = [Wanted(server.url(f"/{i}", host)) for host in hosts for i in range(2)]
    assert run(server, tmp_path, *wanted, network=network).fetched == 8
    assert most == 2


def test_a_hosts_delay_is_kept(server, tmp_path):
    began = time.monotonic()
    run(server, tmp_path, "/a.png", "/b.png", "/c.png", delay=0.2)
    assert time.monotonic() - began >= 0.4


def test_nothing_is_fetched_unasked(server, tmp_path):
    with pytest.raises(UsageError, match="off"):
        run(server, tmp_path / "out", "/a.png", enabled=False)
    assert server.seen == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/b", ".hidden", "a\0b", "a\nb", "..", "a" * 300])
def test_names_stay_in_the_folder(server, tmp_path, name):
    found = run(server, tmp_path / "out", Wanted(server.url("/a.png"), name=name), "/b.png")
    assert (found.fetched, found.refused) == (1, {"name": 1})
    assert server.pictures() == ["/b.png"]
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 1


def test_what_a_build_lost_is_what_is_wanted(tmp_path):
    entries = [{"reason": "image_remote", "image": "http://a/b.png"}, {"reason": "image_missing", "image": "c.png"}]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert list(wanted_of(tmp_path / "ledger.jsonl")) == [Wanted("http://a/b.png")]


def test_pictures_of_mmc4_get_the_names_that_its_reader_looks_for():
    info = [{"image_name": "0a.jpg", "raw_url": "http://a/b"}, {"image_name": "1b.jpg"}]
    lines = [
        json.dumps({"image_info": info}).encode(),
        b"{",
        b"[]",
        b"null",
        b'{"image_info": 3}',
        b'{"image_info": [3]}',
    ]
    assert list(wanted_of_mmc4(lines)) == [Wanted("http://a/b", "0a.jpg")]


def test_a_log_that_was_cut_off_is_read_up_to_there(server, tmp_path):
    (tmp_path / "fetch.jsonl").write_text('{"url": "http://pictures.example.org/x", "reason": "status"}\n{"url": "ht')
    found = run(server, tmp_path, Wanted("http://pictures.example.org/x"), "/a.png")
    assert (found.known, found.fetched) == (1, 1)


def test_refusals_carry_what_the_log_needs():
    with pytest.raises(Refused) as refused:
        read_url("ftp://a/")
    assert refused.value.reason == "scheme"
