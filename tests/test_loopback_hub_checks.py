"""What the loopback Hub refuses: bad cards, paths that leave the repository, requests that are none, other machines."""

import json
import shutil
import subprocess
import sys
from urllib.parse import quote

import pytest
from hub_fixtures import TESTS, regular_file


def check_cards(cards):
    import yaml
    from huggingface_hub import HfApi, ModelCard

    api, found = HfApi(), {"pushed": {}, "validated": {}}
    api.create_repo("karla/cards")
    for name, text in cards.items():
        try:
            api.upload_file(repo_id="karla/cards", path_or_fileobj=text.encode(), path_in_repo="README.md")
            found["pushed"][name] = "valid"
        except ValueError as error:
            found["pushed"][name] = str(error)
        try:
            card = ModelCard(text)
        except (ValueError, yaml.YAMLError):  # the client does not get as far as asking the server
            continue
        try:
            card.validate()
            found["validated"][name] = "valid"
        except ValueError as error:
            found["validated"][name] = str(error)
    return found


METRIC = "{type: accuracy, value: 0.5}"
RESULTS = "model-index:\n- name: karla\n  results:\n  - task: {type: text-generation}\n    "
CARDS = {
    "full": "license: mit\nbase_model: a/b\ntags: [x, y]\nlanguage: en\n"
    + RESULTS + "dataset: {type: facts, name: Facts}\n    metrics: [" + METRIC + "]\n",
    "a licence of TRL": "licence: license\nlibrary_name: transformers\n",
    "a date": "date: 2026-01-02\n",
    "no string": "license: [1]\n",
    "no list of strings": "tags: [1, 2]\n",
    "no results": "model-index:\n- name: karla\n",
    "no data set": RESULTS + "metrics: [" + METRIC + "]\n",
    "no value": RESULTS + "dataset: {type: facts, name: Facts}\n    metrics: [{type: accuracy}]\n",
    "no JSON": "loss: .nan\n",
    "no mapping": "- a\n- b\n",
    "no mapping, no YAML": "a: [\n",
}  # fmt: skip
REFUSED_BY_THE_CLIENT = ["no results", "no data set", "no value", "no mapping", "no mapping, no YAML"]
COMPLAINTS = {
    "no string": '"license" must be a string or a list of strings',
    "no list of strings": '"tags" must be a string or a list of strings',
    "no results": '"model-index[0].results" must be an array',
    "no data set": '"model-index[0].results[0].dataset.type" is required',
    "no value": '"model-index[0].results[0].metrics" must be an array of {type, value}',
    "no JSON": "cannot be shown as JSON",
    "no mapping": "must be a mapping, not a list",
    "no mapping, no YAML": "is not YAML",
}


def test_cards_are_checked_before_and_at_the_commit(loopback_hub):
    cards = {name: f"---\n{metadata}---\n# A model\n" for name, metadata in CARDS.items()}
    found = loopback_hub.call(check_cards, cards=cards)
    assert list(found["pushed"]) == list(CARDS)
    assert list(found["validated"]) == [name for name in CARDS if name not in REFUSED_BY_THE_CLIENT]
    for name, verdict in [*found["pushed"].items(), *found["validated"].items()]:
        assert COMPLAINTS.get(name, "valid") in verdict.replace('\\"', '"'), name
    for name, card in cards.items():
        status, headers, _ = loopback_hub.commit("cards", regular_file("README.md", card.encode()))
        assert status == (400 if name in COMPLAINTS else 200), name
        assert loopback_hub.head("cards")
        assert COMPLAINTS.get(name, "") in headers.get("X-Error-Message", ""), name


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ("- dataset: {id: karla/facts, task_id: default}\n  value: 0.5\n", 200),
        ("- dataset: {id: karla/facts, task_id: default}\n", 400),
        ("- dataset: {id: karla/facts}\n  value: 0.5\n", 400),
        ("dataset: {id: karla/facts, task_id: default}\n", 400),
        ("- [", 400),
    ],
)
def test_results_files_are_checked(loopback_hub, results, status):
    name = f"results-{abs(hash(results))}"
    loopback_hub.create(name)
    assert loopback_hub.commit(name, regular_file(".eval_results/facts.yaml", results.encode()))[0] == status


UNPAIRED = "\ud800"  # half of a character: JSON can say it, UTF-8 cannot
ESCAPES = ["../x", "a/../x", "/x", "a//x", "a/./x", ".git/config", "a/.GIT/x", ".git./x", "a\\x", "a\nx", "a\0x", "", "a/", UNPAIRED]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leaves_the_repository(loopback_hub, path):
    api, head = "/api/models/karla/paths", loopback_hub.create("paths")
    files = {"files": [{"path": path, "sample": "", "size": 0}]}
    assert loopback_hub.ask("POST", f"{api}/preupload/main", files)[0] == 400
    large = {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": "0" * 64, "size": 7}}
    deleted = {"key": "deletedFile", "value": {"path": path}}
    for operation in (regular_file(path, b"x"), large, deleted):
        status, headers, _ = loopback_hub.commit("paths", regular_file("good.txt", b"x"), operation)
        assert status == 400
        assert "is not a relative path" in headers["X-Error-Message"]
    assert loopback_hub.head("paths") == head


@pytest.mark.parametrize("path", [path for path in ESCAPES if path not in ("", UNPAIRED)])
def test_no_path_is_read_outside_the_repository(loopback_hub, path):
    loopback_hub.create("paths")
    encoded = quote(path, safe="")
    assert loopback_hub.ask("GET", f"/karla/paths/resolve/main/{encoded}")[0] == 400
    assert loopback_hub.ask("GET", f"/api/models/karla/paths/tree/main/{encoded}")[0] == 400
    assert loopback_hub.ask("POST", "/api/models/karla/paths/paths-info/main", f"paths=a/{encoded}/b")[0] == 400
    if path.isprintable():  # http.client sends no other path as it stands
        assert loopback_hub.ask("GET", f"/karla/paths/resolve/main/{path}")[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/repos/create", {"name": "../x"}),
        ("POST", "/api/repos/create", {"name": "x", "type": "space"}),
        ("POST", "/api/repos/create", {"name": 3}),
        ("POST", "/api/repos/create", {"name": "x", "type": "\ud800"}),
        ("POST", "/api/repos/create", b"{"),
        ("POST", "/api/repos/create", b"[]"),
        ("POST", "/api/models/karla/bad/commit/main", b'{"key": "file"}'),
        ("POST", "/api/models/karla/bad/commit/main", b'{"key": "move", "value": {"path": "a"}}'),
        ("POST", "/api/models/karla/bad/commit/main", b'{"key": "file", "value": {"path": "a", "content": "*"}}'),
        ("POST", "/api/models/karla/bad/commit/main", b""),
        ("POST", "/api/models/karla/bad/preupload/main", {"files": [{"path": "a", "sample": "", "size": "1"}]}),
        ("POST", "/api/models/karla/bad/tag/main", {"tag": "a\0b"}),
        ("POST", "/api/models/karla/bad/branch/a%20b", {}),
        ("POST", "/karla/bad.git/info/lfs/objects/batch", {"operation": "download", "objects": []}),
        ("POST", "/karla/bad.git/info/lfs/objects/batch", {"operation": "upload", "objects": [{"oid": "..", "size": 1}]}),
    ],
)  # fmt: skip
def test_what_is_no_request_is_answered_with_400(loopback_hub, method, path, body):
    loopback_hub.create("bad")
    status, _, answer = loopback_hub.ask(method, path, body)
    assert status == 400, answer
    assert json.loads(answer)["error"]


@pytest.mark.parametrize(
    "revision", ["main~1", "main^", "HEAD", "@", "-h", "main:README.md", "refs%2Fscratch%2Fx", "..", "%00"]
)
def test_a_revision_is_a_name_and_nothing_that_git_computes(loopback_hub, revision):
    loopback_hub.create("revisions")
    status, headers, _ = loopback_hub.ask("GET", f"/api/models/karla/revisions/revision/{revision}")
    assert (status, headers["X-Error-Code"]) == (404, "RevisionNotFound")


def test_only_this_machine_is_answered(loopback_hub):
    assert loopback_hub.ask("GET", "/api/whoami-v2", headers={"Host": "hub.example"})[0] == 400
    assert loopback_hub.ask("GET", "/api/whoami-v2", token=None)[0] == 401


def test_the_server_runs_where_only_its_own_folder_is(tmp_path):
    """It imports nothing of the project: four files, PyYAML and Starlette are enough."""
    for name in ("loopback_hub.py", "hub_requests.py", "hub_store.py", "hub_cards.py"):
        shutil.copy(TESTS / name, tmp_path)
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; sys.path.insert(0, '.'); import loopback_hub; print(*sys.modules)",
    ]
    modules = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert "loopback_hub" in modules
    assert not {"karla_hf", "torch", "huggingface_hub"} & set(modules)
