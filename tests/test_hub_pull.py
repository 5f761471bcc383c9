"""Pulling Karlas from a Hub on this machine, and what it refuses."""

from pathlib import Path

import pytest
import torch
from hub_client import (
    BACKBONE,
    connect,
    files_of_repository,
    flip,
    make_karla,
    make_pushed_backbone,
    memory_files,
    refuse,
    succeed,
)
from hub_fixtures import READER, STRANGER
from huggingface_hub import constants, snapshot_download
from tiny import files_in

from karla_hf import KarlaForCausalLM, hub


IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 123, 250]])


@pytest.fixture(scope="module")
def folder(loopback_hub, tmp_path_factory) -> Path:
    """A Karla with two packs in `karla`, on a backbone that is on the Hub; not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, loopback_hub)
        make_pushed_backbone()
        make_karla(root / "karla", ("ferry", "vault"))
    return root


@pytest.fixture
def api(loopback_hub, folder, monkeypatch):
    """A client that may write; this process is one too."""
    return connect(monkeypatch, loopback_hub)


def test_a_pull_brings_a_karla_that_the_commands_take(folder, api, tmp_path):
    first = hub.push(folder / "karla", "karla/pulled").oid
    api.upload_file(path_or_fileobj=b"pickle", path_in_repo="training_args.bin", repo_id="karla/pulled")
    api.create_tag("karla/pulled", tag="v1", revision=first)
    hub.push(folder / "karla", "karla/pulled", packs=["vault"])
    assert first in succeed("pull", "karla/pulled", tmp_path / "tagged", "--revision", "v1")
    assert files_in(tmp_path / "tagged").keys() == files_of_repository(api, "karla/pulled", first)
    (tmp_path / "new").mkdir()
    succeed("pull", "karla/pulled", tmp_path / "new")
    assert not (tmp_path / "new" / "training_args.bin").exists()
    assert "ferry" in succeed("info", tmp_path / "tagged")
    assert "ferry" not in succeed("packs", tmp_path / "new")
    succeed("pack", "verify", tmp_path / "tagged")
    original = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    assert torch.equal(KarlaForCausalLM.from_pretrained(str(tmp_path / "tagged"))(IDS).logits, original(IDS).logits)
    before = files_in(tmp_path / "new")
    assert refuse("pull", "karla/pulled", tmp_path / "new") == (
        f"{tmp_path / 'new'} is there already; give a new or an empty folder."
    )
    assert files_in(tmp_path / "new") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "tagged"]


def test_a_damaged_repository_is_not_pulled(folder, api, tmp_path):
    hub.push(folder / "karla", "karla/damaged")
    good = api.model_info("karla/damaged").sha
    snapshot = Path(snapshot_download("karla/damaged"))
    (rows,) = (name for name in memory_files(snapshot) if name.startswith("engram/ferry"))

    def damage(name: str, content: bytes) -> str:
        commit = api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="karla/damaged")
        return refuse("pull", "karla/damaged", tmp_path / "it", "--revision", commit.oid)

    assert damage(rows, flip(snapshot / rows, -1)) == (
        f"karla/damaged is damaged ({rows.removeprefix('engram/')}: its content is not what was written); nothing was pulled."
    )
    api.upload_file(path_or_fileobj=(snapshot / rows).read_bytes(), path_in_repo=rows, repo_id="karla/damaged")
    assert "is damaged (" in damage("model.safetensors", flip(snapshot / "model.safetensors", 3))
    api.upload_file(
        path_or_fileobj=str(snapshot / "model.safetensors"), path_in_repo="model.safetensors", repo_id="karla/damaged"
    )
    manifest = (snapshot / "engram/manifest.json").read_text().replace(rows.removeprefix("engram/"), "../../" + rows)
    assert "is damaged (engram/manifest.json is no manifest" in damage("engram/manifest.json", manifest.encode())
    assert refuse("pull", "karla/damaged", tmp_path / "it").endswith("; nothing was pulled.")
    assert list(tmp_path.iterdir()) == []
    succeed("pull", "karla/damaged", tmp_path / "it", "--revision", good)


def test_what_the_hub_refuses_is_one_sentence(folder, api, loopback_hub, tmp_path, monkeypatch):
    hub.push(folder / "karla", "karla/private", private=True)
    hub.push(folder / "karla", "karla/public")
    karla, new = folder / "karla", tmp_path / "new"
    login = "log in with `hf auth login` or set HF_TOKEN"
    missing = "that you may read; check the name, and for a private one " + login
    assert refuse("pull", "karla/public", new, "--revision", "v9") == (
        "karla/public has no revision 'v9'; give a branch, tag or commit of it; nothing was pulled."
    )
    assert refuse("pull", "karla/none", new) == f"The Hub has no karla/none {missing}; nothing was pulled."
    assert (
        refuse("pull", BACKBONE, new) == f"{BACKBONE} holds a model of type 'llama', not a Karla; nothing was pulled."
    )
    api.create_repo("karla/empty")
    assert refuse("pull", "karla/empty", new) == "karla/empty holds no Karla; nothing was pulled."
    bad = "give `owner/name` of letters, digits, '-', '_' and '.'"
    assert refuse("pull", "a b", new) == f"'a b' is no name of a repository; {bad}; nothing was pulled."
    assert refuse("push", karla, "a//b") == f"'a//b' is no name of a repository; {bad}; nothing was pushed."
    assert "is no folder" in refuse("push", tmp_path / "nowhere", "karla/public")
    for token, sentence in (
        (READER, "Your token may not write to karla/public; use one that may"),
        (STRANGER, "Your token may not write to karla/public; use one that may"),
        ("hf_wrong", f"The Hub wants a token that may write to karla/public; {login}"),
        (None, f"The Hub wants a token that may write to karla/public; {login}"),
    ):
        connect(monkeypatch, loopback_hub, token)
        assert refuse("push", karla, "karla/public") == f"{sentence}; nothing was pushed."
        if token in (STRANGER, None):
            assert (
                refuse("pull", "karla/private", new) == f"The Hub has no karla/private {missing}; nothing was pulled."
            )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = "HF_HUB_OFFLINE is set, so karla/public cannot be reached; unset it and try again"
    assert refuse("push", karla, "karla/public") == f"{offline}; nothing was pushed."
    assert refuse("pull", "karla/public", new) == f"{offline}; nothing was pulled."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refuse("pull", "karla/public", new) == (
        "The Hub does not answer (ConnectError); check the network and try again; nothing was pulled."
    )
    assert not new.exists()
