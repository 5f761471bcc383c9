import os
import re
from importlib.metadata import distributions

import pytest

from karla_hf import documents
from karla_hf.documents import find_texts, package_description, python_reference, read_text, unrelated_text


def test_text_is_read_as_it_is(tmp_path):
    (tmp_path / "note.txt").write_bytes("\n  Die Fähre\tfährt.\u2028 \n".encode())
    assert read_text(tmp_path / "note.txt") == "\n  Die Fähre\tfährt.\u2028 \n"
    assert read_text(str(tmp_path / "note.txt")) == read_text(tmp_path / "note.txt")


def test_byte_order_mark_and_line_ends_are_normalized(tmp_path):
    (tmp_path / "note.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "note.txt") == "one\ntwo\nthree\n"


def test_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^There is no file .*note\.txt; give the path of a UTF-8 text file\.$"
    ):
        read_text(tmp_path / "note.txt")


def test_directory(tmp_path):
    with pytest.raises(IsADirectoryError, match=rf"^{re.escape(str(tmp_path))} is a directory; give the path of one"):
        read_text(tmp_path)


@pytest.mark.parametrize("content", [b"", b" \r\n\t", b"\xef\xbb\xbf\n"])
def test_file_without_text(tmp_path, content):
    (tmp_path / "note.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"note\.txt holds no text; give a UTF-8 file with at least one word"):
        read_text(tmp_path / "note.txt")


@pytest.mark.parametrize(
    ("content", "byte", "offset", "line"),
    [
        ("first\nFähre".encode("latin-1"), "e4", 7, 2),
        ("ferry".encode("utf-16"), "ff", 0, 1),
        ("ferry".encode("utf-16-le"), "00", 1, 1),
        (b"\xef\xbb\xbfab\n\n\x80", "80", 7, 3),
        (b"%PDF-1.7\n\xb5\xed", "b5", 9, 2),
        ("Fähre".encode()[:2], "c3", 1, 1),
    ],
)
def test_other_encoding_names_the_byte(tmp_path, content, byte, offset, line):
    (tmp_path / "note.txt").write_bytes(content)
    message = (
        rf"note\.txt is not UTF-8 text: byte 0x{byte} at offset {offset} \(line {line}\); convert the file to UTF-8"
    )
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "note.txt")


@pytest.mark.parametrize("name", ["trl", "peft", "dill", "multiprocess"])
def test_description_is_a_long_text_about_the_package(name):
    text = package_description(name)
    assert len(text.split()) > 300
    assert name in text.lower()
    assert text == text.strip()


def test_spelling_of_the_name_does_not_matter():
    assert package_description("Huggingface-Hub") == package_description("huggingface_hub")


def test_description_header_and_body_are_the_same_text(tmp_path, monkeypatch):
    for name, rest in [
        ("inbody", "\nA ferry.\n\nAn orchard.\n"),
        ("inheader", "Description: A ferry.\n        \n        An orchard.\n"),
    ]:
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{rest}", encoding="utf-8"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_description("inbody") == package_description("inheader") == "A ferry.\n\nAn orchard."


@pytest.mark.parametrize("name", ["no-such-thing-here", "not a name!"])
def test_package_that_is_not_installed(name):
    message = (
        f"^No distribution named '{name}' is installed; install it with pip or give a name that `pip list` shows.$"
    )
    with pytest.raises(ValueError, match=message):
        package_description(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_blank_package_name(name):
    with pytest.raises(ValueError, match="name of the distribution is blank"):
        package_description(name)


def test_package_without_description(tmp_path, monkeypatch):
    (tmp_path / "bare-1.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: bare\nVersion: 1.0\n"
    (tmp_path / "bare-1.0.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "bare" in {distribution.name for distribution in distributions()}
    with pytest.raises(ValueError, match="The distribution 'bare' has no long description"):
        package_description("bare")


def test_python_reference_holds_the_language():
    topics = python_reference()
    assert {"assert", "class", "typesseq", "formatstrings"} <= set(topics)
    assert sum(len(text.split()) for text in topics.values()) > 50_000
    assert all(text.strip() for text in topics.values())


def test_python_reference_is_a_copy():
    python_reference().clear()
    assert python_reference()


def test_unrelated_text_is_plain_prose():
    text = unrelated_text()
    assert 900 <= len(text.split()) <= 1100
    assert set(re.sub(r"[A-Za-z]", "", text)) <= set(" \n.,;:'\"?-")
    assert all(len(paragraph) > 30 for paragraph in text.split("\n\n"))


def test_unrelated_text_shares_no_wording_with_the_descriptions():
    def runs(text, length=8):
        tokens = re.findall(r"\w+", text.lower())
        return {tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)}

    story = runs(unrelated_text())
    others = [package_description(name) for name in ("trl", "peft", "dill", "multiprocess")]
    assert len(story) > 900
    assert not any(story & runs(text) for text in [*others, *python_reference().values()])


def test_texts_of_a_folder_are_sorted_and_the_rest_is_named(tmp_path):
    folder = tmp_path / "notes"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("Not a note.")
    (folder / "b.txt").write_text("The fourth text.")
    (folder / "b" / "z.txt").write_text("The third text.")
    (folder / "b" / "deep" / "a.txt").write_text("The second text.")
    (folder / "a.md").write_text("The first text.")
    (folder / "one.txt").write_text("word")
    (folder / "blank.txt").write_text("\n")
    (folder / "photo.png").write_bytes(b"\x89PNG")
    (folder / "link.txt").symlink_to(folder / "a.md")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    with open(folder / "huge.txt", "wb") as file:
        file.truncate(documents.MOST_FILE_BYTES + 1)
    found = find_texts(folder)
    assert list(found.texts.items()) == [
        ("notes/a.md", "The first text."),
        ("notes/b/deep/a.txt", "The second text."),
        ("notes/b/z.txt", "The third text."),
        ("notes/b.txt", "The fourth text."),
    ]
    assert found.skipped == {
        ".git": "is hidden",
        "blank.txt": "holds no text",
        "huge.txt": "has more than 4 MB",
        "link.txt": "is a link",
        "one.txt": "has fewer than two words",
        "photo.png": "is not UTF-8 text",
        "pipe": "is no file",
        "round": "is a link",
    }
    assert find_texts(folder / "a.md") == ({"a.md": "The first text."}, {})


def test_too_large_a_folder_is_refused(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("Some words. " * 10)
    monkeypatch.setattr(documents, "MOST_FILES", 2)
    with pytest.raises(ValueError, match=r"holds more than 2 files; read the folders in it one after the other\.$"):
        find_texts(tmp_path)
    monkeypatch.setattr(documents, "MOST_FILES", 3)
    assert len(find_texts(tmp_path).texts) == 3
    monkeypatch.setattr(documents, "MOST_BYTES", 300)
    with pytest.raises(
        ValueError, match=r"holds more than 0 MB of text; read the folders in it one after the other\.$"
    ):
        find_texts(tmp_path)


def test_folder_without_text_is_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"holds no text file; give a folder with UTF-8 text files\.$"):
        find_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        find_texts(tmp_path / "no")
