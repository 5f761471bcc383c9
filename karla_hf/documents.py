"""Real texts that are there without a network: files, package descriptions, the Python reference, a short story.

Reading a memory needs text that was not made for it. Every installed distribution carries a long description in its
metadata, the standard library carries the Python language reference, and `data/unrelated.txt` is a story that shares
no subject with either, so it shows what a memory of other things does to text it has nothing to say about.
"""

import ast
from importlib.metadata import PackageNotFoundError, metadata
from importlib.metadata import files as distribution_files
from importlib.resources import files
from pathlib import Path


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
