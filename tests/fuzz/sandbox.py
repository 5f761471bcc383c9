"""What holds for every damaged file: success or one sentence, soon, without much memory, and nothing written outside."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

from karla_hf.errors import as_sentence


SECONDS = 20  # of a case; they take milliseconds
GROWTH = 128 << 20  # bytes that a case may take at its peak
LEAST = 2000  # cases of a whole run


class HangError(BaseException):
    """A case took longer than it may."""


class Sandbox:
    """Runs cases in a folder whose surroundings are watched.

    Attributes:
        folder: where the files of a case are.
        cases: cases that were run in this session.
        refused: those that ended in a sentence.
    """

    cases = refused = 0

    def __init__(self, root: Path):
        self.root, self.folder = root, root / "inside"
        (root / "beside").mkdir()
        (root / "beside" / "outside.safetensors").write_bytes(b"outside")
        (root / "outside.safetensors").write_bytes(b"outside")

    def fill(self, valid: Path) -> Path:
        """Make the folder a copy of another one."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(valid, self.folder)
        return self.folder

    def run(self, call: Callable[[], object]) -> str | None:
        """Run a case; returns the sentence that it was refused with, or None. Any other error is a failure."""
        Sandbox.cases += 1
        around, before = self._around(), _peak_of_memory(reset=True)
        previous = signal.signal(signal.SIGALRM, _hang)
        left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            call()
            sentence = None
        except Exception as error:
            sentence = as_sentence(error)
            if not sentence:
                raise
            Sandbox.refused += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
            signal.setitimer(signal.ITIMER_REAL, left)  # pytest-timeout's
        assert self._around() == around, "something was written outside of the folder"
        assert _peak_of_memory() - before < GROWTH, "a lying header was believed"
        return sentence

    def _around(self) -> list[tuple[str, int, int]]:
        inside = str(self.folder)
        found = []
        for root, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if os.path.join(root, name) != inside]
            for name in [*folders, *files]:
                status = os.lstat(os.path.join(root, name))
                found.append((os.path.join(root, name), status.st_size, status.st_mtime_ns))
        return sorted(found)


def _hang(number, frame) -> None:
    raise HangError(f"the case took more than {SECONDS} s")


def _peak_of_memory(*, reset: bool = False) -> int:
    """Most bytes of RAM that this process has had, since the last reset where the system allows one."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def cases(number: int) -> settings:
    """Settings of a test with so many cases; `--hypothesis-profile=explore` draws other ones, and three times as many."""
    checks = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ]
    return settings(
        max_examples=number * settings.default.max_examples // 100,
        suppress_health_check=checks,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # without shrinking, so that a failure comes soon
    )
