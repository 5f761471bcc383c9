"""A loopback Hub in a process of its own, and the environment with which other processes become its clients."""

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
            **({"HF_TOKEN": token} if token else {}),
        }
        inherited = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        return {**inherited, **ours, **more}

    def run(self, code: str, *arguments: str, token: str | None = WRITER, **more: str) -> str:
        """Run Python code as a client of the server; returns what it printed, fails the test if the code failed."""
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, env=self.environment(token, **more), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def call(self, function: Callable, *, token: str | None = WRITER, **arguments):
        """Call a function in a client process: its source is sent there, so it imports what it uses itself.

        Arguments and result pass as JSON, the result as the last line that is printed.
        """
        code = textwrap.dedent(inspect.getsource(function))
        code += f"\nimport json, sys\nprint(json.dumps({function.__name__}(**json.loads(sys.argv[1]))))"
        return json.loads(self.run(code, json.dumps(arguments), token=token).splitlines()[-1])


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
