"""A loopback Hub in a process of its own, and the environment with which other processes become its clients."""

import base64
import http.client
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
WRITER, READER, STRANGER = "hf_loopback_writer", "hf_loopback_reader", "hf_loopback_stranger"


@dataclass(frozen=True)
class RunningHub:
    """The URL of a server, the folder in which it keeps repositories, and a folder for what clients download."""

    url: str
    root: Path
    home: Path

    def environment(self, token: str | None = WRITER, **more: str) -> dict[str, str]:
        """Variables for a client process; they must be set before it imports huggingface_hub."""
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "no_proxy": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**inherited, **ours, **more}

    def run(self, code: str, *arguments: str, token: str | None = WRITER, **more: str) -> str:
        """Run Python code as a client of the server; returns what it printed, fails the test if the code failed."""
        command = [sys.executable, "-c", code, *arguments]
        environment = self.environment(token, **more)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def call(self, function: Callable, *, token: str | None = WRITER, **arguments):
        """Call a function in a client process: its source is sent there, so it imports what it uses itself.

        Arguments and result pass as JSON, the result as the last line that is printed.
        """
        code = textwrap.dedent(inspect.getsource(function))
        code += f"\nimport json, sys\nprint(json.dumps({function.__name__}(**json.loads(sys.argv[1]))))"
        return json.loads(self.run(code, json.dumps(arguments), token=token).splitlines()[-1])

    def ask(self, method: str, path: str, body=None, *, token: str | None = WRITER, headers=None) -> tuple:
        """Send one request as it stands, without the client; returns status, headers and body of the answer."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, path, body, {**authorization, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def create(self, name: str, **options) -> str:
        """Create a repository of karla unless it exists; returns the hash of main."""
        status, _, body = self.ask("POST", "/api/repos/create", {"name": name, **options})
        assert status in (200, 409), body
        return self.head(name)

    def head(self, name: str) -> str:
        """The hash of main."""
        return json.loads(self.ask("GET", f"/api/models/karla/{name}")[2])["sha"]

    def commit(self, name: str, *operations: dict) -> tuple:
        """Commit to main of a model of karla, without the client and what it checks; returns what `ask` does."""
        lines = [{"key": "header", "value": {"summary": "by hand", "description": ""}}, *operations]
        body = "\n".join(map(json.dumps, lines)).encode()
        return self.ask("POST", f"/api/models/karla/{name}/commit/main", body)


def regular_file(path: str, content: bytes) -> dict:
    """The operation of a commit that adds a file to git."""
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(content).decode()}}


@contextmanager
def running_hub(folder: Path, *options: str) -> Iterator[RunningHub]:
    """Start a server on a free port, with repositories in `folder/hub`; it is stopped on leaving the block."""
    command = [sys.executable, str(TESTS / "loopback_hub.py"), "--root", str(folder / "hub"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), "the loopback Hub did not start"
            yield RunningHub(url, folder / "hub", folder / "home")
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def loopback_hub(tmp_path_factory) -> Iterator[RunningHub]:
    """One server for all tests: each test names its own repositories in the namespace `karla`."""
    with running_hub(tmp_path_factory.mktemp("loopback")) as hub:
        yield hub
