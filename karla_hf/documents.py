"""Real texts that are there without a network: files, package descriptions, the Python reference, a short story.

Reading a memory needs text that was not made for it. Every installed distribution carries a long description in its
metadata, the standard library carries the Python language reference, and `data/unrelated.txt` is a story that shares
no subject with either, so it shows what a memory of other things does to text it has nothing to say about.
"""

import ast
import os
from importlib.metadata import PackageNotFoundError, metadata
from importlib.metadata import files as distribution_files
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple


MOST_FILES = 1000  # of a folder
MOST_BYTES = 32 << 20  # of the texts of a folder
MOST_FILE_BYTES = 4 << 20  # of a file in a folder


class FoundTexts(NamedTuple):
    """Texts to read.

    Attributes:
        texts: texts by title, in the order of reading.
        skipped: what was left out, and why, in words that follow its name.
    """

    texts: dict[str, str]
    skipped: dict[str, str]


def read_text(path: str | Path) -> str:
    r"""Read a UTF-8 text file.

    A byte order mark at the start is dropped and every line end becomes `\n`; nothing else is changed.

    Args:
        path: the file.

    Returns:
        The text, never blank.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if the path is a directory.
        ValueError: if the file is blank, or is not UTF-8 text (the message names the byte and its line).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "note.txt").write_text("The ferry is late.", encoding="utf-8")
        ...     read_text(Path(folder, "note.txt"))
        'The ferry is late.'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the path of one UTF-8 text file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give the path of a UTF-8 text file.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data, error.start) from None
    # ASCII text in UTF-16 without a byte order mark is valid UTF-8, with a zero byte in every character.
    if "\0" in text:
        raise _not_utf8(path, data, data.index(0))
    if not text.strip():
        raise ValueError(f"{path} holds no text; give a UTF-8 file with at least one word.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def find_texts(path: str | Path) -> FoundTexts:
    """Read a text file, or all UTF-8 text files in a folder and the folders in it, sorted by path.

    Of a folder, hidden files and folders, links, files that are no text, of one word, or of more than `MOST_FILE_BYTES`
    are skipped; titles begin with its name. A file is titled by its name, and skipped is nothing.

    Raises:
        OSError: if there is no such file or folder, or it cannot be read.
        ValueError: if the file is blank or not UTF-8; if the folder holds no text, more than `MOST_FILES` files, or more
            than `MOST_BYTES` of text.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "b.txt").write_text("The second.")
        ...     _ = Path(folder, "a.md").write_text("The first.")
        ...     _ = Path(folder, "c.bin").write_bytes(b"\\xff")
        ...     found = find_texts(folder)
        >>> list(found.texts.values()), list(found.skipped.values())
        (['The first.', 'The second.'], ['is not UTF-8 text'])
    """
    path = Path(path)
    if not path.is_dir():
        return FoundTexts({path.name: read_text(path)}, {})
    found, size = FoundTexts({}, {}), 0
    for file in _files_in(path, found.skipped):
        title = (Path(path.resolve().name) / file.relative_to(path)).as_posix()
        try:
            text = read_text(file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{file} ")
            found.skipped[str(file.relative_to(path))] = str(reason).partition(";")[0].partition(":")[0]
            continue
        if len(text.split()) < 2:
            found.skipped[str(file.relative_to(path))] = "has fewer than two words"
            continue
        found.texts[title] = text
        size += len(text.encode())
        if size > MOST_BYTES:
            raise ValueError(
                f"{path} holds more than {MOST_BYTES >> 20} MB of text; read the folders in it one after the other."
            )
    if not found.texts:
        raise ValueError(f"{path} holds no text file; give a folder with UTF-8 text files.")
    return found


def _files_in(folder: Path, skipped: dict[str, str]) -> list[Path]:
    """Files that may hold a text, in order; the others go to `skipped` by their path in the folder, with the reason."""
    files: list[Path] = []

    def is_wanted(path: Path) -> bool:
        reason = None
        if path.name.startswith("."):
            reason = "is hidden"
        elif path.is_symlink():
            reason = "is a link"
        elif not path.is_dir() and not path.is_file():
            reason = "is no file"
        elif path.is_file() and path.stat().st_size > MOST_FILE_BYTES:
            reason = f"has more than {MOST_FILE_BYTES >> 20} MB"
        if reason is not None:
            skipped[str(path.relative_to(folder))] = reason
        return reason is None

    def refuse(error: OSError) -> None:
        skipped[str(Path(error.filename).relative_to(folder))] = f"cannot be opened ({error.strerror})"

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if is_wanted(Path(root, name))]
        files += [Path(root, name) for name in names if is_wanted(Path(root, name))]
        if len(files) > MOST_FILES:
            raise ValueError(
                f"{folder} holds more than {MOST_FILES:,} files; read the folders in it one after the other."
            )
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def package_description(name: str) -> str:
    """Return the long description of an installed distribution, usually its README.

    Args:
        name: the name as `pip list` shows it; upper and lower case, `-` and `_` are the same.

    Returns:
        The `Description` of the distribution's metadata in its own markup, without blank lines around it.

    Raises:
        ValueError: if no such distribution is installed, or if it has no long description.

    Example:
        >>> "safetensors" in package_description("safetensors")
        True
    """
    if not name.strip():
        raise ValueError("The name of the distribution is blank; give a name that `pip list` shows.")
    try:
        fields = metadata(name)
    except PackageNotFoundError:
        raise ValueError(
            f"No distribution named {name!r} is installed; install it with pip or give a name that `pip list` shows."
        ) from None
    if "Description" not in fields or not fields["Description"].strip():
        raise ValueError(f"The distribution {name!r} has no long description; choose another one.")
    return fields["Description"].strip()


def class_documentation(distribution: str, path: str, name: str) -> str:
    """Return the docstring of a class of an installed distribution, read from its source without importing it.

    Args:
        distribution: a name that `pip list` shows, such as "trl".
        path: the source file within it, such as "trl/trainer/sft_trainer.py".
        name: the class.

    Returns:
        The docstring, dedented.

    Raises:
        ValueError: if the distribution, the file or a docstring of the class is not there.

    Example:
        >>> class_documentation("trl", "trl/trainer/sft_trainer.py", "SFTTrainer").split(maxsplit=1)[0]
        'Trainer'
    """
    try:
        files_of_it = distribution_files(distribution) or []
    except PackageNotFoundError:
        raise ValueError(f"No distribution named {distribution!r} is installed; install it with pip.") from None
    source = next((file for file in files_of_it if file.as_posix() == path), None)
    if source is None:
        raise ValueError(f"The distribution {distribution!r} has no file {path!r}; name a file that it installs.")
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == name and ast.get_docstring(node):
            return ast.get_docstring(node) or ""
    raise ValueError(f"{path} defines no class {name!r} with a docstring; name one that has one.")


def python_reference() -> dict[str, str]:
    """Return the topics of the Python language reference that `help()` shows, e.g. "assert" or "typesseq".

    Returns:
        A new dict from the topic's name to its plain text, of the running Python's version.

    Example:
        >>> "assert_stmt" in python_reference()["assert"]
        True
    """
    # Imported here: the module is close to a megabyte of text that only this function needs.
    from pydoc_data.topics import topics

    return dict(topics)


def unrelated_text() -> str:
    """Return a short story (about 1,100 words) on a ferry and an orchard, without code, lists, markup or numbers.

    Example:
        >>> unrelated_text().split(maxsplit=2)[:2]
        ['The', 'ferry']
    """
    return (files("karla_hf") / "data" / "unrelated.txt").read_text(encoding="utf-8").strip()


def _not_utf8(path: Path, data: bytes, offset: int) -> ValueError:
    line = data.count(b"\n", 0, offset) + 1
    byte = f"byte 0x{data[offset]:02x} at offset {offset} (line {line})"
    return ValueError(f"{path} is not UTF-8 text: {byte}; convert the file to UTF-8.")
