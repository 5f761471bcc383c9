"""`karla ui` in a process of its own, and a headless Chromium that looks at it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest


CHROMIUM = shutil.which("chromium")
ARTIFACTS = Path(os.environ.get("KARLA_ARTIFACTS", Path(__file__).parent.parent / "artifacts"))
SECONDS = 120  # most that anything may take; a busy machine is slow


class Server:
    """The page of a Karla, on a free port."""

    def __init__(self, directory: Path, *options: str):
        self.uploads = Path(tempfile.mkdtemp(prefix="karla-test-"))
        code = "from karla_hf.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "ui", str(directory), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=(self.uploads / "stderr").open("wb"),
            text=True,
            env={**os.environ, "TMPDIR": str(self.uploads), "OMP_NUM_THREADS": "1"},
        )
        stdout: IO[str] = self.process.stdout  # type: ignore[assignment]
        found = re.search(r"http://127\.0\.0\.1:(\d+)", stdout.readline())
        assert found, self.errors()
        self.address, self.port = found[0], int(found[1])

    def errors(self) -> str:
        """What it wrote to standard error."""
        return (self.uploads / "stderr").read_text(encoding="utf-8")

    def uploaded(self) -> list[Path]:
        """Files that people uploaded and that are still there; Gradio leaves an empty one for each until the end."""
        return [path for path in self.uploads.glob("karla-page-*/**/*") if path.is_file() and path.stat().st_size]

    def stop(self) -> int:
        """Press Ctrl-C and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        """End it however it is, and remove what it left."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.uploads)


class Tab:
    """A browser tab with the page."""

    def __init__(self, browser, address: str):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.context.set_default_timeout(1000 * SECONDS)
        self.page = self.context.new_page()
        self.requested: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#facts dd")
        self.ended = 0  # answers and readings that were waited for

    def wait_for_end(self) -> None:
        """Wait until one more answer or reading has ended."""
        self.ended += 1
        self.page.wait_for_selector(f"#facts [data-ended='{self.ended}']")

    def start(self, line: str) -> None:
        """Send a line."""
        self.page.fill("#line textarea", line)
        self.page.click("#send")

    def finish(self) -> str:
        """Wait for the answer and return its text as it is shown."""
        self.wait_for_end()
        return self.answer()

    def answer(self) -> str:
        """The text of the last answer."""
        return self.page.locator("#chat .bot .message-content, #chat .bot").last.inner_text().strip()

    def say(self, line: str) -> str:
        """Send a line and return the answer."""
        self.start(line)
        return self.finish()

    def clear(self) -> None:
        """Begin a new conversation."""
        self.page.get_by_label("Clear").click()
        self.page.wait_for_selector("#chat .bot", state="detached")

    def start_reading(self, path: Path, pack: str = "default") -> None:
        """Drop a file."""
        if self.page.locator("#pack").count():
            self.page.fill("#pack input, #pack textarea", pack)
        self.page.set_input_files("#file input[type=file]", path)

    def read(self, path: Path, pack: str = "default") -> str:
        """Drop a file and return what the page says when it is done."""
        self.start_reading(path, pack)
        return self.wait_for_note()

    def wait_for_note(self) -> str:
        """Wait until nothing is being read, and return what is said of it; of a failure, the warning."""
        self.wait_for_end()
        self.page.wait_for_selector("#file input[type=file]", state="attached")
        return self.page.locator("#note").inner_text().strip()

    def warnings(self) -> list[str]:
        """The sentences that are shown in a corner, which are closed then."""
        self.page.wait_for_selector(".toast-body")
        found = self.page.locator(".toast-body").all_inner_texts()
        self.page.locator(".toast-close").evaluate_all("all => all.forEach(one => one.click())")
        self.page.wait_for_selector(".toast-body", state="detached")
        return [line for text in found for line in text.splitlines() if line.endswith(".")]

    def facts(self) -> dict[str, str]:
        """The panel of memory and speed."""
        names = self.page.locator("#facts dt").all_inner_texts()
        return dict(zip(names, self.page.locator("#facts dd").all_inner_texts(), strict=True))

    def photograph(self, name: str, **options) -> Path:
        """Keep a screenshot with the artefacts of the tests."""
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"{name}.png"
        self.page.screenshot(path=path, **options)
        return path


def open_browser():
    """Headless Chromium; skips the test if there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright = sync_api.sync_playwright().start()
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    return playwright, browser
