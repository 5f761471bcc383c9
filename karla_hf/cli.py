"""The command `karla`: its commands, options and help texts.

What a command does is in `karla_hf.commands`, `demo`, `bench` and `training`, which are imported when it runs.
"""

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from karla_hf.errors import as_sentence
from karla_hf.eval_cli import evaluate
from karla_hf.hub_cli import card, pull, push
from karla_hf.options import Checkpoint, JsonFile, TextFiles
from karla_hf.pack_cli import pack as pack_app
from karla_hf.pope_cli import pope
from karla_hf.talk_cli import chat, serve, ui


class SentenceGroup(TyperGroup):
    """Shows an error that the user can mend as one sentence on standard error, with exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a command; an error that is a bug, and any error under --debug, keeps its traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # A broken pipe is for typer, which ends quietly: the reader has seen enough.
            quiet = ctx.params["debug"] or isinstance(error, BrokenPipeError)
            sentence = None if quiet else as_sentence(error)
            if sentence is None:
                raise
            typer.secho(f"Error: {sentence}", fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="karla",
    cls=SentenceGroup,
    help="Give a frozen language model a memory that learns by reading and a head that thinks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line: the console script `karla`."""
    # On some CPUs bitsandbytes recommends, on import, a package that would fetch code from the Hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app(prog_name="karla")


def _show_version(wanted: bool) -> None:
    if wanted:
        from karla_hf import __version__

        typer.echo(f"karla-hf {__version__}")
        raise typer.Exit


MAKE, TALK, MEMORY, HUB, MEASURE, TRAIN = "Make and look", "Talk", "Memory", "Hub", "Measure", "Train"


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


@app.command(rich_help_panel=MAKE)
def new(
    backbone: Annotated[
        str, typer.Argument(metavar="BACKBONE", help="Causal LM: a name on the Hub, or a folder.", show_default=False)
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.", show_default=False)],
    quantization: Annotated[
        Literal["nf4", "int8"] | None,
        typer.Option(help="Load the backbone with 4 or 8 bits per weight.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a model option, such as ctm_num_ticks=4 or engram_rows_per_head=20000; may be repeated.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a Karla in DIR, its memory included.")] = False,
    hope: Annotated[bool, typer.Option("--hope", help="Make a HOPE; BACKBONE is a sentence encoder then.")] = False,
) -> None:
    """Put an empty memory and an untrained head on a backbone.

    The folder holds memory, head and tokenizer, and the name of the backbone.
    Until something is read or trained, it answers exactly as its backbone does.
    With --hope: fast weights and levels on a sentence encoder, all untrained.
    """
    from karla_hf import commands, hope_commands

    if hope:
        if quantization is not None:
            raise typer.BadParameter("A HOPE's encoder is not quantized; leave --quantization out.")
        hope_commands.create(
            backbone, directory, revision=revision, options=_parse_settings(settings or []), force=force
        )
        return
    commands.create(
        backbone,
        directory,
        quantization=quantization,
        revision=revision,
        options=_parse_settings(settings or []),
        force=force,
    )


@app.command(rich_help_panel=MAKE)
def info(directory: Checkpoint, json_file: JsonFile = None) -> None:
    """Show parameters, bytes on disk and in RAM, and how often each level changes."""
    from karla_hf import commands, hope_commands
    from karla_hf.checkpoints import model_kind

    show = hope_commands.show_info if model_kind(directory) == "hope" else commands.show_info
    show(directory, json_file)


for talk in (chat, ui, serve):
    app.command(rich_help_panel=TALK)(talk)


@app.command(rich_help_panel=MEMORY)
def read(
    directory: Checkpoint,
    files: TextFiles,
    pack: Annotated[str, typer.Option(metavar="NAME", help="Pack to write; made if new.")] = "default",
    context: Annotated[
        Literal["closed", "open"],
        typer.Option(
            help="closed: store what the backbone would not know without the text. "
            "open: store only what surprises it in its context."
        ),
    ] = "closed",
    lines: Annotated[bool, typer.Option("--lines", help="Every line that is not empty is a text of its own.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Read texts once and keep what was surprising in a pack of the memory.

    All files are checked before the first is read. The memory is saved at the
    end, whole or not at all.
    """
    from karla_hf import commands

    commands.read_files(directory, files, pack=pack, context=context, by_line=lines, json_file=json_file)


@app.command(rich_help_panel=MEMORY)
def forget(
    directory: Checkpoint,
    name: Annotated[
        str | None, typer.Argument(metavar="[PACK]", help="Pack to remove, or to unlearn in.", show_default=False)
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", metavar="FILE", help="UTF-8 text file to unlearn; may be repeated.", show_default=False
        ),
    ] = None,
) -> None:
    """Remove a pack from the memory; the others keep what they hold.

    With --text, unlearn texts instead: they become unlikely again.
    """
    from karla_hf import commands

    if texts:
        commands.forget_texts(directory, texts, pack=name or "default")
    elif name is None:
        raise typer.BadParameter("Name the pack to remove, or the texts to unlearn with --text FILE.")
    else:
        commands.forget_pack(directory, name)


@app.command(rich_help_panel=MEMORY)
def packs(directory: Checkpoint, json_file: JsonFile = None) -> None:
    """List the packs of the memory."""
    from karla_hf import commands

    commands.show_packs(directory, json_file)


app.add_typer(pack_app, name="pack", rich_help_panel=MEMORY)
for hub_command in (push, pull, card):
    app.command(rich_help_panel=HUB)(hub_command)
app.add_typer(evaluate, name="eval", rich_help_panel=MEASURE)


@app.command(rich_help_panel=MEASURE)
def bench(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Benchmarks, or all.", show_default=False)],
    json_file: JsonFile = None,
) -> None:
    """Measure Karla against what it replaces: speeds, or what is known after reading.

    Speeds are timed in turn in this process. Benchmarks that draw a figure put
    it beside the file of --json.
    """
    from karla_hf.bench import run_bench

    run_bench(names, json=json_file)


@app.command(rich_help_panel=MEASURE)
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = Path("karla-demo"),
    json_file: JsonFile = None,
) -> None:
    """Read a document and 40 made-up facts on SmolLM2-135M, and compare before and after."""
    from karla_hf.demo import run_demo

    run_demo(output, json=json_file)


@app.command(rich_help_panel=TRAIN, context_settings={"ignore_unknown_options": True})
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="YAML file, such as those in recipes/.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="--KEY VALUE", help="Keys of the recipe to replace.", show_default=False),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Replace keys by those under `quick` in the recipe, to see that all works.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train as a recipe says: the head with TRL, and compare its loss on held-out rows with the backbone's.

    The recipe's `phase` says what: the head on texts (warm-up, the default),
    on problems (pope), with adaptive computation (fine-tune), the three as one
    job (all), a HOPE on texts (hope), or an experiment such as modular-addition.
    Options after the recipe replace its keys: --max_steps 20, --epochs 2.
    """
    from karla_hf.phases import run
    from karla_hf.report import write_json

    write_json(json_file, run(recipe, overrides or [], quick=quick))


@app.command(rich_help_panel=TRAIN)
def plot(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Where the figure goes.  [default: RUN/curves.png]", show_default=False),
    ] = None,
) -> None:
    """Draw what a run logged: loss, learning rate, ticks, certainty, success, grokking."""
    from karla_hf.run_plot import plot_run

    plot_run(directory, output)


app.add_typer(pope, name="pope", rich_help_panel=TRAIN)


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    """Turn KEY=VALUE texts into options, the values read as YAML."""
    import yaml

    parsed: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise ValueError(f"--set was given {setting!r}, but it takes KEY=VALUE, such as ctm_num_ticks=4.")
        if key in parsed:
            raise ValueError(f"--set was given {key!r} twice; give it once.")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key} is given {value!r}, which is not YAML; quote or mend it.") from error
    return parsed
