"""The server of the page: on this machine only, for its own page only, and without a way to its files."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from karla_hf.page import Page
from karla_hf.page_html import CSS
from karla_hf.page_model import PageModel


HOST = "127.0.0.1"
MOST_BYTES = 2 << 20  # of an uploaded file
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-src 'none'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)


API = "/gradio_api/"
ROUTES = (
    "queue/",
    "run/",
    "upload",
    "heartbeat/",
    "cancel",
    "reset",
)  # what the page needs of it, so no files and no proxy


class Guard:
    """Answers what the page itself asks for, and refuses other sites, also under a name that points here.

    Args:
        app: what answers.
        port: where it listens.
    """

    def __init__(self, app: ASGIApp, port: int):
        self.app = app
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY  # keeps what an answer shows from calling other hosts
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if headers.get("host") not in self.hosts or (
                origin is not None and origin.partition("://")[2] not in self.hosts
            ):
                await PlainTextResponse("This page is for this machine only.", 403)(scope, receive, send)
                return
            path = scope["path"]
            if path.startswith(API) and not path.removeprefix(API).startswith(ROUTES):
                await PlainTextResponse("The page does not need this.", 404)(scope, receive, send)
                return
        await self.app(scope, receive, send_with_policy)


def serve_page(model: PageModel, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C. Uploaded files are removed when they are read, all others at the end.

    Args:
        model: the model behind the page.
        port: where to listen; 0 takes a free one.
        on_ready: gets the address as soon as it answers.

    Raises:
        OSError: if the port cannot be used.
    """
    listener = _listen(port)
    port = listener.getsockname()[1]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listener, tempfile.TemporaryDirectory(prefix="karla-page-") as uploads, suppress(KeyboardInterrupt):
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = Page(model)
        app = FastAPI(openapi_url=None)
        app.add_middleware(Guard, port=port)
        font, mono = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")
        gr.mount_gradio_app(
            app,
            page.blocks.queue(default_concurrency_limit=1),
            "/",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            blocked_paths=[str(model.directory.resolve())],
            show_error=False,
            max_file_size=MOST_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=mono),
            css=CSS,
        )
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        try:
            on_ready(f"http://{HOST}:{port}")
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            page.close()


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(
            f"Port {port} of {HOST} cannot be used ({error.strerror}); give another --port, or 0 for a free one."
        ) from error
    return listener
