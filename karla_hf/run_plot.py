"""The curves of a training run, as a figure."""

from pathlib import Path

from karla_hf.figures import draw_run
from karla_hf.report import new_console
from karla_hf.runs import log_history, read_kept


def plot_run(directory: str | Path, output: Path | None = None) -> list[str]:
    """Draw what a run logged, or all phases of one; see `karla plot`.

    Args:
        directory: `output_dir` of a recipe.
        output: the PNG file; None takes `curves.png` in the folder.

    Returns:
        The titles of the panels.

    Raises:
        OSError: if there is no log.
        ValueError: if nothing was logged, or the file is no PNG.
    """
    directory = Path(directory)
    output = directory / "curves.png" if output is None else output
    if output.suffix != ".png":
        raise ValueError(f"The figure would go to {output}; give a file that ends in .png.")
    phases = (read_kept(directory) or {}).get("phases")
    if phases is None:
        histories = {directory.name: log_history(directory)}
    else:
        begun = [name for name in phases if read_kept(directory / name) is not None]
        histories = {name: log_history(directory / name) for name in begun if _has_log(directory / name)}
    panels = draw_run(histories, output)
    new_console().print(f"Drew {', '.join(panels)} to {output}.", markup=False)
    return panels


def _has_log(folder: Path) -> bool:
    try:
        return bool(log_history(folder))
    except FileNotFoundError:
        return False
