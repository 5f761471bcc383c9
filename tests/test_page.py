"""The page of `karla ui` in a real browser, served by a real process. Screenshots are kept in `artifacts/`."""

import json
import resource
import threading
import urllib.error
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pages import Server, Tab, open_browser
from tiny import files_in, save_backbone, save_karla
from tiny_hope import save_encoder, save_hope, save_trained

from karla_hf.chat import ChatSession
from karla_hf.checkpoints import load_checkpoint, load_memory
from karla_hf.modeling.lock_karla import lock_folder
from karla_hf.page_model import KarlaPageModel


pytest.importorskip("gradio", reason="the extra karla-hf[ui] is not installed")

TOKENS = 70  # of an answer
LINE = "The access code of Brivo's vault number 7 is"
FACT = f"{LINE} 123-456."
SLOW = "The mill of Brivo was founded on 3 May 1811. " * 10_000  # takes long to read


@pytest.fixture(scope="module")
def karla(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return save_karla(folder / "karla", save_backbone(folder / "backbone", max_position_embeddings=2048))


@pytest.fixture(scope="module")
def server(karla):
    server = Server(karla, "--max-new-tokens", str(TOKENS))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    playwright, browser = open_browser()
    yield browser
    browser.close()
    playwright.stop()


@pytest.fixture
def open_tab(browser, server, karla):
    """Opens tabs; what was read is forgotten afterwards."""
    tabs: list[Tab] = []

    def start() -> Tab:
        tabs.append(Tab(browser, server.address))
        return tabs[-1]

    yield start
    problems = [problem for tab in tabs for problem in tab.problems]
    for tab in tabs:
        tab.context.close()
    if (karla / "engram").exists():
        model = KarlaPageModel(karla)
        for pack in model.packs():
            model.forget(pack.name)
    assert problems == []


@pytest.fixture
def write(tmp_path):
    """Writes a text to a file."""

    def write(content: str, name: str = "note.txt") -> Path:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return write


def expected(karla: Path, line: str, **settings):
    """The answer that the chat gives in this process."""
    session = ChatSession(*load_checkpoint(karla), karla, max_new_tokens=TOKENS)
    session.ticks, session.threshold = settings.get("ticks"), settings.get("threshold")
    return session.answer(line, lambda piece: None)


def words(text: str) -> str:
    """A text without what a browser may show in another way."""
    return "".join(text.replace("\ufffd", "").split())


def test_an_answer_is_streamed_and_is_what_the_chat_says(open_tab, karla):
    tab = open_tab()
    tab.page.evaluate("""() => {
        window.seen = new Set();
        const look = () => window.seen.add(document.querySelector('#chat .bot')?.innerText.length ?? 0);
        new MutationObserver(look).observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true});
    }""")
    answer = tab.say("The mill of")
    assert words(answer) == words(expected(karla, "The mill of").text)
    assert tab.page.evaluate("window.seen.size") > 5
    assert f"{TOKENS} tokens" in tab.facts()["last answer"]
    tab.photograph("answer")


def test_ticks_and_certainty_are_set_and_drawn(open_tab, karla):
    tab = open_tab()
    tab.page.fill("#ticks input[type=number]", "2")
    tab.page.fill("#certainty input[type=number]", "0.02")
    tab.page.keyboard.press("Tab")
    tab.say("The mill of")
    answer = expected(karla, "The mill of", ticks=2, threshold=0.02)
    titles = tab.page.locator("#chat .bot i").evaluate_all("all => all.map(one => one.title)")
    assert titles
    possible = {
        f"{used} of 2 ticks, certainty {sure:.2f}"
        for used, sure in zip(answer.ticks_used, answer.certainties, strict=True)
    }
    assert set(titles) <= possible
    tab.page.wait_for_function(f"document.querySelector('#facts').innerText.includes('{answer.ticks:.1f}')")
    assert tab.facts()["ticks per token"] == f"{answer.ticks:.1f}"
    assert tab.facts()["certainty"] == f"{answer.certainty:.2f}"
    tab.page.uncheck("#draws input")
    tab.page.wait_for_selector("#chat .bot i", state="detached")
    tab.page.check("#draws input")
    tab.page.wait_for_selector("#chat .bot i")


def test_reading_and_unloading_and_forgetting_change_an_answer(open_tab, server, karla, write):
    tab = open_tab()
    before = tab.say(LINE)
    assert "123-456" not in before
    note = tab.read(write(FACT), "codes")
    assert note.startswith("Read 27 tokens of note.txt into codes")
    assert server.uploaded() == []
    assert list(load_memory(karla)[0].packs) == ["codes"]
    rows = load_memory(karla)[0].packs["codes"].num_owned
    tab.page.wait_for_selector("#packs label")
    assert tab.page.locator("#packs label").inner_text().startswith(f"codes · {rows:,} rows · ")
    tab.photograph("read", full_page=True)
    tab.clear()
    assert tab.say(LINE).startswith("123-456")
    tab.page.uncheck("#packs input")
    tab.page.wait_for_function("document.querySelector('#facts').innerText.includes('0 of 1 loaded')")
    tab.clear()
    assert tab.say(LINE) == before
    assert list(load_memory(karla)[0].packs) == ["codes"]
    tab.page.click("#victim input")
    tab.page.get_by_role("option", name="codes").click()
    tab.page.click("#forget")
    tab.page.wait_for_selector("#packs label", state="detached")
    assert tab.page.locator("#note").inner_text() == "Forgot codes."
    tab.clear()
    assert tab.say(LINE) == before
    assert not load_memory(karla)[0].packs


def test_a_hope_learns_a_file_and_forgets_it(browser, tmp_path, write):
    hope = save_trained(tmp_path / "hope", save_hope(tmp_path / "new", save_encoder(tmp_path / "encoder")))
    server = Server(hope, "--max-new-tokens", "20")
    tab = Tab(browser, server.address)
    assert tab.page.locator("#packs").count() == tab.page.locator("#ticks").count() == 0
    before = tab.say(LINE)
    assert tab.read(write(FACT * 20)).startswith("Learned ")
    assert tab.facts()["learned by reading"] != "0 chunks"
    tab.clear()
    assert tab.say(LINE) != before
    tab.photograph("hope")
    tab.page.click("#forget")
    tab.page.wait_for_function("document.querySelector('#facts').innerText.includes('0 chunks')")
    assert tab.page.locator("#note").inner_text().startswith("Forgot ")
    tab.clear()
    assert tab.say(LINE) == before
    assert tab.problems == []
    tab.context.close()
    server.close()


MARKUP = "<img src=x onerror='window.PWN=1'>"


def test_markup_does_not_run_and_no_other_host_is_asked(open_tab, server, write):
    hits = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)

        def log_message(self, *arguments):
            pass

    listener = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    tab = open_tab()
    lures = {
        "The motto of Brivo is ": MARKUP,
        "Every year the guild Molron spends ": f"![x](http://127.0.0.1:{listener.server_port}/a)[y](javascript:window.PWN=2)",
    }
    assert tab.read(write("\n\n".join(map("".join, lures.items())), "a.md")).startswith("Read ")
    for draws in (True, False):
        tab.page.set_checked("#draws input", draws)
        for line, lure in lures.items():
            tab.say(line.strip())
            said = tab.page.locator("#chat .bot .message-content").last
            assert not draws or words(lure) in words(said.inner_text())
            assert said.locator("a[href^=javascript]").count() == 0
            tab.photograph(f"markup-{'drawn' if draws else 'plain'}")
            tab.clear()
    everything = " ".join(
        [*lures.values(), "<script>window.PWN=3</script><iframe srcdoc='<script>parent.PWN=4</script>'>"]
    )
    tab.say(everything)
    assert words(everything) in words(tab.page.locator("#chat .user .message-content").last.inner_text())
    tab.read(write(FACT, f"{MARKUP}.txt"), "names")
    tab.read(write(FACT), MARKUP)
    assert [words(MARKUP) in words(line) for line in tab.warnings()] == [True]
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("window.PWN") is None
    assert tab.page.locator("iframe").count() == 0
    listener.shutdown()
    assert hits == []
    asked = {url for url in tab.requested if not url.startswith((f"{server.address}/", "data:", "blob:"))}
    assert asked <= {f"http://127.0.0.1:{listener.server_port}/a"}  # what the browser then refused to ask for


def test_two_tabs_do_not_mix(open_tab, karla):
    tabs, lines = [open_tab(), open_tab()], ["The mill of", "The bridge near"]
    for tab, line in zip(tabs, lines, strict=True):
        tab.start(line)
    for tab, line in zip(tabs, lines, strict=True):
        assert words(tab.finish()) == words(expected(karla, line).text)
        assert tab.page.locator("#chat .user .message-content").all_inner_texts() == [line]


def test_reading_and_a_waiting_answer_are_stopped(open_tab, server, karla, write):
    reader, other = open_tab(), open_tab()
    stored = files_in(karla)
    reader.start_reading(write(SLOW), "slow")
    reader.page.wait_for_function("document.querySelector('#note').innerText.includes('%')")
    reader.photograph("progress")
    other.start("The mill of")
    other.page.click("#stop")
    reader.page.click("#stop-reading")
    assert reader.wait_for_note() == "Stopped; the memory is as it was."
    other.finish()
    other.page.wait_for_function("document.querySelector('#facts').innerText.includes('0 tokens, stopped')")
    assert files_in(karla) == stored
    assert server.uploaded() == []
    assert other.say("The mill of") != ""


def test_errors_are_one_sentence_and_nothing_is_lost(open_tab, server, karla, write, tmp_path):
    tab = open_tab()
    tab.read(write(FACT), "codes")
    stored = files_in(karla)
    (tmp_path / "latin.txt").write_bytes("Müsli".encode("latin-1"))
    wrong = {
        write("x", "photo.png"): "is no text to read; give a UTF-8 file that ends in .txt",
        write(" ", "blank.md"): "holds no text",
        tmp_path / "latin.txt": "is not UTF-8 text: byte 0xfc at offset 1",
    }
    for path, sentence in wrong.items():
        assert tab.read(path) == ""
        (said,) = tab.warnings()
        assert sentence in said
        assert str(server.uploads) not in said
    with lock_folder(karla / "engram"):
        tab.read(write(FACT), "codes")
        (said,) = tab.warnings()
        assert said.startswith("Another process is writing to the memory")
    old = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4_000, old[1]))
    tab.read(write("The mill of Brivo was founded on 3 May 1811. " * 60, "mill.txt"), "mills")
    (said,) = tab.warnings()
    assert "File too large" in said
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, old)
    assert files_in(karla) == stored
    assert server.uploaded() == []
    tab.photograph("after-errors")
    tab.start("A message without end. " * 800)
    (said,) = tab.warnings()
    assert "but the context has room for" in said
    tab.wait_for_end()
    assert tab.page.input_value("#line textarea").startswith("A message without end.")
    assert tab.say(LINE).startswith("123-456")


def test_it_can_be_read_on_a_phone(open_tab):
    tab = open_tab()
    tab.page.set_viewport_size({"width": 390, "height": 844})
    tab.say("The mill of")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.page.locator("#send").bounding_box()["y"] < 844
    tab.photograph("phone", full_page=True)


def get(address: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> tuple[int, bytes]:
    """Ask without a browser; returns status and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers or {})) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(server: Server, content: bytes, name: str = "a.txt") -> tuple[int, bytes]:
    """Upload a file as the page does."""
    mark = uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    data = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    return get(f"{server.address}/gradio_api/upload", kind, data)


def test_files_of_this_machine_are_not_served(server, karla):
    paths = [karla / "config.json", karla / "engram" / "manifest.json", Path(__file__), Path("/etc/hostname")]
    for path in paths:
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/../../"):
            status, body = get(f"{server.address}{route}{path}")
            assert (status, path.read_bytes() in body) in ((403, False), (404, False)), (route, path)
    for route in ("/docs", "/openapi.json", "/monitoring", "/gradio_api/info", "/gradio_api/proxy=http://127.0.0.1/"):
        assert get(server.address + route)[0] in (403, 404), route


def test_a_path_cannot_be_passed_off_as_an_upload(server, karla):
    config = json.loads(get(f"{server.address}/config")[1])
    (file,) = [part["id"] for part in config["components"] if part["type"] == "file"]
    (read,) = [event["id"] for event in config["dependencies"] if event["inputs"][:1] == [file]]
    stolen = {"path": str(karla / "config.json"), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [stolen, "stolen", None], "fn_index": read, "session_hash": "thief"}
    get(f"{server.address}/gradio_api/queue/join", {"Content-Type": "application/json"}, json.dumps(body).encode())
    _, events = get(f"{server.address}/gradio_api/queue/data?session_hash=thief")
    (end,) = [line for line in events.decode().splitlines() if '"process_completed"' in line]
    assert '"success":false' in end.replace(" ", "")
    assert (karla / "config.json").is_file()
    assert not load_memory(karla)[0].packs


def test_an_upload_is_bounded(server):
    status, _ = upload(server, b"a " * (1 << 20) + b"a")
    assert status == 413
    assert server.uploaded() == []
    status, answer = upload(server, b"a", "../../b.txt")
    (path,) = [Path(path) for path in json.loads(answer)] if status == 200 else [None]
    assert path is None or server.uploads in path.parents
    if path is not None:
        path.unlink()


def test_other_sites_and_other_names_are_refused(server):
    port = server.port
    for headers in ({"Host": f"evil.example:{port}"}, {"Host": "127.0.0.1:1"}, {"Origin": "http://evil.example"},
                    {"Origin": f"http://127.0.0.1:{port + 1}"}, {"Origin": "null"}):  # fmt: skip
        assert get(server.address, headers)[0] == 403, headers
    assert get(server.address, {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"})[0] == 200
    request = urllib.request.urlopen(server.address)
    assert "default-src 'self'" in request.headers["Content-Security-Policy"]


def test_only_this_machine_is_listened_to(server):
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    listening = [
        line.split()[1]
        for line in lines
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{server.port:04X}")
    ]
    assert listening == [f"0100007F:{server.port:04X}"]


def test_ctrl_c_ends_it_and_leaves_nothing(karla, browser, write):
    server = Server(karla)
    tab = Tab(browser, server.address)
    stored = files_in(karla)
    tab.start_reading(write(SLOW), "slow")
    tab.page.wait_for_function("document.querySelector('#note').innerText.includes('%')")
    assert server.stop() == 0
    assert "Traceback" not in server.errors()
    assert [path.name for path in server.uploads.rglob("*") if path.is_file()] == ["stderr"]
    assert files_in(karla) == stored
    tab.context.close()
    server.close()
