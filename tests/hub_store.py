"""What the loopback Hub keeps on disk: bare git repositories, the large files of each beside it, and nothing half-written."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


# What the first commit of a repository holds; the same patterns decide which files are uploaded as large files.
LARGE_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".npz", ".npy", ".pt", ".zip", ".gz", ".gguf", ".png")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES).encode()
GIT_ENVIRONMENT = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
POINTER_SIZE_MAX = 160
NO_COMMIT = "0" * 40
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,200}")
SHA256 = re.compile(r"[0-9a-f]{64}")
Changes = dict[str, bytes | None]  # new content by path; None deletes a file or folder


class HubError(Exception):
    """An answer other than 2xx: the status, one sentence, and the code by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit; a large file has a `sha256`, and `size` is the size of its content."""

    path: str
    kind: str  # "file" or "directory"
    oid: str  # git's hash, of the pointer if the file is a large one
    size: int
    sha256: str = ""


def check_path(path: str) -> str:
    """Return the path of a file in a repository if it is a plain relative one, else answer 400."""
    parts = path.split("/") if isinstance(path, str) else [""]
    plain = all(part and part not in (".", "..") and part.lower().rstrip(". ") != ".git" for part in parts)
    if not plain or re.search(r"[\x00-\x1f\x7f\\\ud800-\udfff]", path) or len(path) > 1000:
        raise HubError(400, f"The path {path!r} is not a relative path inside the repository.")
    return path


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git(repository: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """Run git on a bare repository; `subprocess.CalledProcessError` if it fails."""
    command = ["git", "--literal-pathspecs", "--git-dir", str(repository), *arguments]
    return subprocess.run(command, input=stdin, env=GIT_ENVIRONMENT, capture_output=True, check=True).stdout


@lru_cache(maxsize=256)  # a commit never changes
def list_commit(repository: Path, sha: str) -> dict[str, Entry]:
    """Every file and folder of a commit, by path."""
    entries, small = {}, []
    for line in git(repository, "ls-tree", "-rtz", "--long", sha).decode().split("\0")[:-1]:
        details, path = line.split("\t", 1)
        _, kind, oid, size = details.split()
        if kind == "tree":
            entries[path] = Entry(path, "directory", oid, 0)
            continue
        entries[path] = Entry(path, "file", oid, int(size))
        if int(size) <= POINTER_SIZE_MAX:
            small.append(entries[path])
    stream = git(repository, "cat-file", "--batch", stdin="".join(f"{entry.oid}\n" for entry in small).encode())
    start = 0
    for entry in small:
        start = stream.index(b"\n", start) + 1
        if match := POINTER.fullmatch(stream, start, start + entry.size):
            entries[entry.path] = Entry(entry.path, "file", entry.oid, int(match[2]), match[1].decode())
        start += entry.size + 1
    return entries


@dataclass(frozen=True)
class Repository:
    """One repository: git's objects and refs in `path`, large files by SHA-256 in `path/lfs/objects`."""

    path: Path
    lock: threading.Lock

    @property
    def is_private(self) -> bool:
        return (self.path / "private").exists()

    def resolve(self, revision: str) -> str:
        """The hash of the commit that a branch, a tag, a full ref or a hash names."""
        names = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if re.fullmatch(r"[0-9a-f]{7,40}|refs/(heads|tags|pr|convert)/.+", revision):
            names.append(revision)
        if REVISION.fullmatch(revision):
            questions = "".join(f"{name}^{{commit}}\n" for name in names).encode()
            for line in git(self.path, "cat-file", "--batch-check", stdin=questions).decode().splitlines():
                if match := re.fullmatch(r"([0-9a-f]{40}) commit \d+", line):
                    return match[1]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def entries(self, sha: str) -> dict[str, Entry]:
        return list_commit(self.path, sha)

    def read(self, entry: Entry) -> bytes:
        """The content of a regular file."""
        return git(self.path, "cat-file", "blob", entry.oid)

    def log(self, sha: str, path: str | None = None, limit: int = -1) -> list[dict[str, str]]:
        """The commits before and at `sha`, newest first; with `path`, those that changed it."""
        only = [] if path is None else ["--", path]
        text = git(self.path, "log", "-z", f"--max-count={limit}", "--format=%H%x1f%an%x1f%ct%x1f%s%x1f%b", sha, *only)
        keys = ("id", "author", "seconds", "title", "message")
        return [dict(zip(keys, line.split("\x1f"), strict=True)) for line in text.decode().split("\0") if line]

    def refs(self, kind: str) -> dict[str, str]:
        """The commits of the branches ("heads") or tags ("tags"), by name."""
        lines = git(self.path, "for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", f"refs/{kind}")
        return dict(line.split(" ") for line in lines.decode().splitlines())

    def create_ref(self, kind: str, name: str, sha: str) -> None:
        if not REVISION.fullmatch(name):
            raise HubError(400, f"A branch or tag cannot be named {name!r:.100}.")
        with self.lock:
            if name in self.refs(kind):
                raise HubError(409, f"Reference already exists: refs/{kind}/{name}")
            try:
                git(self.path, "update-ref", f"refs/{kind}/{name}", sha, NO_COMMIT)
            except subprocess.CalledProcessError:
                raise HubError(400, f"Git does not accept the name {name!r} beside those it has.") from None

    def delete_ref(self, kind: str, name: str) -> None:
        with self.lock:
            if name not in self.refs(kind):
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            git(self.path, "update-ref", "-d", f"refs/{kind}/{name}")

    def commit(self, branch: str, author: str, message: str, changes: Changes, parent: str = "") -> str:
        """Put a commit on a branch, whole or not at all, and return its hash.

        Args:
            changes: content by path, of regular files and of the pointers to large ones.
            parent: if given (at least 7 digits), what the branch must point to.
        """
        for content in changes.values():
            match = POINTER.fullmatch(content or b"")
            if match and self.object_size(match[1].decode()) != int(match[2]):
                raise HubError(400, f"The large file {match[1].decode()} was not uploaded; upload it, then commit.")
        with self.lock:
            head = self.refs("heads").get(branch, "")
            if not head and branch != "main":
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if parent and not (len(parent) >= 7 and head.startswith(parent)):
                raise HubError(412, f"The branch {branch} is at {head}, not at {parent}: get its files and try again.")
            scratch = f"refs/scratch/{uuid.uuid4().hex}"
            script = b"".join(import_script(scratch, head, author, message, changes))
            printed = git(self.path, "fast-import", "--quiet", "--done", "--date-format=now", stdin=script)
            new = printed.decode().strip()
            moves = f"update refs/heads/{branch} {new} {head or NO_COMMIT}\ndelete {scratch}\n"
            git(self.path, "update-ref", "--stdin", stdin=moves.encode())
        return new

    def object_path(self, sha256: str) -> Path:
        return self.path / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def object_size(self, sha256: str) -> int | None:
        """The size of a large file, or `None` if it is not here."""
        path = self.object_path(sha256)
        return path.stat().st_size if path.exists() else None

    async def receive(self, chunks: AsyncIterator[bytes], sha256: str, size: int) -> None:
        """Store a large file if it is the promised one; whatever goes wrong, no part of it stays."""
        digest, received = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.path / "lfs" / "incoming", delete=False) as file:
            try:
                async for chunk in chunks:
                    received += len(chunk)
                    if received > size:
                        raise HubError(413, f"The upload was granted for {size} bytes, and more came.")
                    digest.update(chunk)
                    file.write(chunk)
                if received != size or digest.hexdigest() != sha256:
                    raise HubError(400, f"The {received} bytes that came are not the file {sha256} of {size} bytes.")
                file.flush()
                self.object_path(sha256).parent.mkdir(parents=True, exist_ok=True)
                os.replace(file.name, self.object_path(sha256))
            finally:
                Path(file.name).unlink(missing_ok=True)


def import_script(ref: str, head: str, author: str, message: str, changes: Changes) -> Iterator[bytes]:
    """Lines for `git fast-import` that make one commit and print its hash."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", message).encode(errors="replace")
    yield f"commit {ref}\nmark :1\ncommitter {author} <{author}@127.0.0.1> now\ndata {len(text)}\n".encode() + text
    yield f"\nfrom {head}\n".encode() if head else b"\n"
    for path, content in changes.items():
        quoted = '"' + path.replace('"', '\\"') + '"'
        if content is None:
            yield f"D {quoted}\n".encode()
        else:
            yield f"M 100644 inline {quoted}\ndata {len(content)}\n".encode() + content + b"\n"
    yield b"get-mark :1\ndone\n"


class Store:
    """The repositories under a folder: `models/NAMESPACE/NAME.git` and `datasets/NAMESPACE/NAME.git`.

    One server at a time works on a folder: it removes what an earlier one left half-done.
    """

    def __init__(self, root: Path):
        self.root = root
        self.locks: dict[str, threading.Lock] = {}
        shutil.rmtree(root / "scratch", ignore_errors=True)
        (root / "scratch").mkdir(parents=True)
        for left_by_killed_server in root.glob("*/*/*.git/lfs/incoming/*"):
            left_by_killed_server.unlink()

    def find(self, kind: str, namespace: str, name: str) -> Repository | None:
        if kind not in ("models", "datasets") or not NAME.fullmatch(namespace) or not NAME.fullmatch(name):
            return None
        path = self.root / kind / namespace / f"{name}.git"
        return Repository(path, self.locks.setdefault(str(path), threading.Lock())) if path.exists() else None

    def create(self, kind: str, namespace: str, name: str, *, private: bool) -> bool:
        """Make a repository with one commit; `False` if it exists."""
        path = self.root / kind / namespace / f"{name}.git"
        made = Path(tempfile.mkdtemp(dir=self.root / "scratch"))
        git(made, "init", "--quiet", "--bare", "--template=", "--initial-branch=main", str(made))
        (made / "lfs" / "incoming").mkdir(parents=True)
        if private:
            (made / "private").touch()
        Repository(made, threading.Lock()).commit("main", namespace, "initial commit", {".gitattributes": ATTRIBUTES})
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(made, path)
        except OSError:  # what exists is not empty, so it is not replaced
            shutil.rmtree(made)
            return False
        return True

    def delete(self, repository: Repository) -> None:
        with repository.lock:
            gone = self.root / "scratch" / uuid.uuid4().hex
            os.rename(repository.path, gone)
        shutil.rmtree(gone)
