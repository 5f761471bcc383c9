"""The commands that talk to a Karla: `karla chat`, `karla ui` and `karla serve`."""

from typing import Annotated

import typer

from karla_hf.options import Checkpoint


def chat(
    directory: Checkpoint,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Talk to a Karla or a HOPE; /help in the session lists what else it does.

    Uses the tokenizer's chat template, or continues the text if there is none.
    What /read and /forget do to the memory is saved at once. A HOPE learns what
    you say after /learn on. Lines typed at a terminal are kept for the arrow keys;
    /history says where.
    """
    from karla_hf import commands, hope_commands
    from karla_hf.checkpoints import model_kind

    talk = hope_commands.chat if model_kind(directory) == "hope" else commands.chat
    talk(directory, max_new_tokens)


def ui(
    directory: Checkpoint,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 7860,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Open a web page to talk to a Karla or a HOPE, on this machine only.

    It reads files that are dropped on it, shows and forgets packs, and draws
    ticks and certainty over the answers. Ctrl-C ends it. Needs karla-hf[ui].
    """
    from karla_hf import commands

    commands.open_page(directory, port, max_new_tokens)


def serve(
    directory: Checkpoint,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    ticks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most ticks per token.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", min=0.0, max=1.0, help="Certainty at which a token is answered.", show_default=False
        ),
    ] = None,
) -> None:
    """Answer OpenAI-compatible requests (the server of `transformers serve`), with the memory on.

    Clients call the model by the folder's name. Requests are answered in turn, and
    nothing is written. Needs `pip install 'karla-hf[serve]'`.
    """
    from karla_hf.serve import run_server

    run_server(directory, host=host, port=port, ticks=ticks, threshold=threshold)
