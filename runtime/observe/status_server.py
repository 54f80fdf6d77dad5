"""The status page's server: three static files, a few queries and two commands.

Threat model: neither a web page that the operator happens to have open elsewhere nor anyone on
the same network may command a robot or see a camera.

- Stopping a robot and talking to it need the run's token in an `Authorization` header of a POST. A
  browser sends such a header to another origin only after asking first, and is never allowed: no
  cookie, no form and no image of a foreign page can do either.
- On loopback reading is free where nobody else can log in on this host, but only under a loopback
  name (a foreign name that resolves here is an attack) and never for a foreign page. Elsewhere
  reading needs the token too.
- Nothing is fetched from anywhere else, and no other page may frame this one.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.observe.overlay import encode_jpeg
from openhelix.runtime.observe.status_source import NoRun, RunSource
from openhelix.runtime.transport.sockets import other_users

log = logging.getLogger(__name__)
FLEET_S: Final = 1.0
FRESH_S: Final = 0.1  # answers younger than this are given again instead of asking again
MAX_BODY: Final = 64 * 1024  # a sentence that is far too long is still told so
PAGE: Final = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
# A name, an IPv4 address or an IPv6 address in brackets, and a port or none; nothing else.
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+))(?::[0-9]{1,5})?")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class StatusServer:
    """Serves one source.

    Args:
        source: which run.
        host: address to bind; anything but a loopback address makes reading need the token,
            and so does a host on which others can log in.
        port: TCP port; 0 for a free one.
        tls: certificate and key, for addresses that others can reach.
    """

    def __init__(
        self,
        source: RunSource,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._source, self._host, self._port, self._tls = source, host, port, tls
        self._loopback = is_loopback(host)
        self.open = self._loopback and not other_users()
        self._asking, self._counting = asyncio.Lock(), asyncio.Lock()
        self._answer: tuple[float, dict[str, Any]] = (-1.0, {})
        self._robots: tuple[float, dict[str, Any]] = (-1.0, {})
        self._images: dict[str, tuple[float, int, bytes]] = {}
        self._runner: web.AppRunner | None = None
        self.refused = 0  # requests without the right token, name or origin
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY)
        for path in PAGE:
            app.router.add_get(path, self._page)
        app.router.add_get("/api/status", self._status)
        app.router.add_get("/api/camera/{name}", self._camera)
        app.router.add_get("/api/fleet", self._fleet)
        app.router.add_post("/api/say", self._say)
        app.router.add_post("/api/stop", self._stop)
        self.app = app

    async def start(self) -> str:
        """Bind and serve; return the page's address.

        Raises:
            ValueError: the address cannot be used.
        """
        self._runner = web.AppRunner(self.app, access_log=None, logger=_quiet())
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            where = f"{self._host}:{self._port}"
            raise ValueError(f"--listen: {where} cannot be used ({error.strerror})") from None
        port = self._runner.addresses[0][1]
        name = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{name}:{port}/"

    async def close(self) -> None:
        """Stop serving; safe to call twice."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = self._refusal(request)
        try:
            response = refusal or await handler(request)
        except web.HTTPException as error:
            response = _told(error.status, error.reason)
        except NoRun as error:
            response = _told(503, str(error))
        except ConfigError as error:
            response = _told(400, str(error))
        response.headers.update(HEADERS)
        return response

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Return why a request is refused; None when it is not."""
        if self._loopback and not is_loopback(host_name(request.headers.get("Host", ""))):
            return self._refuse(request, 421, "this page is served under a loopback name alone")
        if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return self._refuse(request, 403, "another site's page may not use this one")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("Host"):
            return self._refuse(request, 403, "another site's page may not use this one")
        asks = request.path.startswith("/api/")
        if asks and (request.method != "GET" or not self.open) and not self._authorized(request):
            return self._refuse(request, 401, "the token is missing or wrong")
        return None

    def _refuse(self, request: web.Request, status: int, why: str) -> web.Response:
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:
            log.warning(
                "%s %.80s from %s refused: %s; %d so far",
                *(request.method, request.path, request.remote, why, self.refused),
            )
        return _told(status, why)

    def _authorized(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        token = self._source.token
        # Compared even where there is nothing to compare with: the time tells nothing. Bytes that are
        # no text come as lone surrogates.
        told = given.strip().encode(errors="surrogateescape")
        same = hmac.compare_digest(told, (token or "-").encode())
        return same and token is not None and scheme.lower() == "bearer"

    async def _page(self, request: web.Request) -> web.StreamResponse:
        name, kind = PAGE[request.path]
        text = files("openhelix.runtime.observe.status_page").joinpath(name).read_text("utf-8")
        return web.Response(text=text, content_type=kind)

    async def _status(self, request: web.Request) -> web.StreamResponse:
        async with self._asking:  # however many pages are open, the run is asked once
            now_s = asyncio.get_running_loop().time()
            if now_s - self._answer[0] > FRESH_S:
                self._answer = (now_s, await asyncio.to_thread(self._source.snapshot))
        return web.json_response(self._answer[1])

    async def _camera(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if not name.isprintable():  # what is no text cannot be asked for either
            raise web.HTTPNotFound(reason="there is no such camera, or no image yet")
        async with self._asking:
            now_s = asyncio.get_running_loop().time()
            asked_s, t_ns, jpeg = self._images.get(name, (-1.0, -1, b""))
            if now_s - asked_s > FRESH_S:
                frame = await asyncio.to_thread(self._source.frame, name)
                if not frame:
                    raise web.HTTPNotFound(reason="there is no such camera, or no image yet")
                if frame["t_ns"] != t_ns:
                    t_ns, jpeg = frame["t_ns"], await asyncio.to_thread(encode_jpeg, frame["rgb"])
                self._images[name] = (now_s, t_ns, jpeg)
        return web.Response(body=jpeg, content_type="image/jpeg", headers={"X-Time-Ns": str(t_ns)})

    async def _fleet(self, request: web.Request) -> web.StreamResponse:
        """Every robot that can be asked; whoever does not answer in time says so itself.

        One that does not must not hold up the robot that is shown: this has a lock of its own.
        """
        async with self._counting:
            now_s = asyncio.get_running_loop().time()
            if now_s - self._robots[0] > FLEET_S:
                self._robots = (now_s, await asyncio.to_thread(self._source.fleet))
        return web.json_response(self._robots[1])

    async def _say(self, request: web.Request) -> web.StreamResponse:
        try:
            given = await request.json()
        except ValueError:
            raise ConfigError("say: the body is not JSON") from None
        text = given.get("text") if isinstance(given, dict) else None
        name = str(given.get("who") or "the page") if isinstance(given, dict) else ""
        name = name.encode(errors="replace").decode()  # JSON can say what is no text
        answer = await asyncio.to_thread(self._source.say, text, f"{name} at {request.remote}")
        return web.json_response(answer)

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        who = f"the page at {request.remote}"
        await asyncio.to_thread(self._source.stop, who)
        log.warning("the robot was stopped by %s", who)
        return web.json_response({"stopped": True})


def is_loopback(host: str) -> bool:
    """Whether a name or address is this host's own, that no other host can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Return the name or address in a Host header; "" for what is no such header."""
    found = _HOST.fullmatch(header)
    return (found[1] or found[2]) if found else ""


class _OneLine(logging.Filter):
    """Tells a request that is no HTTP in one line, the 1st, 2nd, 4th, ... time; a defect in full."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        self._count += 1
        said = " ".join(str(error.message).split())[:120]
        record.msg, record.args = "not HTTP, refused: %s; %d so far", (said, self._count)
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return self._count & (self._count - 1) == 0


def _quiet() -> logging.Logger:
    logger = logging.Logger(f"{__name__}.http")  # one of its own: others' filters stay theirs
    logger.parent = log
    logger.addFilter(_OneLine())
    return logger


def _told(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
