"""What the page remembers, who it lets in, and (slow) what a browser shows of it."""

import asyncio
import contextlib
import io
import os
import shutil
import sys
import time
import zipfile
from types import SimpleNamespace

import httpx2
import pytest
from fastapi import FastAPI
from PIL import Image as PILImage
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from tests.serve.apart import apart, nonce
from tests.serve.running import until
from weft.document import Image, Text, Turn
from weft.errors import ImageError, UsageError
from weft.generation import Usage
from weft.images import encode_png
from weft.serve.app import Served, create_app
from weft.serve.conversation import GALLERY, Conversation, captions, make_room, marked, ordered
from weft.serve.door import COOKIE, HEADERS, Door, Visitors
from weft.serve.guard import Callers, NoKey
from weft.serve.limits import Limits
from weft.serve.page import Tab, _inert, _messages, _seed_of, _ticking, mount_page
from weft.serve.parts import End, Picture, PictureBegin, TextEnd, TextPiece, pieces

KEY = "open sesame"
CHROMIUM = shutil.which("chromium")


def png(side=4, color=(200, 30, 30)):
    return encode_png(PILImage.new("RGB", (side, side), color))


# --- what was said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pictures", "parts"),
    [
        ("see", ["a"], "a|see"),
        ("see [1] and [2]!", ["a", "b"], "see|a|and|b|!"),
        ("[2] first", ["a", "b"], "a|b|first"),
        ("see [2] here", ["a", "b"], "a|see|b|here"),
        ("", ["a", "b"], "a|b"),
        ("array[1] is [3]", ["a"], "array|a|is [3]"),
        ("  ", [], ""),
    ],
)
def test_pictures_stand_where_the_text_puts_them(text, pictures, parts):
    found = ordered(text, pictures)
    assert "|".join(part.text if isinstance(part, Text) else part.path for part in found) == parts
    assert ordered(*marked(found)) == found


def told(folder):
    """A conversation of a question with a picture and an answer of text, picture, text."""
    (folder / "up").mkdir()
    (folder / "up" / "mine.png").write_bytes(png(color=(0, 0, 250)))
    talk = Conversation(folder)
    talk.ask("what is <b>this</b>?", ["up/mine.png"])
    talk.begin()
    for piece in (
        TextPiece(0, "*a* "), TextPiece(0, "<script>"), TextEnd(0, "*a* <script>"), PictureBegin(1), Picture(1, png()),
        TextPiece(2, "end"), TextEnd(2, "end"), End("stop", Usage(1, 2, 3)),
    ):  # fmt: skip
        talk.add(piece)
    talk.leave()
    return talk


def test_an_answer_grows_in_order(tmp_path):
    talk = told(tmp_path)
    first, picture, last = talk.turns[-1].parts
    assert (first, last) == (Text("*a* <script>"), Text("end"))
    assert (tmp_path / picture.path).read_bytes() == png()
    asked = talk.to_input(alone=False)
    assert [[part["type"] for part in turn["content"]] for turn in asked] == [
        ["input_image", "input_text"],
        ["input_text", "input_image", "input_text"],
    ]
    assert len(talk.to_input(alone=True)) == 1


def test_an_earlier_question_is_asked_again_in_other_words(tmp_path):
    talk = told(tmp_path)
    place = talk.last_question()
    text, files = talk.draft(place)
    assert (place, text, files) == (0, "what is <b>this</b>?", ["up/mine.png"])
    talk.go_back(place)
    talk.ask("and now?", files)
    assert [turn.role for turn in talk.turns] == ["user"]
    assert talk.turns[0].parts == (Image(path="up/mine.png"), Text("and now?"))


def test_a_question_without_an_answer_is_replaced_and_an_empty_one_is_none(tmp_path):
    talk = Conversation(tmp_path)
    talk.ask("one")
    talk.begin()
    talk.leave()
    talk.ask("two")
    assert [turn.parts for turn in talk.turns] == [(Text("two"),)]
    with pytest.raises(UsageError):
        talk.ask(" \n")


def test_no_picture_outside_the_folder_is_read(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    talk = Conversation(inner)
    talk.ask("", ["../secret.png"])
    with pytest.raises(Exception, match="leaves the folder"):
        talk.to_input(alone=False)
    talk = Conversation(inner)
    talk.ask("", ["gone.png"])
    with pytest.raises(ImageError):
        talk.to_input(alone=False)


def test_a_conversation_is_taken_away_as_markdown_with_pictures_and_as_one_page(tmp_path):
    archive, page = told(tmp_path).to_files("tiny")
    with zipfile.ZipFile(archive) as files:
        assert sorted(files.namelist()) == ["conversation.md", "picture_1.png", "picture_2.png"]
        text = files.read("conversation.md").decode()
        assert PILImage.open(io.BytesIO(files.read("picture_2.png"))).getpixel((0, 0)) == (200, 30, 30)
    assert text.index("**You**") < text.index("picture_1.png") < text.index("**Answer**") < text.index("picture_2.png")
    assert r"\*a\* \<script\>" in text
    html = page.read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html and html.count("data:image/png") == 2


@pytest.mark.parametrize(
    ("role", "parts", "is_whole", "said"),
    [
        ("assistant", "a cat.|P|night\nfalls.|P", True, ["Picture 1 of 2: a cat.", "Picture 2 of 2: night falls."]),
        ("assistant", "a cat.|P|P|end", False, ["Picture 1: a cat.", "Picture 2"]),
        ("assistant", "P", True, ["Picture 1: draw"]),
        ("assistant", "P|P", True, ["Picture 1 of 2: draw", "Picture 2 of 2: draw"]),
        ("assistant", "P|this is it", True, ["Picture 1"]),
        ("user", "P|draw|P", False, ["Your picture 1 of 2", "Your picture 2 of 2"]),
        ("assistant", "a " * 200 + "|P", True, ["Picture 1: " + "a " * 79 + "…"]),
        ("assistant", "no picture", True, []),
    ],
)
def test_who_cannot_see_a_picture_is_told_which_it_is_and_what_is_said_of_it(role, parts, is_whole, said):
    turn = Turn(role, tuple(Image(path="x.png") if part == "P" else Text(part) for part in parts.split("|")))
    assert list(captions(turn, "draw", is_whole=is_whole)) == said


def test_the_oldest_files_make_room_and_the_gallery_stays(tmp_path):
    for number, name in enumerate(["a", "b", "c", GALLERY]):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "x.png"
        file.write_bytes(bytes(100))
        os.utime(file, (number, number))
    make_room(tmp_path, 250)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b", "c", GALLERY]
    make_room(tmp_path, 0)
    assert [each.name for each in tmp_path.iterdir()] == [GALLERY]


def test_what_is_being_painted_is_said_and_markup_is_inert(tmp_path):
    tab = Tab(Conversation(tmp_path), halt=asyncio.Event())
    tab.talk.ask("draw")
    tab.talk.begin()
    assert _messages(tab)[-1]["metadata"] == {"title": "Waiting for the model", "status": "pending"}
    tab.talk.add(TextPiece(0, '<img src="//elsewhere">'))
    tab.talk.add(PictureBegin(1))
    *_, answer, aside = _messages(tab)
    assert aside["metadata"] == {"title": "Painting picture 1 · 0 s", "status": "pending"}
    assert "<img" not in answer["content"][0]["text"]
    tab.talk.add(Picture(1, png()))
    _, picture = _messages(tab)[-1]["content"]
    assert picture["value"]["path"].startswith(str(tmp_path))
    assert picture["props"] == {"alt_text": 'Picture 1: <img src="//elsewhere">'}
    assert _messages(tab)[0]["content"] == [{"type": "text", "text": "draw"}]
    for plain in ("a < b & c", "1 <2", "x && y"):
        assert _inert(plain).replace("\u2060", "") == plain
    assert _inert("a < b & c") == "a < b & c"


@pytest.mark.parametrize(
    ("typed", "seed"), [("", None), (" ", None), ("0", 0), (" 07 ", 7), (str(2**53 - 1), 2**53 - 1)]
)
def test_no_seed_is_any_seed(typed, seed):
    assert _seed_of(typed) == seed


@pytest.mark.parametrize("typed", ["-1", "1.5", "x", "٣", str(2**53), "9" * 5000])
def test_what_is_no_seed_is_refused(typed):
    with pytest.raises(UsageError, match="no seed"):
        _seed_of(typed)


def test_halting_ends_the_source_at_once():
    ended = []

    async def source():
        try:
            yield TextPiece(0, "a")
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    async def run():
        halt = asyncio.Event()
        found = []
        async for piece in _ticking(source(), halt):
            found.append(piece)
            if piece is None:
                halt.set()
        return found

    assert asyncio.run(run()) == [TextPiece(0, "a"), None] and ended == [True]


# --- who comes in ---------------------------------------------------------------------------------------------------


def door(folder, *keys, **limits):
    """A client of a door, and the paths that came through it."""
    came = []

    async def page(scope, receive, send):
        came.append(scope["path"])
        await PlainTextResponse("in", headers={"access-control-allow-origin": "*"})(scope, receive, send)

    bounds = Limits(**limits)
    guarded = Door(page, folder.resolve(), Visitors(Callers(keys, bounds)), bounds)
    return TestClient(guarded, follow_redirects=False), came


def test_without_a_key_nothing_comes_in_and_with_one_the_page_does(tmp_path):
    client, came = door(tmp_path, KEY)
    assert client.get("/").headers["location"] == "/sign_in"
    for path in ("/config", "/assets/a.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/a", "/theme.css"):
        assert client.get(path).status_code == 401
    assert client.post("/gradio_api/run/predict", json={}).status_code == 401
    assert client.post("/sign_in", data={"key": KEY + "x"}).status_code == 401
    assert client.post("/sign_in", data={"key": "x" * 9000}).status_code == 413
    for forged in ("", ".", "0123456789abcdef.", "0123456789abcdef.00", "é.ü"):
        assert client.get("/config", headers={"cookie": f"{COOKIE}={forged}".encode()}).status_code == 401
    assert came == []
    cookie = client.post("/sign_in", data={"key": KEY}).headers["set-cookie"]
    assert KEY not in cookie and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert client.get("/").text == "in" and came == ["/"]


def test_whoever_signed_in_is_the_owner_of_the_key(tmp_path):
    callers = Callers([KEY, "other"], Limits())
    visitors = Visitors(callers)
    assert visitors.owner({COOKIE: visitors.cookie(KEY)}) == callers.owner(f"Bearer {KEY}")
    with pytest.raises(NoKey):
        Visitors(callers).owner({COOKIE: visitors.cookie(KEY)})  # another server's, or one from before a restart


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=http://127.0.0.1/x.png", "/gradio_api/file=HTTPS://a/x",
        "/gradio_api/file=relative.png", "/gradio_api/file=FOLDER/../secret.png", "/gradio_api/file=FOLDER-2/a.png",
        "/gradio_api/file=FOLDER/%2e%2e/secret.png", "/gradio_api/file=FOLDER/link.png", "/gradio_api/file=FOLDER",
        "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/info", "/monitoring",
        "/gradio_api/stream/a", "/gradio_api/vibe-edit", "/gradio_api/runs", "/login", "/docs", "/svelte/a.js",
        "/static/../a", "/assets/%2e%2e/a", "/custom_component/a/b/c/d", "/gradio_api/call/ask", "/%00",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_does_not_reach_it(tmp_path, path):
    folder = tmp_path / "pages"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    client, came = door(folder)
    # a client must not tidy the path up
    answer = client.request("GET", httpx_raw(path.replace("FOLDER", str(folder))))
    assert answer.status_code == 404 and came == []


def httpx_raw(path):
    return "http://testserver" + path.replace("..", "%2e%2e")


def test_its_own_files_come_through_with_what_keeps_a_browser_here(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    client, came = door(tmp_path)
    answer = client.get(f"/gradio_api/file={tmp_path}/a.png")
    assert answer.text == "in" and len(came) == 1
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "access-control-allow-origin" not in answer.headers


def test_what_is_brought_is_bounded_and_comes_from_here(tmp_path):
    client, came = door(tmp_path, body_bytes=1000)
    upload = "/gradio_api/upload"
    assert client.post(upload, content=bytes(1001)).status_code == 413
    assert client.post(upload, content=iter([b"x"])).status_code == 411
    assert client.post(upload, content=b"x", headers={"origin": "http://elsewhere"}).status_code == 403
    assert came == []
    assert client.post(upload, content=b"x", headers={"origin": "http://testserver"}).status_code == 200


def test_uploads_make_room_for_themselves(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x.png").write_bytes(bytes(2000))
    client, _ = door(tmp_path, files_bytes=1000)
    client.post("/gradio_api/upload", content=b"x")
    assert not (tmp_path / "old").exists()


def test_without_gradio_the_page_says_what_it_needs_and_the_api_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    app = FastAPI()
    app.get("/v1/x")(lambda: "here")
    mount_page(app, [Served("tiny")], Limits(), Callers([], Limits()), lambda *_: None)
    client = TestClient(app)
    assert client.get("/").status_code == 501 and "weft[page]" in client.get("/").text
    assert client.get("/v1/x").json() == "here"


def test_a_page_that_nobody_looks_at_costs_nothing():
    pytest.importorskip("gradio", reason="the page needs gradio")
    with apart(nonce, "--page") as server:
        assert httpx2.get(server.url, trust_env=False).status_code == 200  # its tasks run from here on at the latest
        before = server.process.num_ctx_switches().voluntary
        time.sleep(1)
        assert server.process.num_ctx_switches().voluntary - before < 200


# --- what a browser shows -------------------------------------------------------------------------------------------


@pytest.fixture
def page_server(monkeypatch):
    """A server with its page: `tiny`, and the model whose answers show whose they are."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    from tests.serve import running
    from tests.serve.nonce import NonceBackbone
    from weft.backbones import load_backbone

    def with_page(scheduler, models, *, keys, limits, **settings):
        app, callers = create_app(scheduler, models, keys=keys, limits=limits, **settings), Callers(keys, limits)
        if not isinstance(app.router.default, Door):
            app.state.seeds = []

            def answers(owner, model, document, config):
                app.state.seeds.append(config.seed)
                return pieces(scheduler.answer(model, document, config))

            mount_page(app, models, limits, callers, answers)
        return app

    monkeypatch.setattr(running, "create_app", with_page)

    @contextlib.contextmanager
    def serve(*keys):
        with running.running({"tiny": load_backbone("tiny"), "nonce": NonceBackbone()}, keys=keys) as server:
            yield server

    return serve


@contextlib.contextmanager
def browser(width=1280, height=860):
    """Contexts of a browser; what it says and asks of others is collected."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_context(viewport={"width": width, "height": height}).new_page()
        seen = SimpleNamespace(said=[], asked=[])
        page.on("console", lambda message: seen.said.append((message.type, message.text)))
        page.on("pageerror", lambda error: seen.said.append(("error", str(error))))
        page.on("dialog", lambda dialog: (seen.said.append(("dialog", dialog.message)), dialog.dismiss()))
        page.on("request", lambda request: seen.asked.append(request.url))
        yield page, seen
        chromium.close()


def kinds(page, who="bot"):
    """Of what stands in the messages of one side, from above: text, picture, or what is being done."""
    return page.evaluate(
        """who => [...document.querySelectorAll(`#talk [data-testid=${who}]`)].map(each =>
            each.querySelector("img") ? "picture" : each.closest(".thought-group, .message-content > .box") ||
            /^(Painting|Waiting)/.test(each.innerText) ? "doing" : "text")""",
        who,
    )


def names(page, who="bot"):
    """Of its pictures, as whoever cannot see them is told."""
    return page.eval_on_selector_all(f"#talk [data-testid={who}] img", "all => all.map(each => each.alt)")


def ask(page, text):
    page.fill("#ask textarea", text)
    page.keyboard.press("Enter")


def wait_for_answer(page):
    page.wait_for_selector("#ask .submit-button")
    page.wait_for_selector("#as_markdown:not([disabled])", timeout=60_000)


def nothing_else(seen, url):
    assert [each for each in seen.said if each[0] not in ("verbose", "info")] == []
    assert [each for each in seen.asked if not each.startswith((url, "data:", "blob:"))] == []


@pytest.mark.slow
def test_a_browser_asks_watches_brings_pictures_changes_its_question_and_takes_it_home(page_server, tmp_path):
    with page_server() as server, browser() as (page, seen):
        page.goto(server.url)
        page.wait_for_selector("#ask textarea")
        # past the list of models, which closes behind it
        page.focus("#model input")
        page.wait_for_selector("#model ul")
        page.keyboard.press("Tab")
        page.locator("#talk button.example", has_text="Draw:").press("Enter")
        wait_for_answer(page)
        assert not page.is_visible("#model ul")
        assert (kinds(page, "user"), kinds(page)) == (["text"], ["picture"])
        (name,) = names(page)
        assert name.startswith("Picture 1: a big red cat on the left and a small blue house")

        # by keyboard: another model, a question, its answer in order
        page.fill("#model input", "nonce")
        page.keyboard.press("Enter")
        page.click("#fresh")
        page.wait_for_selector("#talk button.example")
        ask(page, "nonce=0123456789abcdef plan=tptppt")
        page.wait_for_selector("#talk [data-testid=bot]")
        shown = [kinds(page)]
        while not page.is_enabled("#as_markdown"):
            shown.append(kinds(page))
        final = ["text", "picture", "text", "picture", "picture", "text"]
        assert kinds(page) == final
        for each in shown:
            written = [kind for kind in each if kind != "doing"]
            assert written == final[: len(written)] and each[: len(written)] == written
        one, two, three = names(page)
        assert one.startswith("Picture 1 of 3: ") and two.startswith("Picture 2 of 3: ") and three == "Picture 3 of 3"

        # one's own pictures, one of them within the text
        page.click("#fresh")
        page.wait_for_selector("#talk button.example")
        for name in ("one.png", "two.png"):
            (tmp_path / name).write_bytes(png(32))
        page.set_input_files("#ask input[type=file]", [tmp_path / "one.png", tmp_path / "two.png"])
        page.wait_for_selector("#ask .thumbnail-item >> nth=1")
        ask(page, "nonce=0123456789abcdef plan=tp [2] behind")
        wait_for_answer(page)
        assert kinds(page, "user") == ["picture", "text", "picture", "text"] and kinds(page) == ["text", "picture"]
        assert names(page, "user") == ["Your picture 1 of 2", "Your picture 2 of 2"]

        # the question again, in other words
        page.click("#edit")
        page.wait_for_selector("#ask .thumbnail-item >> nth=1")
        assert page.input_value("#ask textarea") == "nonce=0123456789abcdef plan=tp [2] behind"
        ask(page, "nonce=fedcba9876543210 plan=t [2]")
        page.wait_for_selector("#talk >> text=fedcba9876543210 plan=t")
        wait_for_answer(page)
        assert kinds(page, "user") == ["picture", "text", "picture"] and kinds(page) == ["text"]
        assert "0123456789abcdef" not in page.inner_text("#talk")

        with page.expect_download() as download:
            page.click("#as_markdown")
        with zipfile.ZipFile(download.value.path()) as files:
            assert sorted(files.namelist()) == ["conversation.md", "picture_1.png", "picture_2.png"]
            assert "fedcba9876543210" in files.read("conversation.md").decode()
        with page.expect_download() as download:
            page.click("#as_html")
        assert download.value.path().read_text().count("data:image/png") == 2

        # a seed that is typed is the one; before, each had its own
        assert len(set(server.app.state.seeds)) == len(server.app.state.seeds) == 4
        page.click("#settings .label-wrap")
        page.fill("#seed :is(input, textarea)", "7")
        ask(page, "nonce=0123456789abcdef plan=t")
        page.wait_for_selector("#talk >> text=plan=t")
        until(lambda: len(server.app.state.seeds) > 4)  # until then the page looks as after an answer
        wait_for_answer(page)
        assert server.app.state.seeds[4:] == [7]
        page.fill("#seed :is(input, textarea)", "x")
        ask(page, "again")
        page.wait_for_selector("#talk >> text=this is no seed")
        nothing_else(seen, server.url)


@pytest.mark.slow
def test_what_is_written_never_runs_nor_loads_anything(page_server):
    hostile = "<img src=//127.0.0.1:9/x onerror=alert(1)><script>alert(2)</script>[a](javascript:alert(3))&lt;b&gt;"
    with page_server() as server, browser() as (page, seen):
        page.goto(server.url)
        page.wait_for_selector("#ask textarea")
        ask(page, hostile)
        wait_for_answer(page)
        assert page.inner_text("#talk [data-testid=user]").replace("\u2060", "") == hostile
        assert page.locator("#talk [data-testid=user] :is(img, script, a)").count() == 0
        page.click("#edit")
        page.wait_for_selector("#facts >> text=again")
        assert page.input_value("#ask textarea") == hostile
        nothing_else(seen, server.url)


@pytest.mark.slow
def test_an_answer_ends_when_it_is_stopped_and_when_its_tab_is_closed(page_server):
    from tests.serve.running import until

    long = 240
    with page_server() as server, browser() as (page, seen):
        page.goto(server.url)
        page.wait_for_selector("#ask textarea")
        page.fill("#model input", "nonce")
        page.keyboard.press("Enter")
        for end in (lambda: page.click("#ask .stop-button"), page.close):
            before = server.scheduler.steps
            ask(page, "nonce=0123456789abcdef plan=" + "t" * long)
            until(lambda: server.scheduler.load.running == 1)
            page.wait_for_selector("#ask .stop-button")
            nothing_else(seen, server.url)
            end()
            until(lambda: server.scheduler.load.running == 0)
            # a token a step, and a nonce has as many as letters
            assert server.scheduler.steps - before < long * 16
            if not page.is_closed():
                page.wait_for_selector("#ask .submit-button")
                assert kinds(page) in ([], ["text"])


@pytest.mark.slow
def test_a_key_opens_the_page_on_a_phone(page_server):
    with page_server(KEY) as server, browser(390, 844) as (page, seen):
        page.goto(server.url)
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("[role=alert]")
        seen.said.clear()  # the browser says aloud that it was refused
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#ask textarea")
        page.locator("#talk button.example", has_text="Change").click()
        wait_for_answer(page)
        assert kinds(page, "user") == ["picture", "text"] and kinds(page) == ["picture"]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        source = page.get_attribute("#talk [data-testid=bot] img", "src")
        nothing_else(seen, server.url)
        assert httpx2.get(source, trust_env=False).status_code == 401
