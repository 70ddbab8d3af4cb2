"""The door of the page: who may come in, what may be asked for, how much may be brought.

The page's library answers more than the page needs: it fetches addresses for others, and serves without asking for
whom. What is not named here does not reach it.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.serve.conversation import make_room
from weft.serve.guard import Callers, NoKey
from weft.serve.limits import Limits

COOKIE = "weft_page"
SIGN_IN = "/sign_in"
SECONDS = 12 * 3600
"""A key need not be typed again for so long."""
_KEY_BYTES = 8192
_TEMPLATE = Path(__file__).parent / "assets" / "sign_in.html"
_FILE = "/gradio_api/file="
_SHELL = re.compile(r"/(?:|config|theme\.css|manifest\.json|favicon\.ico|robots\.txt|(?:assets|static)/[\w./-]+)")
_TALK = re.compile(
    r"/gradio_api/(?:queue/(?:join|data)|run/predict|upload|upload_progress|heartbeat/\w+|cancel|startup-events)"
)
_OURS = "'self' 'unsafe-inline'"
HEADERS = {
    "Content-Security-Policy": "; ".join((
        "default-src 'none'", f"script-src {_OURS}", f"style-src {_OURS}", "img-src 'self' data: blob:",
        "font-src 'self' data:", "connect-src 'self'", "manifest-src 'self'", "media-src 'self' blob:",
        "worker-src 'self' blob:", "base-uri 'self'", "form-action 'self'", "frame-ancestors 'none'",
    )),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}  # fmt: skip
"""Of everything the page sends: a browser loads nothing from elsewhere, whatever stands in it."""


class Visitors:
    """Who typed a key into the page: a cookie names them, signed with a secret that ends with the server."""

    def __init__(self, callers: Callers) -> None:
        self._callers, self._secret = callers, secrets.token_bytes(32)

    def owner(self, cookies: Mapping[str, str]) -> str:
        """As `Callers.owner` would say of the key.

        Raises:
            NoKey: nobody typed one here.
        """
        owner, _, signature = cookies.get(COOKIE, "").partition(".")
        if owner and hmac.compare_digest(signature.encode(), self._sign(owner).encode()):
            return owner
        return self._callers.owner(None)

    def cookie(self, key: str) -> str:
        """
        Raises:
            NoKey: it is no key of this server.
        """
        owner = self._callers.owner(f"Bearer {key}")
        return f"{owner}.{self._sign(owner)}"

    def _sign(self, owner: str) -> str:
        return hmac.new(self._secret, owner.encode(), hashlib.sha256).hexdigest()


class Door:
    """
    Args:
        page: whatever shows it.
        folder: the only one whose files are served.
    """

    def __init__(self, page: ASGIApp, folder: Path, visitors: Visitors, limits: Limits) -> None:
        self._page, self._folder, self._visitors, self._limits = page, folder, visitors, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                headers.update(HEADERS)
            await send(message)

        answer = await self._instead(Request(scope, receive))
        await (answer or self._page)(scope, receive, with_headers)

    async def _instead(self, request: Request) -> Response | None:
        """What is said in the page's place; None: it may answer itself."""
        path, size = request.url.path, request.headers.get("content-length", "")
        if path == SIGN_IN:
            return await self._sign_in(request)
        if not self._is_known(path):
            return _refusal(404, "there is no such address", "not_found")
        try:
            self._visitors.owner(request.cookies)
        except NoKey:
            return RedirectResponse(SIGN_IN, 303) if path == "/" else _refusal(401, "sign in first", NoKey.code)
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
                return _refusal(403, "this comes from another site", "other_site")
            if not size.isdecimal():
                return _refusal(411, "how long is it?", "no_length")
            if int(size) > self._limits.body_bytes:
                return _refusal(413, f"more than {self._limits.body_bytes:,} bytes", "request_too_large")
            make_room(self._folder, self._limits.files_bytes)
        return None

    def _is_known(self, path: str) -> bool:
        if path.startswith(_FILE):
            file = Path(path.removeprefix(_FILE))
            return file.is_absolute() and file.resolve().is_relative_to(self._folder) and file.is_file()
        return ".." not in path and bool(_SHELL.fullmatch(path) or _TALK.fullmatch(path))

    async def _sign_in(self, request: Request) -> Response:
        is_wrong = False
        if request.method == "POST":
            size = request.headers.get("content-length", "")
            if not size.isdecimal() or int(size) > _KEY_BYTES:
                return _refusal(413, "this is no key", "request_too_large")
            given = parse_qs((await request.body()).decode("utf-8", "replace")).get("key", [""])[0]
            try:
                cookie = self._visitors.cookie(given)
            except NoKey:
                is_wrong = True
            else:
                answer = RedirectResponse("/", 303)
                is_secure = request.url.scheme == "https"
                answer.set_cookie(COOKIE, cookie, SECONDS, httponly=True, samesite="strict", secure=is_secure)
                return answer
        from jinja2 import Template

        page = Template(_TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(is_wrong=is_wrong)
        return HTMLResponse(page, 401 if is_wrong else 200, {"Cache-Control": "no-store"})


def _refusal(status: int, message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)
