"""A Karla behind the OpenAI-compatible server of transformers: the command `karla serve`.

The server, its routes and its generation are those of `transformers serve`. Only its model manager is replaced: that one
looks a model's class up among transformers' own, and lists what is in the download cache.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.utils.import_utils import is_serve_available

from karla_hf.checkpoints import check_checkpoint, load_checkpoint
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.report import new_console


LOOPBACK = ("127.0.0.1", "localhost")


class OneModelManager(ModelManager):
    """Has one model, which is loaded already and stays so.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        name: what clients call it.
        created: seconds since 1970, for the list of models.
    """

    def __init__(self, model: KarlaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, created: int) -> None:
        self._served, self._created = (model, tokenizer), created
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is; there are no revisions."""
        return model_id

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> tuple[Any, Any]:
        """Return the model and its tokenizer.

        Raises:
            ValueError: for the name of another model.
        """
        if model_id_and_revision != self.force_model or gguf_file is not None:
            raise ValueError(
                f"There is no model {model_id_and_revision!r} here; this server has {self.force_model!r}."
            )
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self._served

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """The one model, as `/v1/models` lists it."""
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "karla"}]


def run_server(directory: Path, *, host: str, port: int, ticks: int | None, threshold: float | None) -> None:
    """Serve a Karla until Ctrl-C; its memory is on and never written.

    Requests are answered one after the other, in the order in which they come.

    Args:
        directory: folder of a Karla; clients call the model by the folder's name.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        ticks: most ticks per token; None takes the configuration's.
        threshold: certainty at which a token needs no further ticks; None takes the configuration's.

    Raises:
        ImportError: if what the server needs is not installed.
        OSError: if this is no Karla, or host and port cannot be listened on.
    """
    if not is_serve_available():
        raise ImportError("`karla serve` needs the extra `serve`; install it with `pip install 'karla-hf[serve]'`.")
    import uvicorn

    check_checkpoint(directory)
    with _listen(host, port) as listener:  # before the model is loaded, so that a taken port is told at once
        model, tokenizer = load_checkpoint(directory)
        if ticks is not None:
            model.config.ctm_num_ticks = ticks
        if threshold is not None:
            model.config.certainty_threshold = threshold
        name, created = directory.resolve().name, int((directory / "config.json").stat().st_mtime)
        app = make_app(OneModelManager(model, tokenizer, name, created), local=host in LOOPBACK)
        address = f"[{host}]" if ":" in host else host
        console = new_console()
        console.print(
            f"Serving {name!r} at http://{address}:{listener.getsockname()[1]}/v1; Ctrl-C ends it.",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        if host not in LOOPBACK:
            console.print(f"Whoever reaches {host} may use it: there is no login.", markup=False)
        if tokenizer.chat_template is None:
            console.print("Its tokenizer has no chat template, so only /v1/completions answers.", markup=False)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def make_app(manager: OneModelManager, *, local: bool) -> Any:
    """The application of `transformers serve` around a manager, to be run by an ASGI server.

    Args:
        manager: has the model.
        local: answer only requests that name this machine, so that no web page can reach the server through a name of its
            own that leads here.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    state = GenerationState()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    async def tell(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    app.add_exception_handler(ValueError, tell)
    return app


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise OSError(
            f"{host}:{port} cannot be listened on ({reason}); give another --host or --port, or --port 0 for a "
            "free one."
        ) from error
