"""A Hub on this machine: the endpoints that an unmodified `huggingface_hub` client uses to push and to pull.

    python tests/loopback_hub.py --root DIR --port 0

prints its URL, then serves what lies under DIR until it is stopped. It listens on 127.0.0.1 only. Clients need
`HF_ENDPOINT=<url>`, `HF_TOKEN=<one of hub_requests.TOKENS>` and `HF_HUB_DISABLE_XET=1` before they import `huggingface_hub`.

Not here: Xet, pull requests, gated repositories, spaces, `.gitignore`, multi-part uploads. Errors, codes and headers are
those that the client turns into its exceptions; the texts are ours.
"""

import argparse
import hashlib
import hmac
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode

import uvicorn
from hub_cards import check_card, check_file, list_of, read_metadata
from hub_requests import account_of, decode, field, parameter, parse, writer_of
from hub_store import LARGE_SUFFIXES, NAME, SHA256, Entry, HubError, Repository, Store, check_path, pointer
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route


PAGE_SIZE, EXPANDED_PAGE_SIZE = 1000, 50  # as on the Hub
REGULAR_SIZE_MAX = 10 * 2**20


def as_date(seconds: str) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(int(seconds)))


def describe(entry: Entry) -> dict:
    """A file or folder as listings give it; the keys differ between endpoints, and each client takes its own."""
    described = {"type": entry.kind, "oid": entry.oid, "size": entry.size, "path": entry.path}
    if entry.sha256:
        sizes = {"size": entry.size, "pointerSize": len(pointer(entry.sha256, entry.size))}
        described["lfs"] = {"oid": entry.sha256, "sha256": entry.sha256, **sizes}
    return described


def describe_at(repository: Repository, sha: str, entry: Entry, expand: bool) -> dict:
    """The same; if asked for, with the last commit that changed it."""
    if not expand:
        return describe(entry)
    last = repository.log(sha, entry.path, limit=1)[0]
    return {**describe(entry), "lastCommit": {**last, "date": as_date(last["seconds"])}}


def repository_id(request: Request) -> str:
    return f"{parameter(request, 'namespace')}/{parameter(request, 'name')}"


def web_path(kind: str, identity: str) -> str:
    """Where a repository is on the web: data sets have a prefix."""
    return f"datasets/{identity}" if kind == "datasets" else identity


def is_large(path: str, sample: bytes, size: int) -> bool:
    """Whether a file goes beside git: by its name, its size, or because it begins like no text."""
    return path.endswith(LARGE_SUFFIXES) or size > REGULAR_SIZE_MAX or b"\0" in sample


class LoopbackHub:
    """The endpoints. Each method answers one of them, given the request and its body."""

    def __init__(self, root: Path, grant_seconds: int):
        self.store, self.grant_seconds, self.secret = Store(root), grant_seconds, secrets.token_bytes(32)

    # Repositories

    def repository(self, request: Request, *, write: bool = False) -> Repository:
        """The repository of the URL, if who asks may know it (else 401 or 404) and, with `write`, change it."""
        namespace, account = parameter(request, "namespace"), account_of(request)
        found = self.store.find(parameter(request, "kind", "models"), namespace, parameter(request, "name"))
        if found is None or (found.is_private and (account is None or account.name != namespace)):
            status, message = (404, "Repository not found") if account else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        if write:
            writer_of(request, namespace)
        return found

    def location(self, request: Request) -> str:
        return web_path(parameter(request, "kind", "models"), repository_id(request))

    def whoami(self, request: Request, body: bytes) -> dict:
        account = account_of(request)
        if account is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": account.role, "role": account.role}
        return {"type": "user", "id": account.name, "name": account.name, "fullname": account.name, "orgs": [],
                "auth": {"type": "access_token", "accessToken": token}}  # fmt: skip

    def named(self, request: Request, body: bytes) -> tuple[str, str, str]:
        """Kind, namespace and name in the body of a request to create or delete a repository."""
        data = parse(body)
        kind, name = f"{data.get('type') or 'model'}s", field(data, "name")
        namespace = data.get("organization") or writer_of(request).name
        writer_of(request, namespace)
        if kind not in ("models", "datasets") or not NAME.fullmatch(name):
            raise HubError(400, f"Cannot keep {kind!r} named {name!r}: models and datasets with plain names only.")
        return kind, namespace, name

    def create_repository(self, request: Request, body: bytes) -> Response:
        kind, namespace, name = self.named(request, body)
        private = parse(body).get("visibility") == "private" or parse(body).get("private") is True
        made = self.store.create(kind, namespace, name, private=private)
        answer = {"url": f"{request.base_url}{web_path(kind, f'{namespace}/{name}')}"}
        if not made:
            answer["error"] = f"You already created this {kind[:-1]} repo: {namespace}/{name}"
        return JSONResponse(answer, 200 if made else 409)

    def delete_repository(self, request: Request, body: bytes) -> dict:
        found = self.store.find(*self.named(request, body))
        if found is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        self.store.delete(found)
        return {}

    def info(self, request: Request, body: bytes) -> dict:
        repository = self.repository(request)
        sha = repository.resolve(parameter(request, "revision", "main"))
        files = {path: entry for path, entry in repository.entries(sha).items() if entry.kind == "file"}
        card = read_metadata(repository.read(files["README.md"])) if "README.md" in files else {}
        siblings = [{**describe(file), "rfilename": path, "blobId": file.oid} for path, file in files.items()]
        commits = repository.log(sha)
        identity = repository_id(request)
        return {
            "id": identity, "modelId": identity, "author": parameter(request, "namespace"), "sha": sha,
            "createdAt": as_date(commits[-1]["seconds"]), "lastModified": as_date(commits[0]["seconds"]),
            "private": repository.is_private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
            "siblings": siblings, "cardData": card, "tags": list_of(card.get("tags")),
            **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
        }  # fmt: skip

    def refs(self, request: Request, body: bytes) -> dict:
        repository, answer = self.repository(request), {"converts": [], "pullRequests": []}
        for key, kind in (("branches", "heads"), ("tags", "tags")):
            answer[key] = [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}
                for name, sha in repository.refs(kind).items()
            ]
        return answer

    def create_branch(self, request: Request, body: bytes) -> dict:
        repository = self.repository(request, write=True)
        start = parse(body).get("startingPoint") or "main"
        repository.create_ref("heads", parameter(request, "branch"), repository.resolve(start))
        return {}

    def create_tag(self, request: Request, body: bytes) -> dict:
        repository = self.repository(request, write=True)
        repository.create_ref("tags", field(parse(body), "tag"), repository.resolve(parameter(request, "revision")))
        return {}

    def delete_branch(self, request: Request, body: bytes) -> dict:
        repository, branch = self.repository(request, write=True), parameter(request, "branch")
        if branch == "main":
            raise HubError(403, "The branch main cannot be deleted")
        repository.delete_ref("heads", branch)
        return {}

    def delete_tag(self, request: Request, body: bytes) -> dict:
        self.repository(request, write=True).delete_ref("tags", parameter(request, "revision"))
        return {}

    def commits(self, request: Request, body: bytes) -> list[dict]:
        repository = self.repository(request)
        return [
            {"id": commit["id"], "title": commit["title"], "message": commit["message"].strip(),
             "date": as_date(commit["seconds"]), "authors": [{"user": commit["author"]}]}
            for commit in repository.log(repository.resolve(parameter(request, "revision")))
        ]  # fmt: skip

    # Pushing

    def validate_yaml(self, request: Request, body: bytes) -> Response:
        data = parse(body)
        errors, warnings = check_card(field(data, "content"), data.get("repoType") or "model")
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return JSONResponse(answer, status_code=400 if errors else 200)

    def preupload(self, request: Request, body: bytes) -> dict:
        repository = self.repository(request, write=True)
        entries = repository.entries(repository.resolve(parameter(request, "revision")))
        answers = []
        for file in field(parse(body), "files", list):
            path, sample = check_path(field(file, "path")), decode(field(file, "sample"))
            large, entry = is_large(path, sample, field(file, "size", int)), entries.get(path)
            oid = (entry.sha256 or entry.oid) if entry and entry.kind == "file" else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def grant(self, request: Request, sha256: str, size: int, expires: int) -> str:
        """The signature of a link that allows one PUT: of this file, into this repository, until then."""
        text = f"PUT {self.location(request)} {sha256} {size} {expires}"
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()

    def batch(self, request: Request, body: bytes) -> dict:
        repository, data = self.repository(request, write=True), parse(body)
        if data.get("operation") != "upload":
            raise HubError(400, "This Hub grants uploads; download through /resolve/.")
        base = f"{request.base_url}{self.location(request)}.git/info/lfs"
        expires, objects = int(time.time()) + self.grant_seconds, []
        for item in field(data, "objects", list):
            sha256, size = field(item, "oid"), field(item, "size", int)
            if not SHA256.fullmatch(sha256) or size < 0:
                raise HubError(400, f"Not the SHA-256 and size of a file: {sha256!r:.100}, {size}.")
            objects.append({"oid": sha256, "size": size})
            if repository.object_size(sha256) != size:
                grant = {"size": size, "expires": expires, "signature": self.grant(request, sha256, size, expires)}
                upload, verify = f"{base}/objects/{sha256}?{urlencode(grant)}", f"{base}/verify"
                objects[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    async def upload(self, request: Request) -> Response:
        """PUT of a large file. The link is the permission: such requests carry no token."""
        query, sha256 = parse_qs(request.url.query), parameter(request, "sha256")
        try:
            size, expires, signature = int(query["size"][0]), int(query["expires"][0]), query["signature"][0]
        except (KeyError, ValueError):
            raise HubError(403, "The link carries no grant; ask the batch endpoint for one.") from None
        if not hmac.compare_digest(signature.encode(), self.grant(request, sha256, size, expires).encode()):
            raise HubError(403, "The grant in the link was not given by this server.")
        if time.time() >= expires:
            raise HubError(403, "The grant in the link has expired; ask the batch endpoint for another.")
        kind = parameter(request, "kind", "models")
        repository = self.store.find(kind, parameter(request, "namespace"), parameter(request, "name"))
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        try:
            await repository.receive(request.stream(), sha256, size)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return Response()

    def verify(self, request: Request, body: bytes) -> dict:
        data = parse(body)
        sha256, size = field(data, "oid"), field(data, "size", int)
        if self.repository(request, write=True).object_size(sha256) != size:
            raise HubError(404, f"The large file {sha256!r:.100} is not here.")
        return {}

    def commit(self, request: Request, body: bytes) -> dict:
        repository, branch = self.repository(request, write=True), parameter(request, "revision")
        header, changes = {}, {}
        for line in body.splitlines():
            operation = parse(line)
            key, value = field(operation, "key"), field(operation, "value", dict)
            if key == "header":
                header = value
                continue
            path = check_path(field(value, "path").rstrip("/") if key == "deletedFolder" else field(value, "path"))
            if key == "file":
                changes[path] = decode(field(value, "content"))
                if errors := check_file(path, changes[path], parameter(request, "kind")[:-1]):
                    raise HubError(400, f"Invalid metadata in {path}: {'; '.join(errors)}")
            elif key == "lfsFile":
                sha256 = field(value, "oid")
                size = repository.object_size(sha256) if SHA256.fullmatch(sha256) else None
                if size is None or value.get("size", size) != size:
                    raise HubError(400, f"The large file {sha256!r:.100} was not uploaded; upload it, then commit.")
                changes[path] = pointer(sha256, size)
            elif key in ("deletedFile", "deletedFolder"):
                entry = repository.entries(repository.resolve(branch)).get(path)
                if entry is None or (entry.kind == "file") != (key == "deletedFile"):
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes[path] = None
            else:
                raise HubError(400, f"Unknown operation {key!r}.")
        message = f"{field(header, 'summary')}\n\n{header.get('description') or ''}".strip()
        parent = str(header.get("parentCommit") or "")
        oid = repository.commit(branch, writer_of(request).name, message, changes, parent)
        url = f"{request.base_url}{self.location(request)}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url}

    # Pulling

    def tree(self, request: Request, body: bytes) -> Response:
        repository, path, query = self.repository(request), parameter(request, "path"), request.query_params
        sha = repository.resolve(parameter(request, "revision"))
        entries = repository.entries(sha)
        if path and (check_path(path) not in entries or entries[path].kind == "file"):
            raise HubError(404, f"{path} does not exist on {sha}", "EntryNotFound")
        prefix, expand = f"{path}/" if path else "", query.get("expand", "").lower() == "true"
        listed = [entry for entry in entries.values() if entry.path.startswith(prefix)]
        if query.get("recursive", "").lower() != "true":
            listed = [entry for entry in listed if "/" not in entry.path[len(prefix) :]]
        start = int(query["cursor"]) if re.fullmatch(r"\d{1,9}", query.get("cursor", "")) else 0
        page = EXPANDED_PAGE_SIZE if expand else PAGE_SIZE
        answer = [describe_at(repository, sha, entry, expand) for entry in listed[start : start + page]]
        headers = {}
        if start + page < len(listed):
            following = urlencode({**query, "cursor": start + page})
            tree = f"{request.base_url}api/{parameter(request, 'kind')}/{repository_id(request)}/tree/{sha}"
            address = f"{tree}/{quote(path, safe='')}".rstrip("/")
            headers["Link"] = f'<{address}?{following}>; rel="next"'
        return JSONResponse(answer, headers=headers)

    def paths_info(self, request: Request, body: bytes) -> list[dict]:
        repository, form = self.repository(request), parse_qs(body.decode(errors="replace"))
        sha, expand = repository.resolve(parameter(request, "revision")), form.get("expand", [""])[0].lower() == "true"
        paths, entries = [check_path(path.rstrip("/")) for path in form.get("paths", [])], repository.entries(sha)
        return [describe_at(repository, sha, entries[path], expand) for path in paths if path in entries]

    def resolve(self, request: Request, body: bytes) -> Response:
        """HEAD and GET of a file, whole or in part."""
        repository, path = self.repository(request), check_path(parameter(request, "path"))
        sha = repository.resolve(parameter(request, "revision"))
        entry = repository.entries(sha).get(path)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if entry is None or entry.kind != "file":
            raise HubError(404, f"{path} does not exist on {sha}", "EntryNotFound", headers)
        headers["ETag"] = f'"{entry.sha256 or entry.oid}"'
        if entry.sha256:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.size)}
            return FileResponse(repository.object_path(entry.sha256), headers=headers)
        content, status = repository.read(entry), 200
        size = len(content)
        if part := re.fullmatch(r"bytes=(\d{1,15})-(\d{0,15})", request.headers.get("range", "")):
            start, stop = int(part[1]), min(int(part[2] or size) + 1, size)
            if start >= stop:
                raise HubError(416, "The file has no such bytes.", headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            content, status = content[start:stop], 206
        return Response(content, status, headers, media_type="application/octet-stream")

    def application(self) -> Starlette:
        """The ASGI application; parameters of its routes are percent-encoded (see `keep_encoded`)."""
        api, web = "/api/{kind}/{namespace}/{name}", ("/{namespace}/{name}", "/{kind}/{namespace}/{name}")
        table: list[tuple[str, str, Callable]] = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/repos/create", self.create_repository),
            ("DELETE", "/api/repos/delete", self.delete_repository),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("GET", api, self.info),
            ("GET", api + "/revision/{revision}", self.info),
            ("GET", api + "/refs", self.refs),
            ("GET", api + "/commits/{revision}", self.commits),
            ("POST", api + "/branch/{branch}", self.create_branch),
            ("DELETE", api + "/branch/{branch}", self.delete_branch),
            ("POST", api + "/tag/{revision}", self.create_tag),
            ("DELETE", api + "/tag/{revision}", self.delete_tag),
            ("GET", api + "/tree/{revision}", self.tree),
            ("GET", api + "/tree/{revision}/{path:path}", self.tree),
            ("POST", api + "/paths-info/{revision}", self.paths_info),
            ("POST", api + "/preupload/{revision}", self.preupload),
            ("POST", api + "/commit/{revision}", self.commit),
        ]
        for place in web:
            table += [
                ("GET", place + "/resolve/{revision}/{path:path}", self.resolve),
                ("POST", place + ".git/info/lfs/objects/batch", self.batch),
                ("POST", place + ".git/info/lfs/verify", self.verify),
            ]
        routes = [Route(path, answering(handler), methods=[method]) for method, path, handler in table]
        routes += [Route(place + ".git/info/lfs/objects/{sha256}", self.upload, methods=["PUT"]) for place in web]
        application = Starlette(routes=routes, exception_handlers={HubError: refuse})
        application.router.redirect_slashes = False
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        application.add_middleware(keep_encoded)
        return application


def answering(handler: Callable):
    """An endpoint that reads the body, then works outside the event loop."""

    async def endpoint(request: Request) -> Response:
        answer = await run_in_threadpool(handler, request, await request.body())
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return endpoint


def refuse(request: Request, error: HubError) -> Response:
    message = re.sub(r"[^ -~]+", " ", error.message)  # what a header can hold
    headers = {"X-Error-Message": message, **({"X-Error-Code": error.code} if error.code else {}), **error.headers}
    return JSONResponse({"error": error.message}, error.status, headers)


def keep_encoded(application):
    """Route by the percent-encoded path, so that `feature%2Fx` is one revision and not two folders."""

    async def middleware(scope, receive, send):
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("ascii")
        await application(scope, receive, send)

    return middleware


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on this machine, for tests.")
    parser.add_argument("--root", type=Path, required=True, help="the folder that holds the repositories")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, which is printed")
    parser.add_argument("--grant-seconds", type=int, default=900, help="how long an upload link works")
    options = parser.parse_args()
    application = LoopbackHub(options.root, options.grant_seconds).application()
    with socket.create_server(("127.0.0.1", options.port)) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)  # noqa: T201
        uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)).run(
            sockets=[listening]
        )


if __name__ == "__main__":
    main()
