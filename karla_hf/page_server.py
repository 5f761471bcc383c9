"""The server of the page: on this machine only, for its own page only, and without a way to its files."""

from __future__ import annotations

import asyncio
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
        closing: set when the server ends; streams that are still open end then.
    """

    def __init__(self, app: ASGIApp, port: int, closing: asyncio.Event):
        self.app, self.closing = app, closing
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        unfinished = False

        async def send_with_policy(message: Message) -> None:
            nonlocal unfinished
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY  # keeps what an answer shows from calling other hosts
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            unfinished = message.get("more_body", message["type"] == "http.response.start")
            await send(message)

        async def receive_until_closing() -> Message:
            message, end = asyncio.ensure_future(receive()), asyncio.ensure_future(self.closing.wait())
            try:
                await asyncio.wait((message, end), return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                end.cancel()

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin")
        if headers.get("host") not in self.hosts or (
            origin is not None and origin.partition("://")[2] not in self.hosts
        ):
            await PlainTextResponse("This page is for this machine only.", 403)(scope, receive, send)
        elif path.startswith(API) and not path.removeprefix(API).startswith(ROUTES):
            await PlainTextResponse("The page does not need this.", 404)(scope, receive, send)
        else:
            await self.app(scope, receive_until_closing, send_with_policy)
            if unfinished:
                await send({"type": "http.response.body"})


class PageServer(uvicorn.Server):
    """A server that tells its page when it ends.

    Args:
        config: of uvicorn.
        page: the page.
        closing: set when the server ends.
    """

    def __init__(self, config: uvicorn.Config, page: Page, closing: asyncio.Event):
        super().__init__(config)
        self.page, self.closing = page, closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is being answered or read, and the streams to the browsers, before the server itself."""
        self.page.closing = True
        self.closing.set()
        await super().shutdown(sockets)


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
        page, closing = Page(model), asyncio.Event()
        page.blocks.has_launched = True  # without it, Gradio takes any path for that of an uploaded file
        app = FastAPI(openapi_url=None)
        app.add_middleware(Guard, port=port, closing=closing)
        font, mono = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")
        gr.mount_gradio_app(
            app,
            page.blocks.queue(default_concurrency_limit=1),
            "/",
            app_kwargs={"openapi_url": None},
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
            PageServer(config, page, closing).run(sockets=[listener])
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
