import ast
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id

from karla_hf import KarlaConfig
from karla_hf.documents import read_text
from karla_hf.errors import as_sentence
from karla_hf.facts import make_facts


ROOT = Path(__file__).parent.parent


def caught(function) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.value


def test_errors_of_this_package_are_sentences(tmp_path):
    assert as_sentence(caught(lambda: make_facts(0))) == (
        "`count` is 0, but it must be 1 to 10,000; choose a number in that range."
    )
    missing = tmp_path / "none.txt"
    assert as_sentence(caught(lambda: read_text(missing))) == (
        f"There is no file {missing}; give the path of a UTF-8 text file."
    )


def test_the_systems_errors_name_the_file(tmp_path):
    assert (
        as_sentence(caught(lambda: (tmp_path / "none").read_text())) == f"{tmp_path}/none: No such file or directory."
    )


def test_several_lines_become_one():
    assert as_sentence(OSError("The Hub says:\n  no such model.")) == "The Hub says: no such model."


def test_what_the_hub_answers_is_one_sentence():
    response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.example/api/models/a/b?token=secret"))
    assert as_sentence(caught(lambda: hf_raise_for_status(response))) == (
        "The Hub answers HTTP 404 for /api/models/a/b; check the name, and that your token may do this."
    )
    sentence = as_sentence(caught(lambda: validate_repo_id("a//b")))
    assert sentence.startswith("Repo id must be in the form")
    assert sentence.endswith(".")


def test_the_check_of_a_configuration_says_what_is_wrong():
    error = caught(lambda: KarlaConfig(ctm_num_ticks=0))
    assert isinstance(error, StrictDataclassClassValidationError)
    assert as_sentence(error) == "`ctm_num_ticks` is 0; give 1 or more."


@pytest.mark.parametrize(
    "bug",
    [
        lambda: int("x"),
        lambda: {}["x"],
        lambda: 1 / 0,
        lambda: __import__("no_such_module"),
        lambda: make_facts("four"),  # a TypeError within the package
        lambda: KarlaConfig(ctm_num_ticks="four"),  # a TypeError within a check
    ],
    ids=["value", "key", "arithmetic", "import", "type", "check"],
)
def test_bugs_are_no_sentences(bug):
    assert as_sentence(caught(bug)) is None


def test_an_error_raised_elsewhere_is_no_sentence_of_ours():
    def raise_one():
        raise ValueError("Not ours.")

    assert as_sentence(caught(raise_one)) is None


def raised_messages(path: Path) -> list[tuple[int, str]]:
    """The last literal part of what each `raise ValueError(...)` or `raise KeyError(...)` outside of `try:` says."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {
        inner for node in ast.walk(tree) if isinstance(node, ast.Try) for part in node.body for inner in ast.walk(part)
    }
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError" | "KeyError"), args=[message, *_])) if (
                node not in tried
            ):
                last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
                found.append((node.lineno, last.value if isinstance(last, ast.Constant) else ""))
    return found


FILES = [*(ROOT / "modeling").glob("[!r]*.py"), *(ROOT / "karla_hf").glob("*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_deliberate_messages_are_whole_sentences(path):
    """`as_sentence` tells them by their end from what Python says."""
    assert [(line, end) for line, end in raised_messages(path) if end and not end.endswith((".", "?"))] == []
