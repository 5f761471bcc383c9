"""The commands `karla pack ...`: what is done with packs as a whole. None of them loads the backbone."""

from pathlib import Path
from typing import Annotated

import typer

from karla_hf.options import Checkpoint, JsonFile, PackName


pack = typer.Typer(help="List, export, import, merge, remove or verify packs of the memory.", no_args_is_help=True)
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
