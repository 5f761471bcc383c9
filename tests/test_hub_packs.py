"""Packs of a memory on their own, over a Hub on this machine."""

import shutil
from pathlib import Path

import pytest
import torch
from hub_client import (
    BACKBONE,
    TEXT,
    connect,
    files_of_repository,
    make_karla,
    make_pushed_backbone,
    refuse,
    succeed,
    titles,
)
from hub_fixtures import READER
from huggingface_hub import ModelCard
from tiny import files_in, make_backbone, make_tokenizer, save_karla

from karla_hf import KarlaForCausalLM, hub


IDS = torch.tensor([make_tokenizer()(TEXT)["input_ids"]])


@pytest.fixture(scope="module")
def folder(loopback_hub, tmp_path_factory) -> Path:
    """`karla` has read two packs, `fresh` none; not to be changed."""
    root = tmp_path_factory.mktemp("hub-packs")
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, loopback_hub)
        make_pushed_backbone()
        make_karla(root / "karla", ("ferry", "vault"))
        save_karla(root / "fresh", BACKBONE)
    return root


@pytest.fixture
def api(loopback_hub, folder, monkeypatch):
    """A client that may write; this process is one too."""
    return connect(monkeypatch, loopback_hub)


@pytest.fixture
def fresh(folder, tmp_path) -> Path:
    """A Karla that has read nothing."""
    return Path(shutil.copytree(folder / "fresh", tmp_path / "fresh"))


def test_a_pack_is_pushed_and_pulled_on_its_own(folder, api, fresh):
    shown = succeed("pack", "push", folder / "karla", "ferry", "karla/ferry-pack", "--private")
    assert api.model_info("karla/ferry-pack").sha in shown
    assert api.model_info("karla/ferry-pack").private
    assert titles(api, "karla/ferry-pack") == ["Upload pack ferry", "initial commit"]
    names = files_of_repository(api, "karla/ferry-pack")
    assert {name.partition("-")[0] for name in names} == {"README.md", "manifest.json", "constants", "ferry"}
    before = KarlaForCausalLM.from_pretrained(str(fresh))(IDS).logits
    original = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    rows = original.engram.packs["ferry"].num_owned
    assert succeed("pack", "pull", fresh, "karla/ferry-pack", "--name", "boats") == (
        f"Pulled pack 'boats' with {rows} rows from karla/ferry-pack.\n"
    )
    pulled = KarlaForCausalLM.from_pretrained(str(fresh))
    assert not torch.equal(pulled(IDS).logits, before)
    assert pulled.engram.packs["boats"].num_owned == rows
    assert pulled.engram.packs["boats"].sources == ["ferry.txt"]
    pulled.forget("boats")
    assert torch.equal(pulled(IDS).logits, before)


def card_of(api, repo_id: str) -> str:
    return Path(api.hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")


def test_the_card_of_a_pack_says_how_to_add_it_until_someone_writes_another(folder, api):
    hub.push_pack(folder / "karla", "vault", "karla/vault-pack")
    card = ModelCard(card_of(api, "karla/vault-pack"))
    assert card.data.base_model == BACKBONE
    assert "engram-pack" in card.data.tags
    assert "karla pack pull DIR karla/vault-pack" in card.text
    assert "karla forget DIR vault" in card.text
    hub.push_pack(folder / "karla", "ferry", "karla/vault-pack")
    assert "karla forget DIR ferry" in card_of(api, "karla/vault-pack")
    api.upload_file(path_or_fileobj=b"# Mine\n", path_in_repo="README.md", repo_id="karla/vault-pack")
    hub.push_pack(folder / "karla", "vault", "karla/vault-pack")
    assert card_of(api, "karla/vault-pack") == "# Mine\n"


def test_pushing_another_pack_replaces_the_one_that_was_there(folder, api, fresh):
    first = hub.push_pack(folder / "karla", "ferry", "karla/replaced").oid
    hub.push_pack(folder / "karla", "vault", "karla/replaced")
    assert not any(name.startswith("ferry-") for name in files_of_repository(api, "karla/replaced"))
    assert len(titles(api, "karla/replaced")) == 3
    assert hub.pull_pack(fresh, "karla/replaced", revision=first)[0] == "ferry"
    assert hub.pull_pack(fresh, "karla/replaced")[0] == "vault"
    assert list(KarlaForCausalLM.from_pretrained(str(fresh)).engram.packs) == ["ferry", "vault"]


def test_a_pack_that_does_not_fit_is_refused(folder, api, fresh, tmp_path):
    make_backbone(hidden_size=32, num_attention_heads=2).push_to_hub("karla/narrow")
    make_tokenizer().push_to_hub("karla/narrow")
    save_karla(tmp_path / "narrow", "karla/narrow")
    hub.push_pack(folder / "karla", "ferry", "karla/fits")
    assert refuse("pack", "pull", tmp_path / "narrow", "karla/fits") == (
        "The pack in karla/fits was made with the backbone 'karla/backbone' instead of 'karla/narrow', so it does not fit "
        "this memory."
    )
    succeed("pack", "pull", fresh, "karla/fits")
    before = files_in(fresh)
    assert refuse("pack", "pull", fresh, "karla/fits") == (
        "There is a pack 'ferry' already; give another name, or forget that one first."
    )
    (rows,) = (name for name in files_of_repository(api, "karla/fits") if name.startswith("ferry-"))
    content = bytearray((fresh / "engram" / rows).read_bytes())
    content[-1] ^= 1
    api.upload_file(path_or_fileobj=bytes(content), path_in_repo=rows, repo_id="karla/fits")
    assert refuse("pack", "pull", fresh, "karla/fits", "--name", "other") == (
        f"karla/fits/{rows} is damaged (its content is not what was written); get the pack again."
    )
    assert files_in(fresh) == before


def test_packs_and_models_do_not_share_a_repository(folder, api, fresh, tmp_path):
    hub.push_pack(folder / "karla", "ferry", "karla/pack")
    hub.push(folder / "karla", "karla/model")
    assert refuse("pack", "push", folder / "karla", "ferry", "karla/model") == (
        "karla/model holds a model; give the pack a repository of its own."
    )
    assert refuse("push", folder / "karla", "karla/pack") == (
        "karla/pack holds a pack of a memory, not a model; give another repository."
    )
    assert refuse("pack", "pull", fresh, "karla/model") == (
        "karla/model holds a model; `karla pull` brings it; nothing was pulled."
    )
    assert refuse("pull", "karla/pack", tmp_path / "new") == (
        "karla/pack holds a pack of a memory; `karla pack pull` adds it to a Karla; nothing was pulled."
    )
    api.create_repo("karla/nothing")
    assert (
        refuse("pack", "pull", fresh, "karla/nothing")
        == "karla/nothing holds no pack of a memory; nothing was pulled."
    )
    assert refuse("pack", "push", folder / "karla", "none", "karla/pack") == (
        "There is no pack 'none'; the packs are ['ferry', 'vault']."
    )


def test_who_may_not_write_pushes_no_pack(folder, loopback_hub, monkeypatch):
    connect(monkeypatch, loopback_hub, READER)
    assert refuse("pack", "push", folder / "karla", "ferry", "karla/refused") == (
        "Your token may not write to karla/refused; use one that may; nothing was pushed."
    )
