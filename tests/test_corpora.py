import json
import re

import pytest

from karla_hf.corpora import HELD_OUT_TOPICS, load_corpus
from karla_hf.documents import python_reference, unrelated_text


def paragraphs(text):
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_python_reference_is_split_by_topic():
    corpus = load_corpus("python-reference")
    assert corpus.held_out["text"] == [python_reference()[topic] for topic in HELD_OUT_TOPICS]
    words = [sum(len(text.split()) for text in rows["text"]) for rows in corpus]
    assert words[0] > 30_000
    assert 0.08 < words[1] / sum(words) < 0.2


def test_no_paragraph_of_the_python_reference_occurs_twice():
    corpus = load_corpus("python-reference")
    held_out = set().union(*map(paragraphs, corpus.held_out["text"]))
    seen = set()
    for text in corpus.train["text"]:
        own = paragraphs(text)
        assert not own & held_out
        assert not own & seen
        seen |= own
    everything = set().union(*map(paragraphs, python_reference().values()))
    assert seen | held_out == everything


def test_one_text_gives_its_end_to_the_held_out_rows(tmp_path):
    (tmp_path / "story.txt").write_text(unrelated_text(), encoding="utf-8")
    corpus = load_corpus(files=[tmp_path / "story.txt"], held_out_share=0.25)
    assert corpus.train["text"][0] + "\n\n" + corpus.held_out["text"][0] == unrelated_text()
    assert 0.1 < len(corpus.held_out["text"][0]) / len(unrelated_text()) < 0.4


def test_lines_are_cut_where_there_are_no_paragraphs(tmp_path):
    (tmp_path / "log.txt").write_text("one\ntwo\nthree\n")
    corpus = load_corpus(files=[tmp_path / "log.txt"], held_out_share=0.01)
    assert (corpus.train["text"], corpus.held_out["text"]) == (["one\ntwo"], ["three"])


@pytest.mark.parametrize(
    "row",
    [
        {"text": "The ferry is late."},
        {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At nine."}]},
        {"prompt": "The ferry leaves at", "completion": " nine."},
    ],
)
def test_json_lines_are_rows_and_the_split_is_fixed(tmp_path, row):
    lines = [json.dumps({**row, "number": number, "other": None}) for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:15]) + "\n\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[15:]), encoding="utf-8")
    corpus = load_corpus(files=[tmp_path / "a.jsonl", tmp_path / "b.jsonl"], held_out_share=0.2)
    assert [len(rows) for rows in corpus] == [16, 4]
    assert set(corpus.train.column_names) == set(row)
    assert corpus.train[0] == row


def test_split_is_the_same_every_time_and_nothing_is_lost(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"row {n}"}) for n in range(30)))
    first, second = (load_corpus(files=[tmp_path / "rows.jsonl"]) for _ in range(2))
    assert [rows["text"] for rows in first] == [rows["text"] for rows in second]
    assert sorted([*first.train["text"], *first.held_out["text"]]) == sorted(f"row {n}" for n in range(30))


def test_texts_and_rows_of_text_go_together(tmp_path):
    (tmp_path / "a.txt").write_text("The ferry is late.")
    (tmp_path / "b.jsonl").write_text('{"text": "The orchard is wet."}')
    corpus = load_corpus(files=[tmp_path / "a.txt", tmp_path / "b.jsonl"], held_out_share=0.5)
    assert sorted([*corpus.train["text"], *corpus.held_out["text"]]) == ["The ferry is late.", "The orchard is wet."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"rows\.jsonl, line 2 is not JSON \(.* at column 2\); correct the line\.$"),
        ('{"question": "?"}', r"line 2 has the keys \['question'\]; give one of \"text\", \"messages\", or"),
        ('["text"]', r"line 2 has the keys \[\]; give one of"),
        ('{"text": ""}', r"line 2 has the keys \['text'\]; give one of .*, not blank\.$"),
        ('{"text": "a", "messages": [1]}', r"line 2 has the keys \['messages', 'text'\]; give one of"),
        (
            '{"messages": [1]}',
            r"rows\.jsonl mix rows with \['messages'\] and with \['text'\]; give rows of one kind\.$",
        ),
    ],
)
def test_damaged_rows_are_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        load_corpus(files=[tmp_path / "rows.jsonl"])


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "line.txt").write_text("The ferry is late.\n")
    with pytest.raises(ValueError, match=r"is a single line, so nothing can be held out; give a longer text\.$"):
        load_corpus(files=[tmp_path / "line.txt"])
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(ValueError, match=r"holds 1 row\(s\), too few to hold one out; give 2 or more\.$"):
        load_corpus(files=[tmp_path / "one.jsonl"])


def test_of_a_folder_every_text_is_a_row(tmp_path):
    (tmp_path / "docs" / "b").mkdir(parents=True)
    (tmp_path / "docs" / "a.rst").write_text("The first.")
    (tmp_path / "docs" / "b" / "c.txt").write_text("The second.")
    (tmp_path / "docs" / "d.bin").write_bytes(b"\xff")
    corpus = load_corpus(files=[tmp_path / "docs"], held_out_share=0.5)
    assert sorted([*corpus.train["text"], *corpus.held_out["text"]]) == ["The first.", "The second."]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.txt"))):
        load_corpus(files=[tmp_path / "none.txt"])


def test_data_set_that_is_nowhere():
    with pytest.raises(OSError, match="no/such-data"):
        load_corpus("no/such-data")
