"""Pushing Karlas to a Hub on this machine."""

import ast
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
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
    titles,
)
from hub_fixtures import READER, WRITER
from huggingface_hub import _commit_api, snapshot_download
from tiny import files_in, make_tokenizer, save_backbone, save_karla
from transformers import AutoTokenizer

from karla_hf import KarlaForCausalLM, hub
from karla_hf.modeling import publishing_karla


ROOT = Path(__file__).parent.parent
IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 123, 250]])
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


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


def closure(*names: str) -> set[str]:
    """File names of modules of modeling/ and of all that they import, read from their syntax trees."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if f"{name}.py" not in found:
            found.add(f"{name}.py")
            tree = ast.parse((ROOT / "modeling" / f"{name}.py").read_text(encoding="utf-8"))
            waiting += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return found


CODE = closure("modeling_karla", "configuration_karla")


def test_a_push_is_one_commit_of_exactly_what_the_checkpoint_calls_for(folder, api, tmp_path):
    karla = shutil.copytree(folder / "karla", tmp_path / "karla")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "notes.txt",
        "pytorch_model.bin",
        "reference_karla.py",
        "states.npy",
    ):
        (karla / name).write_bytes(b"not for the Hub")
    (karla / "checkpoint-3").mkdir()
    (karla / "checkpoint-3" / "rng_state.pth").write_bytes(b"not for the Hub")
    before = files_in(karla)
    shown = succeed("push", karla, "karla/exact", "--message", "A first Karla")
    assert titles(api, "karla/exact") == ["A first Karla", "initial commit"]
    assert api.model_info("karla/exact").sha in shown
    pulled = Path(snapshot_download("karla/exact"))
    weights = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert files_of_repository(api, "karla/exact") == CODE | TOKENIZER | weights | memory_files(pulled)
    assert not any("reference" in name for name in CODE)
    assert files_in(karla) == before, "a push changes nothing here"
    assert json.loads((pulled / "config.json").read_text())["ctm_packed"]
    shown = succeed("push", karla, "karla/exact")
    assert len(titles(api, "karla/exact")) == 2, "nothing has changed, so there is nothing to commit"


def test_no_path_and_no_token_is_among_what_is_pushed(folder, api, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    succeed("push", folder / "karla", "karla/clean")
    succeed("pack", "push", folder / "karla", "ferry", "karla/clean-pack")
    places = [str(folder), str(tmp_path), os.path.expanduser("~"), f"{tempfile.gettempdir()}/", str(ROOT), WRITER]
    for repository in ("karla/clean", "karla/clean-pack"):
        for name, content in files_in(Path(snapshot_download(repository))).items():
            assert [place for place in places if place.encode() in content] == [], name
    assert b"_name_or_path" not in Path(snapshot_download("karla/clean"), "config.json").read_bytes().replace(
        b"base_model_name_or_path", b""
    )
    manifest = json.loads(Path(snapshot_download("karla/clean"), "engram/manifest.json").read_text())
    assert [pack["sources"] for pack in manifest["packs"]] == [["ferry.txt"], ["vault.txt"]]


FRESH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "karla_hf":
            raise ImportError("karla_hf is not installed here")
sys.meta_path.insert(0, Block())
import json, numpy, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
found = {}
for key, name, options in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        found[key] = model(ids).logits.numpy()
base = AutoModel.from_pretrained(name, trust_remote_code=True)
with torch.no_grad():
    found["hidden"] = base(ids).last_hidden_state.numpy()
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
found["tokens"] = numpy.array(tokenizer("The ferry leaves")["input_ids"])
numpy.savez(sys.argv[3], **found)
card = open(sys.argv[4], encoding="utf-8").read()
exec(card.partition("```python\\n")[2].partition("```")[0], {})
assert "karla_hf" not in sys.modules
"""


@pytest.mark.slow
def test_a_fresh_process_without_the_package_gives_equal_logits(folder, api, loopback_hub, tmp_path):
    first = hub.push(folder / "karla", "karla/fresh").oid
    api.create_tag("karla/fresh", tag="v1", revision=first)
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    with torch.no_grad():
        expected = model(IDS).logits.numpy()
        hidden = model.model(IDS).last_hidden_state.numpy()
    model.push_to_hub("karla/sharded", max_shard_size="10KB")
    make_tokenizer().push_to_hub("karla/sharded")
    shards = [name for name in files_of_repository(api, "karla/sharded") if name.startswith("model-")]
    assert len(shards) > 2
    model.forget("ferry")
    model.push_to_hub("karla/fresh", commit_message="Without the ferry")
    with torch.no_grad():
        forgotten = model(IDS).logits.numpy()
    loads = [
        ("tag", "karla/fresh", {"revision": "v1"}),
        ("commit", "karla/fresh", {"revision": first, "code_revision": first}),
        ("main", "karla/fresh", {}),
        ("sharded", "karla/sharded", {}),
    ]
    card = snapshot_download("karla/fresh", allow_patterns="README.md")
    arguments = (str(IDS.tolist()), json.dumps(loads), str(tmp_path / "found.npz"), f"{card}/README.md")
    printed = loopback_hub.run(
        FRESH, *arguments, token=READER, HF_HOME=str(tmp_path / "home"), HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    found = np.load(tmp_path / "found.npz")
    assert (found["tag"] == expected).all()
    assert (found["commit"] == expected).all()
    assert (found["sharded"] == expected).all()
    assert (found["hidden"] == hidden).all()
    assert (found["main"] == forgotten).all()
    assert found["tokens"].tolist() == make_tokenizer()("The ferry leaves")["input_ids"]
    assert "The ferry leaves" in printed, "the card's quick start printed this"


def test_push_to_hub_takes_its_usual_arguments(folder, api):
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    commit = model.push_to_hub(
        "usual", commit_message="Mine", commit_description="In detail", private=True, token=WRITER, revision="draft",
        tags=["ferries"],
    )  # fmt: skip
    assert api.model_info("karla/usual").private
    assert titles(api, "karla/usual") == ["initial commit"], "main is as it was"
    assert commit.oid == api.model_info("karla/usual", revision="draft").sha
    assert "ferries" in api.model_info("karla/usual", revision="draft").card_data.tags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.config.ctm_packed
    again = KarlaForCausalLM.from_pretrained("karla/usual", revision="draft")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="karla/saved", commit_message="Saved")
    assert titles(api, "karla/saved") == ["Saved", "initial commit"]


def test_removed_packs_and_old_shards_are_deleted_in_the_same_commit(folder, api):
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    model.push_to_hub("karla/packs", max_shard_size="10KB")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="figure.txt", repo_id="karla/packs")
    hub.push(folder / "karla", "karla/packs", packs=["vault"], message="One pack")
    names = files_of_repository(api, "karla/packs")
    assert {name for name in names if name.startswith("model") and ".safetensors" in name} == {"model.safetensors"}
    assert names & {"figure.txt"}, "what others put there stays"
    pulled = Path(snapshot_download("karla/packs"))
    assert {name for name in names if name.startswith("engram/")} == memory_files(pulled)
    assert len(titles(api, "karla/packs")) == 4
    alone = KarlaForCausalLM.from_pretrained("karla/packs")
    model.forget("ferry")
    assert list(alone.engram.packs) == ["vault"]
    assert torch.equal(alone(IDS).logits, model(IDS).logits)
    assert refuse("push", folder / "karla", "karla/packs", "--pack", "none") == (
        "There is no pack 'none'; the packs are ['ferry', 'vault']."
    )


def test_a_backbone_that_is_a_folder_is_refused_named_or_included(folder, api, tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    karla = save_karla(tmp_path / "karla", backbone)
    sentence = refuse("push", karla, "karla/local")
    assert sentence == (
        f"The backbone is the folder '{backbone}', which only this machine has, so nobody could load what is pushed; push "
        "it to the Hub and give its name there as base_model, or include the backbone."
    )
    assert refuse("pack", "push", save_with_pack(karla), "notes", "karla/local") == sentence
    assert not api.repo_exists("karla/local"), "nothing was made"
    assert refuse("push", karla, "karla/local", "--base-model", "../x") == (
        "base_model is '../x', which is no name on the Hub; give one like `owner/name`."
    )
    expected = KarlaForCausalLM.from_pretrained(str(karla))(IDS).logits
    succeed("push", karla, "karla/named", "--base-model", BACKBONE)
    named = KarlaForCausalLM.from_pretrained("karla/named")
    assert named.config.base_model_name_or_path == BACKBONE
    assert named.engram.packs["notes"].stored["made_with"]["backbone"] == BACKBONE
    assert torch.equal(named(IDS).logits, expected)
    succeed("push", karla, "karla/whole", "--include-backbone")
    shutil.rmtree(backbone)
    whole = KarlaForCausalLM.from_pretrained("karla/whole")
    assert whole.config.base_model_name_or_path is None
    assert torch.equal(whole(IDS).logits, expected)
    assert str(tmp_path).encode() not in b"".join(files_in(Path(snapshot_download("karla/whole"))).values())


def save_with_pack(folder: Path) -> Path:
    model = KarlaForCausalLM.from_pretrained(str(folder))
    model.read("The ferry leaves.", make_tokenizer(), pack="notes", progress=False)
    model.save_memory(folder)
    return folder


def test_of_two_pushers_one_wins_and_the_other_is_told(folder, api, monkeypatch):
    hub.push(folder / "karla", "karla/race")
    fork = multiprocessing.get_context("fork")
    together, results = fork.Barrier(2), fork.SimpleQueue()
    open_repository = publishing_karla.open_repository

    def open_together(*arguments, **options):
        head = open_repository(*arguments, **options)
        together.wait(timeout=60)
        return head

    monkeypatch.setattr(publishing_karla, "open_repository", open_together)

    def push(pack):
        try:
            results.put(hub.push(folder / "karla", "karla/race", packs=[pack], message=pack).commit_message)
        except OSError as error:
            results.put(str(error))

    processes = [fork.Process(target=push, args=(pack,)) for pack in ("ferry", "vault")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = [results.get(), results.get()]
    (told,) = [result for result in found if result not in ("ferry", "vault")]
    assert told == (
        "Someone else pushed to karla/race in the meantime; pull what is there now and push again; nothing was pushed."
    )
    (winner,) = set(found) - {told}
    assert titles(api, "karla/race") == [winner, "Upload Karla", "initial commit"]
    assert list(KarlaForCausalLM.from_pretrained("karla/race").engram.packs) == [winner]


def die_before_the_commit(karla: Path) -> None:
    _commit_api._send_commit = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    hub.push(karla, "karla/killed", packs=["vault"])


def test_a_push_that_is_killed_leaves_main_as_it_was(folder, api):
    hub.push(folder / "karla", "karla/killed", packs=["ferry"])
    head = api.model_info("karla/killed").sha
    process = multiprocessing.get_context("fork").Process(target=die_before_the_commit, args=(folder / "karla",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert api.model_info("karla/killed").sha == head
    hub.push(folder / "karla", "karla/killed", packs=["vault"])
    assert list(KarlaForCausalLM.from_pretrained("karla/killed").engram.packs) == ["vault"]


def test_a_card_or_file_that_would_give_something_away_is_not_pushed(folder, api, tmp_path):
    karla = shutil.copytree(folder / "karla", tmp_path / "karla")
    (karla / "README.md").write_text(f"# Mine\n\nMade with {WRITER}.\n", encoding="utf-8")
    assert refuse("push", karla, "karla/leak") == (
        "README.md holds your Hub token, so it is not pushed; remove the token, and revoke it."
    )
    home = f"{Path.home()}/"
    (karla / "README.md").write_text(f"Made in {home}secret.\n", encoding="utf-8")
    assert refuse("push", karla, "karla/leak") == (
        f"README.md names a file below {home}, so it is not pushed; remove that path."
    )
    (karla / "README.md").write_text("# Mine\n", encoding="utf-8")
    path = karla / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"note": ["/srv/models/mine"]}), encoding="utf-8")
    assert refuse("push", karla, "karla/leak") == (
        "config.json has note '/srv/models/mine', a path on this machine, so it is not pushed; remove it."
    )
    assert not api.repo_exists("karla/leak")
    (karla / "README.md").write_text("---\nlicense: [1]\n---\n# Mine\n", encoding="utf-8")
    path.write_text(json.dumps(config), encoding="utf-8")
    assert refuse("push", karla, "karla/leak").startswith(
        "The Hub refuses the model card (Invalid metadata in README.md."
    )
    assert titles(api, "karla/leak") == ["initial commit"]
    (karla / "README.md").write_text("# Mine\n", encoding="utf-8")
    hub.push(karla, "karla/leak")
    assert Path(snapshot_download("karla/leak"), "README.md").read_text() == "# Mine\n"


def test_a_damaged_pack_is_not_pushed(folder, api, tmp_path):
    karla = shutil.copytree(folder / "karla", tmp_path / "karla")
    (rows,) = (karla / "engram").glob("ferry-*")
    rows.write_bytes(flip(rows, -1))
    assert refuse("push", karla, "karla/broken") == (
        f"The pack 'ferry' is damaged ({rows.name}); restore it, or push without it."
    )
    succeed("push", karla, "karla/broken", "--pack", "vault")


def test_the_tokenizer_loads_from_the_repository_alone(folder, api):
    hub.push(folder / "karla", "karla/tokens")
    config = json.loads(Path(snapshot_download("karla/tokens"), "tokenizer_config.json").read_text())
    assert not config.keys() & {"is_local", "local_files_only", "name_or_path"}
    assert AutoTokenizer.from_pretrained("karla/tokens").get_vocab() == make_tokenizer().get_vocab()


def test_trained_rows_and_a_head_that_cannot_be_packed_are_pushed_as_they_are(folder, api, tmp_path):
    options = {"ctm_stream_size": 66, "engram_layer_ids": [1], "engram_layer_rows_per_head": 50}
    karla = make_karla(tmp_path / "karla", **options)
    hub.push(karla, "karla/odd")
    original, pushed = KarlaForCausalLM.from_pretrained(str(karla)), KarlaForCausalLM.from_pretrained("karla/odd")
    assert not pushed.config.ctm_packed
    expected = original.state_dict()
    assert any("layer_engram" in name for name in expected)
    found = pushed.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(pushed(IDS).logits, original(IDS).logits)
