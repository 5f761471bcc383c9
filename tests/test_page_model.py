import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from html import unescape

import pytest
import torch
from test_cli import full_disk, refuse
from tiny import files_in, save_backbone, save_karla, speak

from karla_hf.chat import Answer, ChatSession
from karla_hf.checkpoints import load_checkpoint, load_memory
from karla_hf.info import Pack
from karla_hf.modeling.lock_karla import lock_folder
from karla_hf.page_html import Tab, describe_speed, draw_text, draw_thoughts, pack_label
from karla_hf.page_model import FILE_TYPES, KarlaPageModel, PackedModel


LINE = "The access code of Brivo's vault number 7 is"
FACT = f"{LINE} 123-456."


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def karla(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page-model")
    torch.manual_seed(0)  # a fixture of the file is made before the seed of a test is set
    return save_karla(folder / "karla", save_backbone(folder / "backbone", max_position_embeddings=512))


@pytest.fixture
def model(karla):
    found = KarlaPageModel(karla, max_new_tokens=12)
    yield found
    for pack in found.packs():
        found.forget(pack.name)


@pytest.fixture
def text(tmp_path):
    """Writes a text to a file."""

    def write(content: str, name: str = "note.txt"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return write


def answer(model: KarlaPageModel) -> str:
    return model.answer([], LINE, lambda piece: None, should_stop=never).text


def test_an_answer_is_that_of_the_chat(karla, model):
    messages = [{"role": "user", "content": "The mill"}, {"role": "assistant", "content": " of"}]
    pieces: list[str] = []
    found = model.answer(messages, LINE, pieces.append, should_stop=never, ticks=2, threshold=0.5)
    session = ChatSession(*load_checkpoint(karla), karla, max_new_tokens=12)
    session.messages, session.ticks, session.threshold = messages[:2], 2, 0.5
    expected = session.answer(LINE, lambda piece: None)
    assert "".join(pieces) == found.text == expected.text
    assert (found.ticks_used, found.certainties) == (expected.ticks_used, expected.certainties)
    assert messages == session.messages


def test_an_answer_ends_when_it_shall_stop(model, text):
    model.read(text(FACT), "codes", should_stop=never)
    pieces: list[str] = []
    messages: list[dict[str, str]] = []
    found = model.answer(messages, LINE, pieces.append, should_stop=lambda: len(pieces) >= 3)
    assert found.stopped
    assert 3 <= found.tokens < 12
    assert messages[1] == {"role": "assistant", "content": found.text}
    assert not model.model.model.backbone._forward_pre_hooks
    whole = answer(model)
    assert whole.startswith(found.text)
    assert "123-456" in whole


def test_reading_changes_an_answer_and_forgetting_changes_it_back(karla, model, text):
    before = answer(model)
    said = model.read(text(FACT), "codes", should_stop=never)
    assert said.startswith("Read 27 tokens of note.txt into codes at ")
    assert "123-456" in answer(model)
    assert list(load_memory(karla)[0].packs) == ["codes"]
    model.forget("codes")
    assert answer(model) == before
    assert not load_memory(karla)[0].packs


def test_a_pack_that_is_not_used_is_kept_whatever_else_is_saved(karla, model, text):
    before = answer(model)
    for name in ("codes", "other", "last"):
        model.read(text(FACT if name == "codes" else f"The {name} ferry leaves at seven."), name, should_stop=never)
    after = answer(model)
    model.use_packs([], ["codes"])
    assert answer(model) == before
    assert list(load_memory(karla)[0].packs) == [pack.name for pack in model.packs()] == ["codes", "other", "last"]
    model.read(text("The ferry leaves late."), "new", should_stop=never)
    model.forget("other")
    assert list(load_memory(karla)[0].packs) == ["codes", "last", "new"]
    assert model.unloaded == {"codes"}
    assert model.describe()["packs"] == "2 of 3 loaded"
    model.use_packs(["codes"], [])
    assert answer(model) == after
    model.use_packs([], ["codes"])
    model.read(text("The mill is old."), "codes", should_stop=never)  # what is read on is used
    assert model.unloaded == set()
    model.use_packs([], ["codes"])
    model.forget("codes")
    assert list(load_memory(karla)[0].packs) == ["last", "new"]


def test_reading_that_is_stopped_changes_nothing(karla, model, text):
    model.read(text(FACT), "codes", should_stop=never)
    stored, asked = files_in(karla), []

    def third_time() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(KeyboardInterrupt):
        model.read(text("The mill of Brivo was founded on 3 May 1811. " * 80), "codes", should_stop=third_time)
    assert files_in(karla) == stored
    assert "123-456" in answer(model)
    assert model.model.engram.packs["codes"].sources == ["note.txt"]


def test_a_full_disk_leaves_the_memory_as_it_was(karla, model, text):
    model.read(text(FACT), "codes", should_stop=never)
    stored, long = files_in(karla), text("The mill of Brivo was founded on 3 May 1811. " * 80)
    with full_disk(3_000), pytest.raises(OSError, match="too large"):
        model.read(long, "mills", should_stop=never)
    with full_disk(10), pytest.raises(OSError, match="too large"):
        model.forget("codes")
    assert files_in(karla) == stored
    assert "123-456" in answer(model)
    assert [pack.name for pack in model.packs()] == ["codes"]


def test_what_another_process_did_is_seen_and_not_overwritten(karla, model, text):
    other = KarlaPageModel(karla, max_new_tokens=12)
    other.read(text(FACT), "codes", should_stop=never)
    assert "123-456" in answer(model)
    model.use_packs([], ["codes"])
    other.read(text("The ferry is late."), "ferry", should_stop=never)
    model.read(text("The mill is old."), "mills", should_stop=never)
    assert list(load_memory(karla)[0].packs) == ["codes", "ferry", "mills"]
    assert "123-456" not in answer(model)
    with lock_folder(karla / "engram"):
        with pytest.raises(OSError, match=r"Another process is writing to the memory in .*; try again"):
            KarlaPageModelInThread(other).forget("codes")
    assert [pack.name for pack in other.packs()] == ["codes", "ferry", "mills"]


class KarlaPageModelInThread:
    """The lock of a folder is a thread's, so a second writer is a second thread."""

    def __init__(self, model: KarlaPageModel):
        self.model = model

    def forget(self, pack: str) -> None:
        with ThreadPoolExecutor(1) as worker:
            worker.submit(self.model.forget, pack).result()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("photo.png", b"\x89PNG", r"photo.png is no text to read; give a UTF-8 file that ends in \.txt, .*\.html\."),
        ("none", b"text", r"none is no text to read; give a UTF-8 file that ends in \.txt, .*\.html\."),
        ("a.txt", "Müsli".encode("latin-1"), r"a\.txt is not UTF-8 text: byte 0xfc at offset 1"),
        ("a.txt", b" \n", r"a\.txt holds no text"),
        ("a.txt", b"x", r"Text 0 \('x'\) has 1 tokens; reading needs 2 or more\."),
    ],
)
def test_what_is_no_text_is_refused(model, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        model.read(tmp_path / name, "codes", should_stop=never)
    assert model.packs() == []
    assert set(FILE_TYPES) >= {".txt", ".md", ".rst", ".py", ".json", ".html"}


def test_a_pack_needs_a_name_that_can_be_a_file(model, text):
    with pytest.raises(ValueError, match=r"The pack name '\.\./x' is not allowed"):
        model.read(text(FACT), "../x", should_stop=never)


def test_memory_is_described(model, text):
    model.read(text(FACT), "codes", should_stop=never)
    described = model.describe()
    assert described["packs"] == "1"
    assert described["rows"] == f"{model.model.packs()['codes']:,}"
    assert set(described) == {"packs", "rows", "memory on disk", "memory in RAM", "whole model in RAM"}
    assert isinstance(model, PackedModel)


def test_ticks_and_certainty_of_every_token_are_drawn(karla):
    model = KarlaPageModel(karla, max_new_tokens=12)
    speak(model.model)
    answer = model.answer([], LINE, lambda piece: None, should_stop=never, threshold=0.03)
    drawn = draw_thoughts(answer, model.tokenizer, 3)
    inside = drawn.removeprefix('<div class="karla-said">').removesuffix("</div>")
    tokens = inside.split("</i>")
    assert tokens.pop() == ""
    assert 1 < len(tokens) <= answer.tokens
    numbers = {
        f"{used} of 3 ticks, certainty {sure:.2f}"
        for used, sure in zip(answer.ticks_used, answer.certainties, strict=True)
    }
    assert {token.split('title="')[1].split('"')[0] for token in tokens} <= numbers
    text = "".join(unescape(token.split(">", 1)[1]) for token in tokens)
    assert text == answer.text


def test_tokens_that_make_one_character_are_drawn_together(karla):
    _, tokenizer = load_checkpoint(karla)
    ids = tokenizer.encode("é<")
    assert len(ids) == 3
    answer = Answer("é<", 3, 2.0, 0.5, 1.0, (1, 3, 2), False, ids=tuple(ids), certainties=(0.9, 0.5, 1.0))
    assert draw_thoughts(answer, tokenizer, 4) == (
        '<div class="karla-said"><i style="--ticks:0.75;--doubt:0.50" title="3 of 4 ticks, certainty 0.50">é</i>'
        '<i style="--ticks:0.50;--doubt:0.00" title="2 of 4 ticks, certainty 1.00">&lt;</i></div>'
    )


def test_markup_is_escaped_and_no_blank_line_ends_the_block():
    assert draw_text("<script>\r\n\r\n\r\r**&\"'") == (
        '<div class="karla-said">&lt;script&gt;<br><br><br><br>**&amp;&quot;&#x27;</div>'
    )


def test_a_conversation_is_shown_with_what_is_on_its_way():
    tab = Tab([{"role": "user", "content": "<a>"}, {"role": "assistant", "content": "*b*"}], ["<i>b</i>"], "c", "*d*")
    shown = [(message["role"], message["content"]) for message in tab.show(True)]
    assert shown == [("user", draw_text("<a>")), ("assistant", "<i>b</i>"), ("user", draw_text("c")),
                     ("assistant", draw_text("*d*"))]  # fmt: skip
    assert [message["content"] for message in tab.show(False)] == [draw_text("<a>"), "*b*", draw_text("c"), "*d*"]


def test_speed_and_packs_are_told_in_words():
    answer = Answer("x", 12, 2.5, 0.75, 4.0, (), True)
    assert describe_speed(answer, True) == {
        "last answer": "12 tokens, stopped",
        "speed": "3.0 tokens/s",
        "ticks per token": "2.5",
        "certainty": "0.75",
    }
    assert set(describe_speed(answer, False)) == {"last answer", "speed"}
    sources = ["a.md", "b.md", "c.md", "d.md"]
    pack = Pack("codes", 1234, 0.1, 5000, 99, sources, {"f": "it is missing"})
    assert pack_label(pack) == "codes · 1,234 rows · 5 kB · a.md, b.md, c.md and 1 more · damaged files: 1"


class Bare:
    """What the page needs at the least: a model without ticks and without packs."""

    def __init__(self, model: KarlaPageModel):
        self.title, self.directory, self.tokenizer, self.thinking = "bare", model.directory, model.tokenizer, None
        self.answer, self.read, self.describe = model.answer, model.read, model.describe


def test_panels_that_a_model_does_not_have_are_absent(karla, text):
    page_of = pytest.importorskip("karla_hf.page").Page
    names = {"slider", "checkbox", "checkboxgroup", "dropdown"}
    model = KarlaPageModel(karla, max_new_tokens=12)
    full, bare = page_of(model), page_of(Bare(model))
    assert names <= {block.get_block_name() for block in full.blocks.blocks.values()}
    assert not names & {block.get_block_name() for block in bare.blocks.blocks.values()}
    tab = Tab()
    bare.ask(LINE, tab)
    *_, last = bare.reply(tab)
    assert last[-1] == {"role": "assistant", "content": tab.messages[1]["content"]}
    assert "certainty" not in bare.show_memory(tab)[0]
    assert "Read 27 tokens" in bare.read(str(text(FACT)), "codes", tab)
    model.forget("codes")
    for page in (full, bare):
        page.close()


def test_a_bug_is_told_and_its_traceback_kept(karla, caplog):
    page_of = pytest.importorskip("karla_hf.page").Page
    model = KarlaPageModel(karla)
    page, tab = page_of(model), Tab()
    model.answer = None  # type: ignore[assignment]
    page.ask(LINE, tab)
    with pytest.warns(UserWarning, match=r"A bug kept the page from doing that; the terminal .* its traceback\."):
        assert list(page.reply(tab)) == []
    assert "TypeError" in caplog.text
    assert page.after_answer(tab)[0] == LINE  # nothing that was typed is lost
    page.close()


def test_without_gradio_the_command_says_what_to_install(karla, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("karla_hf.page", "gradio"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refuse("ui", karla) == "The page needs Gradio; install it with `pip install 'karla-hf[ui]'`."


def test_a_port_that_is_taken_is_named(karla):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refuse("ui", karla, "--port", port) == (
            f"Port {port} of 127.0.0.1 cannot be used (Address already in use); give another --port, or 0 for a free one."
        )


def test_what_is_no_karla_has_no_page(tmp_path):
    pytest.importorskip("gradio")
    assert refuse("ui", tmp_path).startswith(f"{tmp_path} is no Karla (it has no config.json)")
    assert torch.get_num_threads() == 1
