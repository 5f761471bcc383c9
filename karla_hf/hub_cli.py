"""The commands `karla push`, `karla pull` and `karla card`. What they do is in `karla_hf.hub` and `karla_hf.card`."""

from pathlib import Path
from typing import Annotated

import typer

from karla_hf.options import BaseModel, Checkpoint, Message, Private, Repository, Revision


Results = Annotated[
    list[str] | None,
    typer.Option(
        "--eval",
        metavar="[OWNER/DATASET=]FILE",
        help="JSON file of `karla eval`, `karla bench` or `karla train`, and the data set on the Hub that it measured on; "
        "may be repeated.",
        show_default=False,
    ),
]
Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="NAME",
        help="Data set on the Hub that it was trained on; may be repeated.",
        show_default=False,
    ),
]
License = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Licence of what is published.", show_default="apache-2.0, the code's"),
]


def push(
    directory: Checkpoint,
    repo: Repository,
    private: Private = False,
    packs: Annotated[
        list[str] | None,
        typer.Option("--pack", metavar="NAME", help="Push this pack only; may be repeated.", show_default=False),
    ] = None,
    include_backbone: Annotated[
        bool, typer.Option("--include-backbone", help="Push the backbone's weights too.")
    ] = False,
    base_model: BaseModel = None,
    revision: Revision = None,
    message: Message = None,
    results: Results = None,
    datasets: Datasets = None,
    license: License = None,
) -> None:
    """Push a Karla to the Hub in one commit: memory, packed head, code, tokenizer, card.

    Of the backbone only the name is pushed. Packs that DIR no longer has are
    deleted there. A README.md in DIR is the card; without one, a card is made,
    unless REPO has one that was written by hand or with numbers.
    """
    from karla_hf.card_results import read_measured
    from karla_hf.hub import push as run
    from karla_hf.report import new_console

    commit = run(
        directory, repo, private=private, packs=packs or None, revision=revision, message=message,
        include_backbone=include_backbone, base_model=base_model,
        measured=read_measured(results) if results else None, datasets=datasets or (), license=license,
    )  # fmt: skip
    name = commit.repo_url.repo_id
    new_console().print(f"Pushed {directory} to {name} as commit {commit.oid}.", markup=False, soft_wrap=True)


def pull(
    repo: Repository,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New folder.", show_default=False)],
    revision: Revision = None,
) -> None:
    """Bring a Karla from the Hub into a new folder, checked, whole or not at all.

    None of the repository's code is run; the commands use the installed one.
    """
    from karla_hf.hub import pull as run
    from karla_hf.report import new_console

    commit = run(repo, directory, revision=revision)
    new_console().print(f"Pulled {repo} at commit {commit} into {directory}.", markup=False, soft_wrap=True)


def card(
    directory: Checkpoint,
    repo: Repository,
    results: Results = None,
    datasets: Datasets = None,
    license: License = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the card in DIR.")] = False,
) -> None:
    """Write a model card for REPO into DIR, as README.md, with measured numbers."""
    from karla_hf.card import make_card
    from karla_hf.card_results import read_measured
    from karla_hf.report import new_console

    measured = read_measured(results) if results else None
    names = make_card(directory, repo, measured=measured, datasets=datasets or (), license=license, force=force)
    new_console().print(f"Wrote {', '.join(names)} in {directory}.", markup=False, soft_wrap=True)
