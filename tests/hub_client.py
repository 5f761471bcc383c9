"""This process as a client of the loopback Hub, and Karlas for it to push."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import transformers.utils.hub
from hub_fixtures import WRITER, RunningHub
from huggingface_hub import HfApi, constants
from tiny import make_backbone, make_tokenizer, save_karla, speak
from typer.testing import CliRunner

from karla_hf import KarlaForCausalLM, cli


BACKBONE = "karla/backbone"
TEXT = "The ferry leaves Brivo at seven. The code of the vault is 481-077."


def connect(patch: pytest.MonkeyPatch, hub: RunningHub, token: str | None = WRITER) -> HfApi:
    """Reach `hub` with `token` from here, as if the environment had been set before any import, until `patch` is undone."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(hub.home / "hub"))
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    patch.setattr(transformers.utils.hub, "_hf_api", None)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
    return HfApi(endpoint=hub.url, token=token or False)


def make_pushed_backbone() -> None:
    """Put the tiny backbone on the Hub, as the backbones of users are."""
    make_backbone().push_to_hub(BACKBONE)
    make_tokenizer().push_to_hub(BACKBONE)


def make_karla(folder: Path, packs: tuple[str, ...] = ("ferry",), **options) -> Path:
    """A Karla on the pushed backbone, whose head speaks and whose packs have read; returns the folder."""
    save_karla(folder, BACKBONE, **options)
    model = speak(KarlaForCausalLM.from_pretrained(str(folder)))
    for pack in packs:
        model.read(
            f"{TEXT} This is {pack}.", make_tokenizer(), pack=pack, title=str(folder / f"{pack}.txt"), progress=False
        )
    model.save_pretrained(folder)
    return folder


def run(*arguments: object):
    """Run `karla` in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """Run `karla`, see that it succeeds, and return what it prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    """Run `karla`, see that it fails with a sentence, and return the sentence."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert "Traceback" not in result.stderr
    return line.partition("Error: ")[2]


def files_of_repository(api: HfApi, repo_id: str, revision: str | None = None) -> set[str]:
    """Names of a repository's files, without the one that every repository has."""
    return set(api.list_repo_files(repo_id, revision=revision)) - {".gitattributes"}


def titles(api: HfApi, repo_id: str) -> list[str]:
    """First lines of the commits, the newest first."""
    return [commit.title for commit in api.list_repo_commits(repo_id)]


def memory_files(folder: Path) -> set[str]:
    """The memory's files as its manifest names them, read without the package."""
    manifest = json.loads((folder / "engram" / "manifest.json").read_text(encoding="utf-8"))
    tables = [table for pack in manifest["packs"] for level in pack["levels"] for table in level["tables"]]
    names = {manifest["constants"]["file"], *(file["file"] for table in tables for file in table["files"])}
    return {"engram/manifest.json", *(f"engram/{name}" for name in names)}


def flip(path: Path, at: int) -> bytes:
    """A file's content with one bit changed in the byte `at`."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    return bytes(content)
