"""Addresses and bytes that are sent as pictures to do harm, and what must not be told again."""

import base64
import json
import logging
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from tests.data.corpus import encoded, picture
from tests.data.hostile import PICTURES, _jpeg_of
from tests.serve.nonce import NonceBackbone, ask, new_nonce
from tests.serve.running import running, until
from weft.serve.files import Files, Own
from weft.serve.limits import Limits
from weft.serve.prompt import of_chat
from weft.serve.schema import ChatRequest

PNG = encoded(picture(1))


@pytest.fixture(scope="module")
def canary():
    """A server on this machine that nobody may ask anything; yields its port and what it was asked."""
    hits = []

    class Canary(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, hits
    server.shutdown()
    thread.join()


URLS = [
    "http://127.0.0.1:{p}/a.png", "http://localhost:{p}/a.png", "http://LOCALHOST:{p}/a.png", "http://[::1]:{p}/a.png",
    "http://[::ffff:127.0.0.1]:{p}/a.png", "http://[0:0:0:0:0:ffff:7f00:1]:{p}/a.png", "http://2130706433:{p}/a.png",
    "http://0x7f000001:{p}/a.png", "http://0177.0.0.1:{p}/a.png", "http://017700000001:{p}/a.png",
    "http://0x7f.0.0.1:{p}/a.png", "http://127.1:{p}/a.png", "http://127.0.1:{p}/a.png", "http://127.0.0.1.:{p}/a.png",
    "http://localhost.:{p}/a.png", "http://0.0.0.0:{p}/a.png", "http://0:{p}/a.png", "http://[::]:{p}/a.png",
    "http://127.8.9.10:{p}/a.png", "http://user@127.0.0.1:{p}/a.png", "http://user:pass@127.0.0.1:{p}/a.png",
    "http://example.org@127.0.0.1:{p}/a.png", "http://127.0.0.1:{p}#@example.org/a.png",
    "http://example.org:80\\@127.0.0.1:{p}/a.png", "http://127.0.0.1:{p}\\@example.org/a.png",
    "http:\\\\127.0.0.1:{p}\\a.png", "http:/127.0.0.1:{p}/a.png", "http:127.0.0.1:{p}/a.png", "//127.0.0.1:{p}/a.png",
    "\thttp://127.0.0.1:{p}/a.png", " http://127.0.0.1:{p}/a.png", "http://127.0.0.1:{p}/a.png\n",
    "ht\ntp://127.0.0.1:{p}/a.png", "http://127.0.0.1\t:{p}/a.png", "HTTP://127.0.0.1:{p}/a.png",
    "hTtP://127.0.0.1:{p}/a.png", "https://127.0.0.1:{p}/a.png", "ftp://127.0.0.1:{p}/a.png",
    "gopher://127.0.0.1:{p}/_GET", "ws://127.0.0.1:{p}/a.png", "dict://127.0.0.1:{p}/a", "url:http://127.0.0.1:{p}/a.png",
    "view-source:http://127.0.0.1:{p}/a.png", "jar:http://127.0.0.1:{p}/a.jar!/a.png", "http://①②⑦.⓪.⓪.①:{p}/a.png",
    "http://１２７.0.0.1:{p}/a.png", "http://127。0。0。1:{p}/a.png", "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{p}/a.png",  # noqa: RUF001
    "http://127.0.0.1.nip.io:{p}/a.png", "http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/latest/",
    "http://metadata.google.internal/computeMetadata/v1/", "http://10.0.0.1/a.png", "http://[fe80::1%25lo]:{p}/a.png",
    "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:/etc/passwd", "file:etc/passwd", "/etc/passwd",
    "../../etc/passwd", "C:\\Windows\\win.ini", "\\\\127.0.0.1\\share\\a.png", "~/.ssh/id_rsa", "a.png", "",
    "http://127.0.0.1:{p}/v1/files/{f}/content", "http://127.0.0.1:{p}/v1/files/../content",
    "http://127.0.0.1:{p}/data:image/png;base64,AAAA", "data:,http://127.0.0.1:{p}/a.png",
    "data:image/svg+xml;base64,{svg}", "data:image/svg+xml,<svg><image href='http://127.0.0.1:{p}/a.png'/></svg>",
    "blob:http://127.0.0.1:{p}/a", "javascript:fetch('http://127.0.0.1:{p}')", "about:blank", "cid:a@127.0.0.1",
]  # fmt: skip


def test_the_table_is_long_enough():
    assert len(set(URLS)) >= 60
    assert len(PICTURES) >= 40


@pytest.mark.parametrize("address", URLS, ids=ascii)
def test_no_address_is_fetched(nonce_server, canary, address):
    port, hits = canary
    svg = f"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1:{port}/a.png'/></svg>"
    for old, new in (("{p}", str(port)), ("{f}", "a" * 32), ("{svg}", base64.b64encode(svg.encode()).decode())):
        address = address.replace(old, new)
    http = nonce_server.http()
    for image in (address, {"url": address}):
        content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": image}]
        asked = {"model": "nonce", "messages": [{"role": "user", "content": content}]}
        reply = http.post("/v1/chat/completions", json=asked)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] in ("image", "document")
        assert not address or len(address) < 6 or address not in reply.json()["error"]["message"]
    for item in (
        {"role": "user", "content": [{"type": "input_image", "image_url": address}]},
        {"type": "image_generation_call", "result": address},
    ):
        items = [item, {"role": "user", "content": "and?"}]
        assert http.post("/v1/responses", json={"model": "nonce", "input": items}).status_code == 400
    # as Markdown it is text, unless it is a picture of this server that is gone
    asked = {"model": "nonce", "input": f"![a]({address})"}
    assert http.post("/v1/responses", json=asked).status_code in ((400,) if "a" * 32 in address else (200,))
    assert hits == []


def test_the_canary_would_have_been_seen(canary):
    import urllib.request

    port, hits = canary
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/seen").read()
    assert hits == ["/seen"]
    hits.clear()


def scans_without_end():
    """A large JPEG in 5,000 scans, which take next to no bytes and each go over all of it."""
    from PIL import Image as PILImage

    data = encoded(PILImage.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 5000 + data[-2:]


MORE = {
    "scans_without_end.jpg": (scans_without_end, "image_pixels"),
    "just_too_large.png": (lambda: encoded(_flat(4097, 4096)), "image_pixels"),
    "as_large_as_may_be.png": (lambda: encoded(_flat(4096, 4096)), None),
    "wide_header.jpg": (lambda: _jpeg_of(65_500, 300), "image_pixels"),
}


def _flat(width, height):
    from PIL import Image as PILImage

    return PILImage.new("P", (width, height))


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it skips
@pytest.mark.parametrize("name", [*PICTURES, *MORE], ids=ascii)
def test_pictures_are_refused_or_shown_and_the_server_goes_on(nonce_server, name):
    make, reason = {**PICTURES, **MORE}[name]
    address = f"data:image/png;base64,{base64.b64encode(make()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "what is it?"}]
    begin = time.process_time()
    asked = {"model": "nonce", "messages": [{"role": "user", "content": content}]}
    reply = nonce_server.http().post("/v1/chat/completions", json=asked)
    assert time.process_time() - begin < 5
    if reason is None:
        assert reply.status_code == 200, reply.text
    else:
        # a body of 80 MiB is refused as a body
        assert reply.status_code == (413 if len(address) > 64 * 2**20 else 400)
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert nonce_server.http().get("/health").status_code == 200


@pytest.mark.slow
def test_the_largest_pictures_take_bounded_memory_however_many_are_read_at_once():
    data = encoded(_flat(4096, 4096), transparency=0)
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}
    asked = ChatRequest(model="nonce", messages=[{"role": "user", "content": [part] * 3}])
    process, peak, is_over = psutil.Process(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not is_over.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    before = process.memory_info().rss
    own = Own(Files(900, 2**20), "me")
    reading = [threading.Thread(target=of_chat, args=(asked, Limits(), own)) for _ in range(4)]
    watching = threading.Thread(target=watch)
    for each in (watching, *reading):
        each.start()
    for each in reading:
        each.join()
    is_over.set()
    watching.join()
    print(f"peak {(peak - before) / 2**20:.0f} MiB")
    assert 50 * 2**20 < peak - before < 512 * 2**20


PLACES = 25
CANARIES = [f"CANARY{i:02}x{zlib.crc32(str(i).encode()):08x}" for i in range(PLACES)]


def bodies():
    """Requests, good and bad, with a canary wherever somebody writes something; which of them an answer may echo."""
    c = iter(CANARIES)
    image = {"type": "image_url", "image_url": {"url": f"https://example.org/{next(c)}.png"}}
    marked = base64.b64encode(encoded(picture(3)) + next(c).encode()).decode()
    chat, responses, images = "/v1/chat/completions", "/v1/responses", "/v1/images/generations"

    def user(content):
        return [{"role": "user", "content": content}]

    yield chat, {"messages": user(next(c))}
    yield chat, {"messages": user([image])}
    yield chat, {"messages": user([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{marked}"}}])}
    yield chat, {"messages": user([{"type": next(c), "text": "a"}])}
    yield chat, {"messages": [{"role": next(c), "content": "a"}]}
    yield chat, {"messages": [{"role": "user", "content": "a", "name": next(c), "tool_calls": next(c)}]}
    yield chat, {"messages": user("a"), "user": next(c), "metadata": {next(c): next(c)}}
    yield chat, {"messages": user("a"), "metadata": {next(c): 5}}
    yield chat, {"messages": user("a"), "stop": [next(c)], "tools": [{"type": next(c)}]}
    yield chat, {"messages": user("a"), "seed": next(c), "image_size": next(c), "response_image_format": next(c)}
    yield chat, {"messages": user("a"), "extra_body": {"image_size": next(c), "seed": next(c)}}
    yield responses, {"input": next(c), "instructions": next(c)}
    yield responses, {"input": [{"type": "image_generation_call", "result": next(c)}]}
    yield responses, {"input": [{"type": next(c)}], "include": [next(c)]}
    yield images, {"prompt": next(c), "size": "17x17"}
    yield images, {"prompt": "a", "model": next(c)}
    assert next(c, None) is None


def test_what_is_sent_is_in_no_log_no_metric_and_no_error(caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    # what the client logs is not the server's
    for name in ("httpx2", "httpcore2", "httpcore2.connection", "httpcore2.http11", "openai"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    key = f"key-{CANARIES[0]}-of-the-server"
    statuses, told = [], []
    with running({"nonce": NonceBackbone()}, keys=[key]) as server:
        http = server.http(key)

        def ask_all():
            for path, body in bodies():
                reply = http.post(path, json={"model": "nonce", **body})
                statuses.append(reply.status_code)
                if reply.status_code >= 400:
                    told.append(reply.text)

        ask_all()
        told.append(http.post("/v1/responses", content=f'{{"model": "nonce", {CANARIES[3]}'.encode()).text)
        told.append(http.get(f"/v1/files/{CANARIES[4]}/content").text)
        told.append(http.get(f"/v1/models/{CANARIES[5]}").text)
        told.append(http.get(f"/{CANARIES[6]}?{CANARIES[7]}", headers={"x-a": CANARIES[8], "cookie": CANARIES[9]}).text)
        told.append(server.http(CANARIES[10]).get("/v1/models").text)
        # and where something breaks in a way that nobody thought of
        monkeypatch.setattr("weft.serve.app.of_chat", lambda asked, *_: {}[asked.messages[0]["content"]])
        monkeypatch.setattr("weft.serve.app.of_responses", lambda asked, *_: {}[asked.input])
        ask_all()
        until(lambda: "unexpected KeyError" in caplog.text)
        metrics = http.get("/metrics").text
    assert {200, 400, 404, 500} <= set(statuses)
    assert "weft_requests_total" in metrics
    output = capfd.readouterr()
    for where, text in (
        ("log", caplog.text), ("output", output.out + output.err), ("metrics", metrics), ("errors", "".join(told)),
    ):  # fmt: skip
        assert not [each for each in [*CANARIES, key] if each in text], where
    for each in told:
        assert json.loads(each)["error"].keys() == {"message", "type", "param", "code"}


def test_pictures_that_are_sent_out_hold_nothing_but_pixels(nonce_server):
    asked = {"model": "nonce", "prompt": ask(new_nonce(), "p")}
    data = base64.b64decode(
        nonce_server.http().post("/v1/images/generations", json=asked).json()["data"][0]["b64_json"]
    )
    names, at = [], 8
    while at < len(data):
        names.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    assert set(names) == {b"IHDR", b"IDAT", b"IEND"}
