"""The page: a chat in which texts and pictures appear in the order in which they are made.

Built with gradio, which is imported when a page is mounted. What is said in a tab lives here, not in the browser: the
browser only shows it, so that nothing it sends back is taken for what was said.
"""

import asyncio
import atexit
import functools
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from weft.document import Document, Part, Text
from weft.errors import UsageError, WeftError
from weft.generation import SamplingConfig
from weft.serve.conversation import GALLERY, Conversation, captions, make_room
from weft.serve.door import Door, Visitors
from weft.serve.gallery import Example, examples_for
from weft.serve.guard import Callers
from weft.serve.limits import Limits
from weft.serve.parts import Piece, TextPiece
from weft.serve.prompt import of_responses, sampling_of
from weft.serve.schema import ResponsesRequest

Answers = Callable[[str, str, Document, SamplingConfig], AsyncGenerator[Piece, None]]
"""(owner, model, document, config) -> the pieces of an answer, counted and limited as those of the API are."""
MISSING = "The page needs gradio: pip install 'weft[page]'. The interface under /v1 works without it.\n"
_STYLE = Path(__file__).parent / "assets" / "page.css"
_SHOW_SECONDS = 0.1
"""Text is shown at most so often."""
_LOOK_SECONDS = 0.05
"""Gradio looks so often whether anything was asked."""
_TICK_SECONDS = 0.5
"""Where nothing comes, time goes on so often."""
_NOTHING_YET = "Waiting for the model"
_JOINER = "\u2060"
"""No width, no break: a `<` or `&` before it is just that."""
_MARKUP = re.compile(r"[<&](?=[A-Za-z0-9#/!?])")
_SEED_BELOW = 2**53
"""Whole numbers that browsers keep exactly."""


class Named(Protocol):
    @property
    def name(self) -> str: ...


@dataclass
class Tab:
    """What one tab of a browser holds."""

    talk: Conversation
    halt: asyncio.Event | None = None
    """Ends the answer that is being written; None: none is."""
    note: str = ""
    """What went wrong last."""
    editing: int | None = None
    """The place of the question that the next one replaces."""
    is_left: bool = False
    """Another conversation is shown in its place."""


@dataclass(frozen=True)
class Wishes:
    """The settings beside a question."""

    model: str
    max_images: int
    temperature: float
    seed: str
    """As it was typed; empty: any."""
    alone: bool


def mount_page(app: FastAPI, models: Sequence[Named], limits: Limits, callers: Callers, answers: Answers) -> None:
    """Show the page at `/`, behind everything else that the app answers. Without gradio, say so there.

    Args:
        models: the first is asked by default.
        callers: one of their keys is asked for where the API asks for one.
    """
    gradio = load_gradio()
    if gradio is None:
        app.add_api_route("/", lambda: PlainTextResponse(MISSING, 501), include_in_schema=False)
        return
    visitors = Visitors(callers)
    page = _build(_Page(_folder(), limits, visitors, answers), [model.name for model in models], limits)
    gradio.mount_gradio_app(
        app, page, "/", css=_STYLE.read_text(encoding="utf-8"), theme=_theme(), footer_links=[], run_history=False,
        show_error=False, max_file_size=limits.image_bytes, ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, allowed_paths=[], blocked_paths=[],
    )  # fmt: skip
    # behind the app's own addresses: a wrong method on one of them stays a wrong method
    app.router.default = Door(app.router.routes.pop().app, _folder(), visitors, limits)  # type: ignore[attr-defined]


def load_gradio() -> Any:
    """The module, whose import takes seconds; None: it is not installed."""
    # it reads both when it is imported, or later; there is one folder for all pages of a process
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(_folder())
    try:
        import gradio
    except ImportError:
        return None
    return gradio


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="weft-page-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class _Page:
    """What happens when something is asked."""

    def __init__(self, folder: Path, limits: Limits, visitors: Visitors, answers: Answers) -> None:
        self.folder, self._limits, self._visitors, self._answers = folder, limits, visitors, answers
        self._tabs: dict[str, Tab] = {}

    async def answer(self, tab: Tab, wishes: Wishes, request: Any) -> AsyncGenerator[None, None]:
        """Yields whenever there is more to show."""
        tab.halt, tab.note = asyncio.Event(), ""
        self._tabs[request.session_hash] = tab
        try:
            asked, document = await asyncio.to_thread(self._asked, tab.talk, wishes)
            config = sampling_of(
                asked, self._limits, seed=secrets.randbelow(_SEED_BELOW), temperature=asked.temperature
            )
            owner = self._visitors.owner(request.cookies)
            make_room(self.folder, self._limits.files_bytes)
            tab.talk.begin()
            yield
            last = time.monotonic()
            found = _ticking(self._answers(owner, wishes.model, document, config), tab.halt)
            async with aclosing(found):
                async for piece in found:
                    if piece is not None:
                        tab.talk.add(piece)
                    if isinstance(piece, TextPiece) and time.monotonic() - last < _SHOW_SECONDS:
                        continue
                    last = time.monotonic()
                    yield
        except WeftError as error:
            tab.note = error.what if error.fix is None else f"{error.what}: {error.fix}"
        finally:
            tab.talk.leave()
            tab.halt = None
            if self._tabs.get(request.session_hash) is tab:
                del self._tabs[request.session_hash]

    def closed(self, session: str) -> None:
        """A tab was closed."""
        tab = self._tabs.get(session)
        if tab is not None and tab.halt is not None:
            tab.halt.set()

    def _asked(self, talk: Conversation, wishes: Wishes) -> tuple[ResponsesRequest, Document]:
        asked = ResponsesRequest(
            model=wishes.model, input=talk.to_input(alone=wishes.alone), max_images=wishes.max_images,
            temperature=wishes.temperature or None, seed=_seed_of(wishes.seed),
        )  # fmt: skip
        return asked, of_responses(asked, self._limits, _Nothing())


def _seed_of(typed: str) -> int | None:
    """
    Raises:
        UsageError: it is no seed.
    """
    digits = typed.strip()
    if not digits:
        return None
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 16 or int(digits) >= _SEED_BELOW:
        raise UsageError("this is no seed", fix=f"write a whole number below {_SEED_BELOW}, or none")
    return int(digits)


class _Nothing:
    """The page names no pictures by addresses."""

    def find(self, address: str) -> bytes | None:
        return None


async def _ticking(source: AsyncGenerator[Piece, None], halt: asyncio.Event) -> AsyncGenerator[Piece | None, None]:
    """The same pieces until halted, and None whenever there was none for a while."""
    stopping, coming = asyncio.ensure_future(halt.wait()), None
    try:
        while True:
            coming = coming or asyncio.ensure_future(_next(source))
            await asyncio.wait((coming, stopping), timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                return
            if not coming.done():
                yield None
                continue
            piece, coming = coming.result(), None
            if piece is None:
                return
            yield piece
    finally:
        for task in (stopping, coming):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        await source.aclose()


async def _next(source: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(source, None)


# --- what is seen ---------------------------------------------------------------------------------------------------


def _messages(tab: Tab) -> list[dict[str, Any]]:
    """All turns, and what goes on behind them."""
    found, asked = [], ""
    for i, turn in enumerate(tab.talk.turns, 1):
        named = captions(turn, asked, is_whole=tab.halt is None or i < len(tab.talk.turns))
        found.append({"role": turn.role, "content": [_content(part, tab.talk.folder, named) for part in turn.parts]})
        asked = " ".join(part.text for part in turn.parts if isinstance(part, Text))
    if tab.halt is not None:
        waiting = _waiting(tab.talk)
        if waiting:
            found.append(_aside(waiting, status="pending"))
    elif tab.note:
        found.append(_aside("No answer", tab.note))
    return found


def _content(part: Part, folder: Path, named: Iterator[str]) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": _inert(part.text)}
    # as a component: of a file's `alt_text` gradio shows nothing
    file = {"path": str(folder / str(part.path)), "meta": {"_type": "gradio.FileData"}}
    return {
        "type": "component", "component": "image", "value": file, "constructor_args": {},
        "props": {"alt_text": next(named)},
    }  # fmt: skip


def _inert(text: str) -> str:
    """The same to a reader; to a browser, nothing in it is a tag or an entity. gradio shows texts as HTML it has
    sanitized, in which pictures from anywhere may stand.
    """
    return _MARKUP.sub(rf"\g<0>{_JOINER}", text)


def _waiting(talk: Conversation) -> str | None:
    if talk.painting_since is not None:
        seconds = time.monotonic() - talk.painting_since
        return f"Painting picture {len(talk.pictures) + 1} · {seconds:.0f} s"
    return None if talk.turns[-1].parts and talk.turns[-1].role == "assistant" else _NOTHING_YET


def _aside(title: str, text: str = "", **metadata: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "metadata": {"title": title, **metadata}}


def _facts(tab: Tab) -> str:
    if tab.editing is not None:
        return "Send it to ask it again; what followed goes."
    if tab.talk.end is None:
        return ""
    usage, is_cut = tab.talk.end.usage, tab.talk.end.reason == "length"
    return f"{usage.text_tokens} text tokens, {usage.image_tokens} picture tokens{', cut short' if is_cut else ''}"


def _theme() -> Any:
    import gradio as gr

    # fonts by name load nothing
    fonts = ["system-ui", "sans-serif"]
    return gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"])


def _build(page: _Page, models: Sequence[str], limits: Limits) -> Any:
    """The page's parts and what each does; returns gradio's `Blocks`."""
    import gradio as gr

    gallery = examples_for(models, page.folder / GALLERY)
    with gr.Blocks(title="Weft", analytics_enabled=False, fill_height=True) as blocks:
        tab = gr.State(Tab(Conversation(page.folder)))
        with gr.Row(elem_id="top"):
            gr.Markdown("# Weft", elem_id="name")
            model = gr.Dropdown(list(models), value=models[0], label="Model", elem_id="model", scale=0, container=False)
        chat = gr.Chatbot(
            label="Conversation", show_label=False, elem_id="talk", scale=1, height=None, layout="bubble",
            render_markdown=False, sanitize_html=True, latex_delimiters=[], buttons=[],
            allow_tags=False, allow_file_downloads=False, feedback_options=None,
            placeholder="Ask for text and pictures. Both come in the order in which they are made.",
            examples=[_card(example) for example in gallery],
        )  # fmt: skip
        box = gr.MultimodalTextbox(
            elem_id="ask", show_label=False, label="Question", placeholder="Ask, or drop in pictures",
            file_types=["image"], file_count="multiple", sources=["upload"], max_plain_text_length=10**6,
        )  # fmt: skip
        with gr.Row(elem_id="tools"):
            fresh = gr.Button("New", size="sm", min_width=0, elem_id="fresh")
            back = gr.Button("Edit", size="sm", min_width=0, elem_id="edit", interactive=False)
            archive = gr.DownloadButton(
                "Save Markdown", size="sm", interactive=False, min_width=0, elem_id="as_markdown"
            )
            html = gr.DownloadButton("Save HTML", size="sm", interactive=False, min_width=0, elem_id="as_html")
            facts = gr.Markdown("", elem_id="facts")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                pictures = gr.Slider(
                    0, limits.answer_images, value=min(4, limits.answer_images), step=1, label="Pictures at most"
                )
                temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info="0: always the likeliest")
                # a number that is not given would come as 0
                seed = gr.Textbox(
                    "", label="Seed", placeholder="any", info="the same gives the same answer", max_lines=1,
                    elem_id="seed",
                )  # fmt: skip
            # the bundled generalist has never seen a second question
            alone = gr.Checkbox(bool(gallery), label="Each question by itself, without the conversation so far")
        wishes = [model, pictures, temperature, seed, alone]
        shown = [chat, box, facts, back, archive, html]

        def look(held: Tab, **box_changes: Any) -> tuple[Any, ...]:
            """Everything that changes, as it is now."""
            is_busy, talk = held.halt is not None, held.talk
            return (
                _messages(held),
                gr.MultimodalTextbox(submit_btn=not is_busy, stop_btn=is_busy, **box_changes),
                "" if is_busy else _facts(held),
                gr.Button(interactive=not is_busy and talk.last_question(held.editing) is not None),
                *(gr.DownloadButton(interactive=False) for _ in range(2)),
            )

        async def write(
            held: Tab, request: gr.Request, given: tuple[Any, ...], **first: Any
        ) -> AsyncGenerator[Any, None]:
            async with aclosing(page.answer(held, Wishes(*given), request)) as more:
                async for _ in more:
                    if not held.is_left:
                        yield look(held, **first)
                        first = {}
            if held.is_left:
                return
            shown_now = look(held, **first)
            if held.talk.end is not None:
                files = await asyncio.to_thread(held.talk.to_files, given[0])
                shown_now = (*shown_now[:-2], *(gr.DownloadButton(value=str(each), interactive=True) for each in files))
            yield shown_now

        async def ask(request: gr.Request, held: Tab, said: dict[str, Any], *given: Any) -> AsyncGenerator[Any, None]:
            inside = [Path(file).resolve().relative_to(page.folder).as_posix() for file in said["files"]]
            if held.halt is not None or not (said["text"].strip() or inside):
                return
            if held.editing is not None:
                held.talk.go_back(held.editing)
            held.editing = None
            held.talk.ask(said["text"], inside)
            async for each in write(held, request, given, value=None):
                yield each

        async def again(request: gr.Request, held: Tab, *given: Any) -> AsyncGenerator[Any, None]:
            place = held.talk.last_question()
            if held.halt is None and place is not None:
                held.talk.go_back(place + 1)
                async for each in write(held, request, given):
                    yield each

        async def example(
            request: gr.Request, which: gr.SelectData, held: Tab, *given: Any
        ) -> AsyncGenerator[Any, None]:
            chosen = gallery[which.index]
            if held.halt is None:
                held.talk, held.editing = Conversation(page.folder), None
                held.talk.ask(chosen.text, [] if chosen.picture is None else [f"{GALLERY}/{chosen.picture.name}"])
                async for each in write(held, request, (chosen.model, *given[1:])):
                    yield (*each, chosen.model)

        def take_back(held: Tab) -> tuple[Any, ...]:
            """The last question into the box; once more: the one before it."""
            place = None if held.halt is not None else held.talk.last_question(held.editing)
            if place is None:
                return tuple(gr.skip() for _ in shown)
            held.editing = place
            text, files = held.talk.draft(place)
            *rest, _, _ = look(held, value={"text": text, "files": [str(page.folder / file) for file in files]})
            return (*rest, gr.skip(), gr.skip())

        def begin_anew(held: Tab) -> tuple[Any, ...]:
            if held.halt is not None:
                held.halt.set()
            held.is_left = True
            fresh_tab = Tab(Conversation(page.folder))
            return (fresh_tab, *look(fresh_tab, value=None))

        def stop(held: Tab) -> None:
            if held.halt is not None:
                held.halt.set()

        def closed(request: gr.Request) -> None:
            page.closed(str(request.session_hash))

        plain: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        many = {**plain, "concurrency_limit": None}
        box.submit(ask, [tab, box, *wishes], shown, **many)
        chat.retry(again, [tab, *wishes], shown, **many)
        chat.example_select(example, [tab, *wishes], [*shown, model], **many)
        box.stop(stop, [tab], None, queue=False, **plain)
        back.click(take_back, [tab], shown, queue=False, **plain)
        gr.on([fresh.click, chat.clear], begin_anew, [tab], [tab, *shown], queue=False, **plain)
        blocks.unload(closed)
    queue = blocks.queue(default_concurrency_limit=None)._queue
    # as on Windows; elsewhere it looks a thousand times a second, and whoever else has something to do waits each time
    queue.sleep_when_free, queue.progress_update_sleep_when_free = _LOOK_SECONDS, 2 * _LOOK_SECONDS
    return blocks


def _card(example: Example) -> Any:
    card: dict[str, Any] = {"text": example.text or example.label, "display_text": _words(example)}
    if example.picture is not None:
        card["files"] = [str(example.picture)]
    return card


def _words(example: Example) -> str:
    return f"{example.label}: {example.text}" if example.text else f"{example.label}."
