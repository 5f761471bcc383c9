"""The commands `karla eval …`. What they do is in `karla_hf.commands`."""

from pathlib import Path
from typing import Annotated

import typer

from karla_hf.options import Checkpoint, JsonFile, TextFiles


evaluate = typer.Typer(
    help="Measure recall, perplexity, reasoning, or how many ticks are needed.", no_args_is_help=True
)


@evaluate.command()
def recall(
    directory: Checkpoint,
    facts: Annotated[
        Path,
        typer.Argument(
            metavar="FACTS.jsonl", help='Lines of the form {"prompt": "…", "answer": "…"}.', show_default=False
        ),
    ],
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ask the first N facts only.", show_default=False)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Count the facts whose answer is generated exactly, greedily and from the bare prompt."""
    from karla_hf import commands

    commands.measure_recall(directory, facts, limit, json_file)


@evaluate.command()
def perplexity(
    directory: Checkpoint,
    files: TextFiles,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Look at the first N tokens of a file only.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the perplexity of each file as one context, up to the model's longest."""
    from karla_hf import commands

    commands.measure_perplexity(directory, files, max_tokens, json_file)


@evaluate.command()
def ticks(
    directory: Checkpoint,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help='Held-out UTF-8 text files, or .jsonl files with lines of the form {"prompt": "…", "answer": "…"}.',
            show_default=False,
        ),
    ],
    max_loss_rise: Annotated[
        float, typer.Option(metavar="SHARE", min=0.0, help="Most that the loss may rise against thinking all ticks.")
    ] = 0.01,
    save: Annotated[bool, typer.Option("--save", help="Write the threshold into the model's configuration.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Find the certainty at which a thought may end, with the fewest ticks at next to no loss.

    One pass with all ticks shows what every threshold would have answered. With
    --json, a figure is put beside the file.
    """
    from karla_hf import commands

    commands.calibrate_ticks(directory, files, max_rise=max_loss_rise, save=save, json_file=json_file)


@evaluate.command()
def reasoning(
    directory: Checkpoint,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Task of reasoning-gym; may be repeated.  [default: five short ones]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[int, typer.Option(metavar="N", min=2, help="Questions of each task.")] = 50,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the questions.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Ask questions of reasoning-gym, with Karla and with its bare backbone.

    Both get the same prompts, through lm-evaluation-harness: once to answer, once to
    tell the right answer from others. Needs `pip install 'karla-hf[eval]'`.
    """
    from karla_hf.reasoning import measure_reasoning

    measure_reasoning(directory, tasks or (), size=size, seed=seed, json_file=json_file)
