"""A server of this machine for the pages of `live.py`: it answers on the loopback address alone, and changes nothing.

What a page of somebody else's in the same browser could try is closed: a name that is made to lead to this machine
(DNS rebinding) is refused by its Host header, pages cannot be framed, read or scripted from elsewhere, only GET and
HEAD are answered, and addresses are looked up among the runs that are there, never made into paths.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from albert_ablate.config import ConfigError
from albert_ablate.ui.live import Pages, RenderedPage

HOST = "127.0.0.1"
PORT = 8321
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def application(pages: Pages) -> Starlette:
    """The pages as an ASGI application."""

    async def study(request: Request) -> Response:
        return _page(request, await run_in_threadpool(pages.of_study))

    async def run(request: Request) -> Response:
        made = await run_in_threadpool(pages.of_run, request.path_params["setting"], request.path_params["seed"])
        return PlainTextResponse("There is no such run.\n", 404) if made is None else _page(request, made)

    async def static(request: Request) -> Response:
        if request.path_params["name"] not in pages.files:
            return PlainTextResponse("There is no such file.\n", 404)
        kind, content = pages.files[request.path_params["name"]]
        return Response(content, media_type=kind, headers={"Cache-Control": "max-age=31536000, immutable"})

    routes = [
        Route("/", study, methods=["GET"]),
        Route("/run/{setting}/{seed}", run, methods=["GET"]),
        Route("/static/{name}", static, methods=["GET"]),
    ]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[Middleware(_Headers), trusted])


def _page(request: Request, made: RenderedPage) -> Response:
    tag = f'"{made.version}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(made.content, media_type="text/html", headers=headers)


class _Headers:
    """Sends `HEADERS` with every answer."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self.app(scope, receive, with_headers)


@contextlib.contextmanager
def listening(port: int | None) -> Iterator[socket.socket]:
    """A socket on the loopback address: at `port`, or without one at PORT or, where that is taken, at any that is free.

    Raises ConfigError where the port cannot be had.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((HOST, PORT if port is None else port))
        except OSError as error:
            if port is not None:
                raise ConfigError(f"Port {port} cannot be used ({error.strerror}): give another with --port.") from None
            opened.bind((HOST, 0))
        yield opened


def serve(pages: Pages, port: int | None, say: Callable[[str], None]) -> None:
    """Answer until Ctrl-C. say: is given the address, once the server listens."""
    import uvicorn

    with listening(port) as opened:
        settings = uvicorn.Config(application(pages), log_level="warning", access_log=False, server_header=False)
        opened.listen()
        say(f"http://{HOST}:{opened.getsockname()[1]}/")
        uvicorn.Server(settings).run(sockets=[opened])
