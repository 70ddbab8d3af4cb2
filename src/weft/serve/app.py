"""The addresses of the server: who asks what, handed to whoever answers it."""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from weft.document import Document
from weft.errors import WeftError
from weft.generation import SamplingConfig
from weft.serve import chat, responses
from weft.serve.counters import Counters
from weft.serve.files import Files, Own
from weft.serve.guard import Bodies, Callers, Keys, NoKey, Quiet
from weft.serve.limits import Limits
from weft.serve.parts import Broken, End, Picture, Piece, pieces
from weft.serve.prompt import of_chat, of_images, of_responses, sampling_of
from weft.serve.scheduler import Busy, Closing, EngineDown, Overdue, Refused, Scheduler
from weft.serve.schema import Asked, ChatRequest, ImagesRequest, ResponsesRequest
from weft.serve.worker import Unexpected

T = TypeVar("T")
ASKING = ("/v1/chat/completions", "/v1/responses", "/v1/images/generations")
"""Where a model is asked."""
ASKING_BYTES = frozenset(address.encode() for address in ASKING)
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""Otherwise a variable of the environment has requests, and errors with what is in them, sent elsewhere."""
GONE = 499
"""A caller that did not wait; nobody reads it but the log."""
STATUS: Mapping[type[WeftError], int] = {
    NoKey: 401, Busy: 429, Closing: 503, Overdue: 503, EngineDown: 500, Unexpected: 500, Broken: 500,
}  # fmt: skip
"""Of an error; any other says that the request cannot be answered."""
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": what}
    for status, what in (
        (400, "cannot be answered"), (401, "no key"), (404, "no such thing"), (408, "did not arrive in time"),
        (413, "too large"), (429, "too many requests"), (503, "shutting down, or no slot in time"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A model that may be asked."""

    name: str
    about: str = ""


class _Room:
    """Middleware that refuses what there is no room for before it is read: whoever asks too much must cost little."""

    def __init__(self, app: Any, room: "Room") -> None:
        self._app, self._room = app, room

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in ASKING:
            refused = self._room.refusal()
            if refused is not None:
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Room:
    """What a server without room answers to whoever asks a model."""

    def __init__(self, scheduler: Scheduler, callers: Callers) -> None:
        self._scheduler, self._callers = scheduler, callers
        self._last: tuple[tuple[Any, ...], Response] | None = None

    def refusal(self) -> Response | None:
        try:
            self._scheduler.check_room()
        except WeftError as error:
            words = (type(error), error.what, error.fix)
            if self._last is None or self._last[0] != words:
                self._last = words, refusal(error)
            return self._last[1]
        return None

    def at_once(self, address: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Response | None:
        """The same for a request that is not read yet, if it asks a model and has a key."""
        if address not in ASKING_BYTES or (refused := self.refusal()) is None:
            return None
        key = next((value.decode("latin-1") for name, value in headers if name == b"authorization"), None)
        try:
            self._callers.owner(key)
        except NoKey:
            return None
        return refused


class _Begun:
    """Pieces of an answer that is being made; closed, it ends the request, even if nothing was read."""

    def __init__(self, found: AsyncGenerator[Piece]) -> None:
        self._rest = found
        self._first: asyncio.Future[Piece] | None = asyncio.ensure_future(anext(found))

    async def wait(self, seconds: float | None) -> None:
        """For the first piece, at most so long: what is refused until then is raised here, before a status is sent."""
        if self._first is not None:
            await asyncio.wait((self._first,), timeout=seconds)
            if self._first.done():
                self._first.result()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self._first is not None:
            first, self._first = self._first, None
            return await first
        return await anext(self._rest)

    async def aclose(self) -> None:
        if self._first is not None:
            self._first.cancel()
            with contextlib.suppress(BaseException):
                await self._first
        await self._rest.aclose()


class _Stream(EventSourceResponse):
    """A stream whose request ends when its reader does, at once and not when memory is tidied."""

    def __init__(self, lines: Any, found: _Begun, limits: Limits) -> None:
        self._lines, self._found = lines, found
        super().__init__(lines, ping=max(1, int(limits.keep_alive_seconds)), sep="\n")

    async def __call__(self, *given: Any) -> None:
        try:
            await super().__call__(*given)
        finally:
            await self._lines.aclose()
            await self._found.aclose()


def create_app(
    scheduler: Scheduler,
    models: Sequence[Served],
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    files: Files | None = None,
    public_url: str = "",
    page: bool = False,
) -> FastAPI:
    """
    Args:
        scheduler: started by whoever makes it.
        models: what it serves; the first is the default of the page.
        keys: one of which every caller of /v1 needs; none: everybody may ask.
        files: where pictures are kept that are fetched by address. None: here.
        public_url: what stands before these addresses, so that others than the caller can follow them.
        page: show one at `/` too, where gradio is installed.
    """
    limits = limits or Limits()
    files = files or Files(limits.file_seconds, limits.files_bytes)
    app = FastAPI(title="Weft", docs_url=None, redoc_url=None, openapi_url="/openapi.json", telemetry=NO_TELEMETRY)
    callers = Callers(keys, limits)
    room = Room(scheduler, callers)
    # the last one comes first
    app.add_middleware(Bodies, limits=limits)
    app.add_middleware(_Room, room=room)
    app.add_middleware(Keys, callers=callers)
    app.add_middleware(Quiet)
    names, counters, since = {model.name for model in models}, Counters(scheduler), int(time.time())
    app.state.scheduler, app.state.room = scheduler, room
    _say_errors(app)

    def caller(request: Request) -> str:
        return callers.owner(request.headers.get("authorization"))

    def own(owner: str) -> Own:
        return Own(files, owner, public_url)

    def check_model(asked: Asked) -> None:
        if asked.model not in names:
            known = ", ".join(sorted(names))
            raise HTTPException(404, f"there is no such model; there is {known}")

    async def read_and_answer(
        endpoint: str, asked: Asked, owner: str, prompt: Callable[..., Document], config: SamplingConfig
    ) -> AsyncGenerator[Piece]:
        document = await asyncio.to_thread(prompt, asked, limits, own(owner))
        found = _counted(pieces(scheduler.answer(asked.model, document, config)), endpoint, counters)
        async with aclosing(found):
            async for piece in found:
                yield piece

    async def begin(
        request: Request,
        endpoint: str,
        asked: Asked,
        owner: str,
        prompt: Callable[..., Document],
        config: SamplingConfig,
        *,
        is_streamed: bool | None = False,
    ) -> _Begun:
        """The pieces of the answer. What is refused is refused before this returns; but a stream begins after a while
        whatever comes, as nobody waits long for a server that says nothing."""
        begun = _Begun(_held(read_and_answer(endpoint, asked, owner, prompt, config), callers, owner))
        try:
            await _unless_gone(request, begun.wait(limits.keep_alive_seconds if is_streamed else None))
        except BaseException:
            await begun.aclose()
            raise
        return begun

    @app.post("/v1/chat/completions", responses=REFUSALS)
    async def chat_completions(asked: ChatRequest, request: Request) -> Any:
        owner = caller(request)
        check_model(asked)
        texts_only = asked.modalities is not None and "image" not in asked.modalities
        config = sampling_of(
            asked, limits, seed=_seed(), temperature=asked.temperature, top_p=asked.top_p,
            max_tokens=asked.max_completion_tokens or asked.max_tokens, max_images=0 if texts_only else None,
        )  # fmt: skip
        found = await begin(request, "chat", asked, owner, of_chat, config, is_streamed=asked.stream)
        made = chat.Completion(asked, _identity(), int(time.time()), own(owner))
        if asked.stream:
            with_usage = bool((asked.stream_options or {}).get("include_usage"))
            return _Stream(chat.stream(made, found, with_usage=with_usage), found, limits)
        async with aclosing(found):
            return JSONResponse(await _unless_gone(request, chat.whole(made, found)))

    @app.post("/v1/responses", responses=REFUSALS)
    async def responses_create(asked: ResponsesRequest, request: Request) -> Any:
        owner = caller(request)
        check_model(asked)
        config = sampling_of(
            asked, limits, seed=_seed(), temperature=asked.temperature, top_p=asked.top_p,
            max_tokens=asked.max_output_tokens,
        )  # fmt: skip
        found = await begin(request, "responses", asked, owner, of_responses, config, is_streamed=asked.stream)
        made = responses.Answer(asked, _identity(), int(time.time()), own(owner))
        if asked.stream:
            return _Stream(responses.stream(made, found), found, limits)
        async with aclosing(found):
            return JSONResponse(await _unless_gone(request, responses.whole(made, found)))

    @app.post("/v1/images/generations", responses=REFUSALS)
    async def images_generations(asked: ImagesRequest, request: Request) -> Any:
        owner = caller(request)
        check_model(asked)
        size = asked.size if asked.image_size is None else asked.image_size
        seed = _seed() if asked.seed is None else asked.seed
        data = []
        for number in range(asked.n or 1):
            numbered = asked.model_copy(update={"image_size": size, "seed": (seed + number) % 2**63})
            # what one prompt asks for several times should not be the same several times
            warmth = 1.0 if asked.temperature is None else asked.temperature
            config = sampling_of(
                numbered, limits, seed=seed, temperature=warmth, first="image", min_images=1, max_images=1
            )
            config = config.model_copy(update={"max_text_tokens": 0})
            found = await begin(request, "images", asked, owner, of_images, config)
            async with aclosing(found):
                picture = await _unless_gone(request, _first_picture(found))
            is_inline = asked.delivery == "inline"
            data.append({"b64_json": picture.base64} if is_inline else {"url": own(owner).put(picture.png)})
        return {"created": int(time.time()), "data": data}

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def list_models(request: Request) -> Any:
        caller(request)
        return {"object": "list", "data": [_model(model, since) for model in models]}

    @app.get("/v1/models/{name}", responses={401: REFUSALS[401], 404: REFUSALS[404]})
    async def one_model(name: str, request: Request) -> Any:
        caller(request)
        for model in models:
            if model.name == name:
                return _model(model, since)
        raise HTTPException(404, "there is no such model")

    @app.get(
        "/v1/files/{identity}/content", response_class=Response, responses={401: REFUSALS[401], 404: REFUSALS[404]}
    )
    async def file_content(identity: str, request: Request) -> Response:
        data = files.get(identity, caller(request))
        if data is None:
            raise HTTPException(404, "there is no such file, or no longer")
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=900"}
        return Response(data, media_type="image/png", headers=headers)

    @app.get("/health", responses={500: {"description": "the models stopped working"}})
    async def health() -> Any:
        if scheduler.failure is not None:
            return JSONResponse({"status": "failed"}, 500)
        return {"status": "ok"}

    @app.get("/ready", responses={503: REFUSALS[503]})
    async def ready() -> Any:
        if scheduler.is_closing or scheduler.failure is not None:
            return JSONResponse({"status": "closing"}, 503)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={401: REFUSALS[401]})
    async def metrics(request: Request) -> Response:
        caller(request)
        return Response(counters.exposition(), media_type=counters.media_type)

    if page:
        from weft.serve.page import mount_page

        def answers(owner: str, model: str, document: Document, config: SamplingConfig) -> AsyncGenerator[Piece, None]:
            return _held(_counted(pieces(scheduler.answer(model, document, config)), "page", counters), callers, owner)

        mount_page(app, models, limits, callers, answers)
    return app


# --- pieces on their way --------------------------------------------------------------------------------------------


async def _counted(found: AsyncGenerator[Piece], endpoint: str, counters: Counters) -> AsyncGenerator[Piece]:
    """The same pieces; each request is counted once, by its outcome."""
    begun, outcome = time.monotonic(), "gone"
    is_first = True
    try:
        async with aclosing(found):
            async for piece in found:
                if is_first:
                    counters.first(time.monotonic() - begun)
                    is_first = False
                if isinstance(piece, End):
                    outcome = piece.reason
                    counters.made(piece.usage)
                yield piece
    except WeftError as error:
        outcome = error.code
        raise
    finally:
        counters.outcome(endpoint, outcome, time.monotonic() - begun)


async def _held(found: AsyncGenerator[Piece], callers: Callers, owner: str) -> AsyncGenerator[Piece]:
    """The same pieces, counted against what their owner may have running."""
    async with aclosing(found):
        with callers.asking(owner):
            async for piece in found:
                yield piece


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result, unless the caller leaves before it is there; then the work is ended."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(GONE, "the caller left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first_picture(found: AsyncIterator[Piece]) -> Picture:
    picture = None
    async for piece in found:
        if isinstance(piece, Picture):
            picture = piece
    if picture is None:
        raise WeftError("the model made no picture")
    return picture


# --- words ----------------------------------------------------------------------------------------------------------


def error_json(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """As OpenAI's clients read errors."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: WeftError) -> JSONResponse:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Refused) else {}
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    message = error.what if error.fix is None else f"{error.what}; {error.fix}"
    return JSONResponse(error_json(message, kind, error.code, error.where), status, headers)


def _say_errors(app: FastAPI) -> None:
    @app.exception_handler(WeftError)
    async def weft_error(_: Request, error: WeftError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = _place(first["loc"])
        message = first["msg"] if place is None else f"{place}: {first['msg']}"
        return JSONResponse(error_json(message, "invalid_request_error", "invalid", place), 400)

    @app.exception_handler(AnyHTTPException)
    async def http_error(_: Request, error: AnyHTTPException) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        code = "not_found" if error.status_code == 404 else None
        return JSONResponse(error_json(str(error.detail), kind, code), error.status_code, error.headers)


def _place(loc: Sequence[int | str]) -> str | None:
    """Where in a request something is wrong: names that look like a field's, not what somebody wrote."""
    names = [str(each) for each in loc if each != "body" and re.fullmatch(r"[a-z0-9_]{1,40}", str(each))]
    return ".".join(names) or None


def _model(model: Served, since: int) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": since, "owned_by": "weft"}


def _identity() -> str:
    return secrets.token_hex(16)


def _seed() -> int:
    return secrets.randbits(62)
