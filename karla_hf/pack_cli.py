"""The commands `karla pack ...`: what is done with packs as a whole. None of them loads the backbone."""

from pathlib import Path
from typing import Annotated

import typer

from karla_hf.options import BaseModel, Checkpoint, JsonFile, Message, PackName, Private, Repository, Revision


pack = typer.Typer(help="List, export, import, push, pull, merge, remove or verify packs.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of an exported pack.", show_default=False)]


@pack.command("list")
def list_packs(directory: Checkpoint, json_file: JsonFile = None) -> None:
    """List the packs of the memory."""
    from karla_hf import commands

    commands.show_packs(directory, json_file)


@pack.command("export")
def export(directory: Checkpoint, name: PackName, folder: Folder) -> None:
    """Write a pack to a new folder, with all that another Karla needs to import it."""
    from karla_hf import commands

    commands.export_one(directory, name, folder)


@pack.command("import")
def import_(
    directory: Checkpoint,
    folder: Folder,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another name for the pack here.", show_default=False)
    ] = None,
) -> None:
    """Add a pack that was exported from a Karla on the same backbone.

    Its files are checked, and it is refused if it does not fit.
    """
    from karla_hf import commands

    commands.import_one(directory, folder, name)


@pack.command("push")
def push(
    directory: Checkpoint,
    name: PackName,
    repo: Repository,
    private: Private = False,
    base_model: BaseModel = None,
    revision: Revision = None,
    message: Message = None,
) -> None:
    """Push a pack to a repository of its own on the Hub, in one commit."""
    from karla_hf.hub import push_pack
    from karla_hf.report import new_console

    commit = push_pack(
        directory, name, repo, private=private, base_model=base_model, revision=revision, message=message
    )
    found = commit.repo_url.repo_id
    new_console().print(f"Pushed pack {name!r} to {found} as commit {commit.oid}.", markup=False, soft_wrap=True)


@pack.command("pull")
def pull(
    directory: Checkpoint,
    repo: Repository,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another name for the pack here.", show_default=False)
    ] = None,
    revision: Revision = None,
) -> None:
    """Add a pack from the Hub, if it was made on the same backbone.

    Its files are checked, and it is refused if it does not fit.
    """
    from karla_hf.hub import pull_pack
    from karla_hf.report import new_console

    found, rows = pull_pack(directory, repo, name=name, revision=revision)
    new_console().print(f"Pulled pack {found!r} with {rows:,} rows from {repo}.", markup=False, soft_wrap=True)


@pack.command("merge")
def merge(
    directory: Checkpoint,
    names: Annotated[list[str], typer.Argument(metavar="PACK...", help="Packs to merge.", show_default=False)],
    into: Annotated[str, typer.Option(metavar="NAME", help="Name of the result: new, or one of the packs.")],
) -> None:
    """Replace packs by one that recalls what they recall together.

    The order in which they are named makes no difference.
    """
    from karla_hf import commands

    commands.merge(directory, names, into)


@pack.command("remove")
def remove(directory: Checkpoint, name: PackName) -> None:
    """Remove a pack, as `karla forget` does."""
    from karla_hf import commands

    commands.forget_pack(directory, name)


@pack.command("verify")
def verify(directory: Checkpoint, json_file: JsonFile = None) -> None:
    """Read every file of the memory and compare it with what was written."""
    from karla_hf import commands

    commands.verify(directory, json_file)
