"""The loopback Hub, asked by the unmodified huggingface_hub client in other processes, and by hand where that refuses."""

import inspect
import json
import subprocess
import sys
import time

from hub_fixtures import READER, STRANGER, WRITER, regular_file, running_hub


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def push_and_pull(folder):
    from pathlib import Path

    from huggingface_hub import HfApi, snapshot_download

    api, repo, folder = HfApi(), "karla/round-trip", Path(folder)
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    api.create_repo(repo)
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="title", commit_description="more").oid
    api.create_tag(repo, tag="v1", tag_message="the first")
    api.create_branch(repo, branch="next/one")
    api.upload_file(repo_id=repo, path_or_fileobj=b"changed", path_in_repo="notes.txt", revision="next/one")
    pulled = {}
    for revision in ("main", "v1", first, first[:8], "next/one"):
        snapshot = Path(snapshot_download(repo, revision=revision))
        pulled[revision] = {name: (snapshot / name).read_bytes() == files[name].read_bytes() for name in files}
    tree = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}
    refs = api.list_repo_refs(repo)
    return {
        "whoami": api.whoami()["name"],
        "pulled": pulled,
        "again": api.upload_folder(repo_id=repo, folder_path=folder).oid == first,
        "large": sorted(path for path, entry in tree.items() if getattr(entry, "lfs", None)),
        "folder": [entry.path for entry in api.list_repo_tree(repo, "a folder")],
        "refs": [[ref.name for ref in kind] for kind in (refs.branches, refs.tags)],
        "same": refs.tags[0].target_commit == api.model_info(repo).sha == first,
        "commits": [[c.title, c.message, c.authors] for c in api.list_repo_commits(repo)],
        "card": api.model_info(repo).card_data.to_dict(),
        "deleted": [api.delete_folder("a folder", repo), api.delete_file("notes.txt", repo), api.list_repo_files(repo)][2],
        "gone": [api.delete_branch(repo, branch="next/one"), api.delete_tag(repo, tag="v1"), len(api.list_repo_refs(repo).tags)][2],
    }  # fmt: skip


def test_what_is_pushed_comes_back(loopback_hub, tmp_path):
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for n, shard in enumerate(shards):
        (tmp_path / shard).write_bytes(bytes([n]) * 3_000_001)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / 'naïve "name".json').write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [memory]\n---\n# A model\n")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "unknown").write_bytes(b"\0\1")
    (tmp_path / "empty").touch()
    found = loopback_hub.call(push_and_pull, folder=str(tmp_path))

    assert found["whoami"] == "karla"
    changed = {revision: [f for f, same in files.items() if not same] for revision, files in found["pulled"].items()}
    assert len(changed) == 5
    assert changed.pop("next/one") == ["notes.txt"]
    assert not any(changed.values())
    assert found["again"], "uploading the same files made a commit"
    assert found["large"] == [*shards, "unknown"]
    assert found["folder"] == ['a folder/naïve "name".json']
    assert found["refs"] == [["main", "next/one"], ["v1"]]
    assert found["same"]
    assert found["commits"] == [["title", "more", ["karla"]], ["initial commit", "", ["karla"]]]
    assert found["card"]["license"] == "apache-2.0"
    assert found["deleted"] == [".gitattributes", "README.md", "empty", *shards, "unknown"]
    assert found["gone"] == 0


def refusals(writer, reader, stranger):
    from huggingface_hub import CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, found = HfApi(token=writer), {}

    def attempt(name, call, *arguments, **options):
        try:
            call(*arguments, **options)
            found[name] = "allowed"
        except HfHubHTTPError as error:
            found[name] = [type(error).__name__, error.response.status_code]

    def write(repo, token):
        api.upload_file(repo_id=repo, path_or_fileobj=b"x", path_in_repo="x.txt", token=token)

    api.create_repo("karla/open")
    api.create_repo("karla/closed", private=True)
    attempt("create twice", api.create_repo, "karla/open")
    attempt("create twice, allowed", api.create_repo, "karla/open", exist_ok=True)
    attempt("create anonymously", api.create_repo, "karla/other", token=False)
    attempt("create elsewhere", api.create_repo, "karla/other", token=stranger)
    attempt("create at home", api.create_repo, "stranger/own", token=stranger)
    api.create_tag("karla/open", tag="v1")
    attempt("tag twice", api.create_tag, "karla/open", tag="v1")
    attempt("tag with no name of git", api.create_tag, "karla/open", tag="a..b")
    attempt("delete main", api.delete_branch, "karla/open", branch="main")
    attempt("delete no branch", api.delete_branch, "karla/open", branch="none")
    for repo in ("open", "closed", "missing"):
        for name, token in (("writer", writer), ("reader", reader), ("stranger", stranger), ("nobody", False)):
            attempt(f"{name} reads {repo}", api.model_info, f"karla/{repo}", token=token)
            attempt(f"{name} writes {repo}", write, f"karla/{repo}", token)
    attempt("bad token", api.model_info, "karla/open", token="hf_of_nobody")
    attempt("a model is no data set", api.dataset_info, "karla/open")
    attempt("no such file", api.hf_hub_download, "karla/open", "none.txt")
    attempt("no such revision", api.hf_hub_download, "karla/open", "x.txt", revision="none")
    attempt("no such folder", lambda: list(api.list_repo_tree("karla/open", "none")))
    deletion = [CommitOperationDelete("none.txt")]
    attempt("delete no file", api.create_commit, "karla/open", deletion, commit_message="no")
    attempt("push to no branch", api.create_commit, "karla/open", deletion, commit_message="no", revision="none")
    attempt("delete, not mine", api.delete_repo, "karla/open", token=stranger)
    attempt("delete", api.delete_repo, "karla/closed")
    attempt("delete twice", api.delete_repo, "karla/closed")
    return found


def test_refusals_are_the_exceptions_of_the_hub(loopback_hub):
    found = loopback_hub.call(refusals, writer=WRITER, reader=READER, stranger=STRANGER)
    missing, forbidden = "RepositoryNotFoundError", ["HfHubHTTPError", 403]
    expected = {
        "create twice": ["HfHubHTTPError", 409],
        "create twice, allowed": "allowed",
        "create anonymously": ["HfHubHTTPError", 401],
        "create elsewhere": forbidden,
        "create at home": "allowed",
        "tag twice": ["HfHubHTTPError", 409],
        "tag with no name of git": ["BadRequestError", 400],
        "delete main": forbidden,
        "delete no branch": ["RevisionNotFoundError", 404],
        **{f"{name} reads open": "allowed" for name in ("writer", "reader", "stranger", "nobody")},
        "writer writes open": "allowed",
        "reader writes open": forbidden,
        "stranger writes open": forbidden,
        "nobody writes open": [missing, 401],
        "writer reads closed": "allowed",
        "writer writes closed": "allowed",
        "reader reads closed": "allowed",
        "reader writes closed": forbidden,
        **{f"stranger {verb} closed": [missing, 404] for verb in ("reads", "writes")},
        **{f"nobody {verb} closed": [missing, 401] for verb in ("reads", "writes")},
        **{f"{who} {verb} missing": [missing, 404] for who in ("writer", "reader", "stranger") for verb in ("reads", "writes")},
        **{f"nobody {verb} missing": [missing, 401] for verb in ("reads", "writes")},
        "bad token": ["HfHubHTTPError", 401],
        "a model is no data set": [missing, 404],
        "no such file": ["RemoteEntryNotFoundError", 404],
        "no such revision": ["RevisionNotFoundError", 404],
        "no such folder": ["RemoteEntryNotFoundError", 404],
        "delete no file": ["RemoteEntryNotFoundError", 404],
        "push to no branch": ["RevisionNotFoundError", 404],
        "delete, not mine": forbidden,
        "delete": "allowed",
        "delete twice": [missing, 404],
    }  # fmt: skip
    assert found == expected


def push_at_once(parents):
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, repo, found = HfApi(), "karla/at-once", {}
    api.create_repo(repo)
    first = api.model_info(repo).sha

    def push(kind, n, parent):
        large = CommitOperationAdd(f"{kind}/{n}.bin", bytes([n]) * 100_000)
        small = CommitOperationAdd(f"{kind}/{n}.txt", str(n).encode())
        try:
            api.create_commit(repo, [large, small], commit_message=f"{kind} {n}", parent_commit=parent)
            return 200
        except HfHubHTTPError as error:
            return error.response.status_code

    for kind in parents:
        head = api.model_info(repo).sha
        parent = {"none": None, "head": head, "short": head[:7], "stale": first}[kind]
        with ThreadPoolExecutor(8) as pool:
            statuses = sorted(pool.map(push, [kind] * 8, range(8), [parent] * 8))
        files = [file for file in api.list_repo_files(repo) if file.startswith(f"{kind}/")]
        found[kind] = [statuses, len(files), len(api.list_repo_commits(repo))]
    return found


def test_pushes_at_once_lose_nothing_and_one_of_those_with_the_same_parent_wins(loopback_hub):
    found = loopback_hub.call(push_at_once, parents=["none", "head", "short", "stale"])
    assert found["none"] == [[200] * 8, 16, 9]
    assert found["head"] == [[200] + [412] * 7, 2, 10]
    assert found["short"] == [[200] + [412] * 7, 2, 11]
    assert found["stale"] == [[412] * 8, 0, 11]


def push_large(size, stop_at):
    """Push a file of `size` bytes; having sent `stop_at` of them, say so and wait."""
    import io
    import signal

    from huggingface_hub import CommitOperationAdd, HfApi

    class Stopping(io.BytesIO):
        stop_at = None

        def read(self, count=-1):
            if self.stop_at is not None and self.tell() >= self.stop_at:
                print("half sent", flush=True)  # noqa: T201
                signal.pause()
            return super().read(count)

    file = Stopping(b"k" * size)
    operation = CommitOperationAdd("large.bin", file)  # reads all of it, for the hash
    file.stop_at = stop_at
    HfApi().create_commit("karla/killed", [operation], commit_message="large")
    return HfApi().list_repo_files("karla/killed")


def test_a_killed_upload_leaves_nothing_behind(loopback_hub):
    loopback_hub.create("killed")
    head, size = loopback_hub.head("killed"), 20_000_000
    large_files = loopback_hub.root / "models" / "karla" / "killed.git" / "lfs"

    def stored():
        return [file for file in large_files.rglob("*") if file.is_file()]

    code = f"{inspect.getsource(push_large)}\npush_large({size}, {size // 2})"
    environment = loopback_hub.environment()
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout.readline() == "half sent\n"
        wait_for(lambda: sum(file.stat().st_size for file in stored()) > size // 4)
        assert [file.parent.name for file in stored()] == ["incoming"]
        client.kill()
    wait_for(lambda: not stored())
    assert loopback_hub.head("killed") == head
    files = loopback_hub.call(push_large, size=size, stop_at=None)
    assert files == [".gitattributes", "large.bin"]
    assert [file.stat().st_size for file in stored()] == [size]


def test_a_server_that_was_killed_clears_its_half_files_and_keeps_the_rest(tmp_path):
    with running_hub(tmp_path) as hub:
        hub.create("kept")
        assert hub.commit("kept", regular_file("kept.txt", b"kept"))[0] == 200
        head = hub.head("kept")
    half = tmp_path / "hub" / "models" / "karla" / "kept.git" / "lfs" / "incoming" / "half"
    half.write_bytes(b"half")
    with running_hub(tmp_path) as hub:
        assert not half.exists()
        assert hub.head("kept") == head
        assert hub.ask("GET", "/karla/kept/resolve/main/kept.txt")[2] == b"kept"


def batch(hub, name, sha256, size, *, token=WRITER):
    body = {"operation": "upload", "objects": [{"oid": sha256, "size": size}]}
    status, _, answer = hub.ask("POST", f"/karla/{name}.git/info/lfs/objects/batch", body, token=token)
    assert status == 200, answer
    return json.loads(answer)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)


CONTENT, SHA256 = b"content", "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"


def test_an_upload_needs_the_grant_of_the_server(loopback_hub):
    loopback_hub.create("grants")
    loopback_hub.create("other-grants")
    link = batch(loopback_hub, "grants", SHA256, len(CONTENT))
    forgeries = {
        "no grant": link.split("?")[0],
        "another size": link.replace("size=7", "size=8"),
        "another time": link.replace("expires=1", "expires=2"),
        "another file": link.replace(SHA256, SHA256[::-1]),
        "another repository": link.replace("karla/grants", "karla/other-grants"),
        "another kind": link.replace("/karla/", "/datasets/karla/"),
        "another signature": link[:-1] + ("0" if link[-1] != "0" else "1"),
    }
    for name, forgery in forgeries.items():
        assert forgery != link, name
        assert loopback_hub.ask("PUT", forgery, CONTENT, token=None)[0] == 403, name
    refused = {b"CONTENT": 400, b"conten": 400, b"contents": 413}
    for content, expected in refused.items():
        assert loopback_hub.ask("PUT", link, content, token=None)[0] == expected, content
    large_files = loopback_hub.root / "models" / "karla" / "grants.git" / "lfs"
    assert not [file for file in large_files.rglob("*") if file.is_file()]
    large = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": SHA256, "size": len(CONTENT)}}
    assert loopback_hub.commit("grants", large)[0] == 400
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA256}\nsize {len(CONTENT)}\n".encode()
    assert loopback_hub.commit("grants", regular_file("a.bin", pointer))[0] == 400

    assert loopback_hub.ask("PUT", link, CONTENT, token=None)[0] == 200
    assert loopback_hub.commit("grants", large)[0] == 200
    assert loopback_hub.ask("GET", "/karla/grants/resolve/main/a.bin")[2] == CONTENT
    assert loopback_hub.commit("other-grants", large)[0] == 400, "the hash of a file is no way to get at it"


def test_an_expired_grant_is_refused(tmp_path):
    def push():
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo("karla/late")
        try:
            api.upload_file(repo_id="karla/late", path_or_fileobj=b"\0" * 3_000_000, path_in_repo="a.bin")
        except RuntimeError as error:
            return [error.__cause__.response.status_code, api.list_repo_files("karla/late")]

    with running_hub(tmp_path, "--grant-seconds", "0") as hub:
        assert hub.call(push) == [403, [".gitattributes"]]


def read_parts(size):
    import tempfile

    from huggingface_hub import HfApi, HfFileSystem, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    api, repo, files, half = HfApi(), "karla/parts", HfFileSystem(), size // 2
    content = bytes(n % 251 for n in range(size))
    api.create_repo(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=content, path_in_repo="large.bin")
    api.upload_file(repo_id=repo, path_or_fileobj=b"0123456789", path_in_repo="small.txt")
    large = files.cat_file(f"{repo}/large.bin", start=1000, end=1500) == content[1000:1500]
    small = files.cat_file(f"{repo}/small.txt", start=3, end=5).decode()
    # A download that was cut off goes on from there: the first half of the file is not what the Hub has, and stays.
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * half)
        http_get(hf_hub_url(repo, "large.bin"), file, resume_size=half, headers=build_hf_headers(), expected_size=size)
        file.seek(0)
        resumed = file.read() == b"x" * half + content[half:]
    return {"large": large, "small": small, "resumed": resumed}


def test_parts_of_files_are_read_and_downloads_resume(loopback_hub):
    assert loopback_hub.call(read_parts, size=1_000_000) == {"large": True, "small": "34", "resumed": True}
    place = "/karla/parts/resolve/main/"
    for path, last in (("small.txt", b"89"), ("large.bin", bytes([14, 15]))):
        size = {"small.txt": 10, "large.bin": 1_000_000}[path]
        status, headers, body = loopback_hub.ask("GET", place + path, headers={"Range": f"bytes={size - 2}-"})
        assert (status, headers["Content-Range"], body) == (206, f"bytes {size - 2}-{size - 1}/{size}", last)
        assert loopback_hub.ask("GET", place + path, headers={"Range": f"bytes={size}-"})[0] == 416


def list_many(count):
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi

    api, repo = HfApi(), "karla/many"
    api.create_repo(repo)
    files = [CommitOperationAdd(f"{'few' if n < 60 else 'many'}/{n}.txt", b"") for n in range(count)]
    api.create_commit(repo, [*files, CommitOperationAdd("a.bin", b"large")], commit_message="many")
    api.create_commit(repo, [CommitOperationCopy("a.bin", "few/a.bin")], commit_message="copied")
    expanded = list(api.list_repo_tree(repo, "few", expand=True))
    titles = [entry.last_commit.title for entry in expanded]
    info = api.get_paths_info(repo, ["many", "few/a.bin", "none"])
    return {
        "files": len(api.list_repo_files(repo)),
        "distinct": len(set(api.list_repo_files(repo))),
        "titles": [titles.count("many"), titles.count("copied")],
        "info": [[type(entry).__name__, entry.path] for entry in info],
    }


def test_long_listings_come_in_pages(loopback_hub):
    found = loopback_hub.call(list_many, count=1200)
    assert found["files"] == found["distinct"] == 1203
    assert found["titles"] == [60, 1]
    assert found["info"] == [["RepoFolder", "many"], ["RepoFile", "few/a.bin"]]
    _, headers, body = loopback_hub.ask("GET", "/api/models/karla/many/tree/main?recursive=true")
    assert len(json.loads(body)) == 1000
    assert 'rel="next"' in headers["Link"]


def push_dataset(rows):
    from datasets import Dataset, load_dataset
    from huggingface_hub import HfApi

    repo, texts = "karla/facts", [f"text {n}" for n in range(rows)]
    Dataset.from_dict({"text": texts}).push_to_hub(repo, private=True)
    Dataset.from_dict({"text": texts[:3]}).push_to_hub(repo, split="test")
    loaded = load_dataset(repo)
    streamed = load_dataset(repo, split="train", streaming=True)
    HfApi().create_tag(repo, tag="v1", repo_type="dataset")
    return {
        "loaded": loaded["train"]["text"][:] == texts,
        "splits": {name: len(split) for name, split in loaded.items()},
        "streamed": [row["text"] for row in streamed] == texts,
        "tagged": load_dataset(repo, split="test", revision="v1", streaming=True)
        .take(1)
        .__iter__()
        .__next__()["text"],
        "private": HfApi().dataset_info(repo).private,
    }


def test_data_sets_are_pushed_loaded_and_streamed(loopback_hub):
    found = loopback_hub.call(push_dataset, rows=500)
    splits = {"train": 500, "test": 3}
    assert found == {"loaded": True, "splits": splits, "streamed": True, "tagged": "text 0", "private": True}
    status, headers, _ = loopback_hub.ask("GET", "/api/datasets/karla/facts", token=None)
    assert (status, headers["X-Error-Code"]) == (401, "RepoNotFound")
