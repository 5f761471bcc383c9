"""Arguments and options that several commands of `karla` take."""

from pathlib import Path
from typing import Annotated

import typer


def check_json_file(path: Path | None) -> Path | None:
    """Refuse a file that cannot be made before anything is measured for it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise typer.BadParameter(f"{path} cannot be written; give a file in a folder that exists.")
    return path


Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a Karla.", show_default=False)]
TextFiles = Annotated[list[Path], typer.Argument(metavar="FILE", help="UTF-8 text files.", show_default=False)]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the numbers to FILE too.",
        callback=check_json_file,
        show_default=False,
    ),
]
PackName = Annotated[str, typer.Argument(metavar="PACK", help="Pack of the memory.", show_default=False)]
Repository = Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.", show_default=False)]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub; main if not given.", show_default=False),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Message = Annotated[str | None, typer.Option(metavar="TEXT", help="First line of the commit.", show_default=False)]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The backbone's name on the Hub, if DIR knows it by a folder.", show_default=False
    ),
]
