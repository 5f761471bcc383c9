"""Reading: windows over texts, and the writes that follow from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import logging

from karla_hf.modeling.reading_karla import read_texts
from karla_hf.modeling.reference_engram import NaivePack, rows_by_level
from karla_hf.modeling.reference_writing import naive_write_chunk
from karla_hf.modeling.windows_karla import plan_windows, sentence_starts


HIDDEN, VOCAB = 24, 50
WINDOWS = {"window": 6, "stride": 3, "least": 4, "batch_tokens": 18}


@pytest.fixture
def new_memory(make_engram):
    """Function that makes an empty memory of two families, that writes seven positions together."""

    def make(**options):
        defaults = {"orders": (2, 9), "weights": (0.5, 0.5), "words": 40, "chunk_size": 7, "update_periods": [1, 2, 4]}
        return make_engram(**{**defaults, **options})

    return make


@pytest.fixture
def weight():
    """Rows of the output layer."""
    return torch.randn(VOCAB, HIDDEN)


class Reader:
    """A stand-in for a backbone: a state depends on all tokens of its window up to its own."""

    def __init__(self):
        self.embeddings = torch.randn(VOCAB, HIDDEN)
        self.decay = torch.linspace(0.5, 0.9, HIDDEN)
        self.shown = []

    def __call__(self, input_ids, attention_mask):
        self.shown += [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        states, state = [], torch.zeros(len(input_ids), HIDDEN)
        for ids, mask in zip(input_ids.T, attention_mask.T, strict=True):
            state = state * self.decay + self.embeddings[ids] * mask[:, None]
            states.append(state / (1 + state.norm(dim=-1, keepdim=True)))
        return torch.stack(states, dim=1)


def read(texts, engram, reader, weight, bias=None, *, pack="a", sign=1, **windows):
    texts, options = [torch.tensor(text) for text in texts], {**WINDOWS, **windows}
    return read_texts(
        texts, engram, engram.open_pack(pack), reader, weight, bias, sign=sign, progress=False, **options
    )


def bytes_of(pack):
    tables = [(table.names.tobytes(), table.rows.tobytes()) for level in pack.levels for table in level.tables]
    return tables, pack.clock.step, pack.tokens


def naive_read_texts(texts, engram, pack, name_text, reader, weight, sign):
    """One window after the other, one text's names at a time; surprises before and after, positions written."""
    positions = []
    starts = [sentence_starts(torch.tensor(text), engram.constants.boundaries, WINDOWS["least"]) for text in texts]
    for w in plan_windows([len(text) for text in texts], WINDOWS["window"], WINDOWS["stride"], starts):
        text = torch.tensor(texts[w.text])
        shown = text[w.start : w.end][None]
        states = reader(shown, torch.ones_like(shown))[0]
        names = name_text(engram, text)
        positions += [(names[t], states[t - w.start], text[t + 1]) for t in range(w.keep, w.end)]
    before, after, written = [], [], 0
    for at in range(0, len(positions), engram.layout.chunk_size):
        chunk = [torch.stack(part) for part in zip(*positions[at : at + engram.layout.chunk_size], strict=True)]
        result = naive_write_chunk(engram, pack, *chunk, weight, sign=sign)
        pack.tick()
        before += result.surprise_before.tolist()
        after += result.surprise_after.tolist()
        written += int(result.written.sum())
    return before, after, written


@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=4),
    window=st.integers(2, 12),
    stride=st.integers(1, 12),
)
def test_windows_use_every_token_but_the_last_once_and_in_order(lengths, window, stride):
    stride = min(stride, window)
    windows = plan_windows(lengths, window, stride)
    used = [(w.text, t) for w in windows for t in range(w.keep, w.end)]
    assert used == [(text, t) for text, length in enumerate(lengths) for t in range(length - 1)]
    for w in windows:
        assert w.end - w.start <= window
        assert w.start == max(0, w.end - window)
        assert w.keep == 0 or w.end - w.keep <= stride


@given(data=st.data(), lengths=st.lists(st.integers(2, 50), min_size=1, max_size=3), window=st.integers(2, 12))
def test_windows_do_not_look_back_beyond_their_sentence(data, lengths, window):
    stride = data.draw(st.integers(1, window))
    starts = [sorted({0, *data.draw(st.lists(st.integers(1, length - 1), max_size=5))}) for length in lengths]
    windows = plan_windows(lengths, window, stride, starts)
    used = [(w.text, t) for w in windows for t in range(w.keep, w.end)]
    assert used == [(text, t) for text, length in enumerate(lengths) for t in range(length - 1)]
    for w in windows:
        begin = max(start for start in starts[w.text] if start <= w.keep)
        assert w.start == max(begin, w.end - window) or (w.start == w.keep == begin)
        assert not any(w.start < start < w.end for start in starts[w.text])


def test_short_sentence_is_joined_with_the_next(new_memory):
    text = torch.tensor([1, 2, 48, 21, 3, 48, 5, 6, 49, 7, 8, 9, 10, 48, 22])  # 48 ends before 20 to 39, 49 always
    boundaries = new_memory().constants.boundaries
    assert sentence_starts(text, boundaries, least=1) == [0, 3, 9, 14]
    assert sentence_starts(text, boundaries, least=4) == [0, 9, 14]
    assert sentence_starts(text, boundaries, least=10) == [0, 14]


def test_backbone_sees_each_sentence_alone(new_memory, weight):
    reader = Reader()
    text = [1, 2, 3, 4, 48, 21, 5, 6, 7, 49, 8, 9, 10, 11, 12]
    read([text], new_memory(), reader, weight, window=20, stride=20, batch_tokens=100)
    assert sorted(reader.shown) == sorted([text[:5], text[5:10], text[10:14]])


TEXTS = {
    "two tokens": [[3, 4]],
    "one window": [[1, 2, 3, 4, 5, 6, 7]],
    "one token more": [[1, 2, 3, 4, 5, 6, 7, 8]],
    "sentences": [[48, 49, 20, 5, 48, 21, 7, 8, 9, 10, 48, 30, 1, 2, 3, 4, 5, 6, 7, 48, 20, 6], [49, 48, 20, 4, 49]],
    "several": [list(range(1, 30)), [3, 4], list(range(45, 20, -1)), [7, 7, 7, 7, 7, 7]],
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("texts", TEXTS)
def test_reading_equals_naive(new_memory, name_text, weight, texts, sign):
    ours, theirs, reader = new_memory(), new_memory(), Reader()
    if sign == -1:
        reader.embeddings = weight.roll(-1, 0)  # sure of the next token where a text counts upwards
    naive = theirs.packs["a"] = NaivePack(theirs.layout)
    report = read(TEXTS[texts], ours, reader, weight, sign=sign)
    before, after, written = naive_read_texts(TEXTS[texts], theirs, naive, name_text, reader, weight, sign)
    assert report.positions_written == written
    assert written or texts == "two tokens"
    assert report.surprise_before == pytest.approx(sum(before) / len(before), rel=1e-3)
    assert report.surprise_after == pytest.approx(sum(after) / len(after), rel=1e-2, abs=1e-3)
    assert ours.packs["a"].clock.step == naive.step
    for mine, other in zip(rows_by_level(ours.packs["a"]), rows_by_level(naive), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.allclose(row, other[name], rtol=1e-2, atol=5e-3) for name, row in mine.items())


@pytest.mark.parametrize("batch_tokens", [6, 12, 18, 600])
@pytest.mark.parametrize("chunk_size", [1, 7, 13, 100])
def test_chunks_are_cut_wherever_batches_end(new_memory, weight, chunk_size, batch_tokens):
    engram, whole, reader = new_memory(chunk_size=chunk_size), new_memory(chunk_size=chunk_size), Reader()
    reports = [
        read(TEXTS["several"], memory, reader, weight, batch_tokens=tokens)[:8]
        for memory, tokens in ((engram, batch_tokens), (whole, 10_000))
    ]
    assert reports[0] == reports[1]
    assert bytes_of(engram.packs["a"]) == bytes_of(whole.packs["a"])
    positions = sum(len(text) - 1 for text in TEXTS["several"])
    assert engram.packs["a"].clock.step == -(-positions // chunk_size)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_two_readings_equal_one_where_a_chunk_ends(new_memory, weight, first, sign):
    """On rows, levels and clock, byte for byte."""
    texts = [torch.randint(1, VOCAB, (length,)).tolist() for length in (8, 15, 22, 5, 11, 30)]  # 7, 14, 21, 4 + 10, 29
    first = first if first < 4 else 5
    once, twice, reader = new_memory(), new_memory(), Reader()
    for memory in (once, twice):
        read(texts, memory, reader, weight)  # something to unlearn
    read(texts, once, reader, weight, pack="b", sign=sign)
    for part in (texts[:first], texts[first:]):
        read(part, twice, reader, weight, pack="b", sign=sign)
    assert once.packs["b"].clock.step == twice.packs["b"].clock.step == 13
    assert bytes_of(once.packs["b"]) == bytes_of(twice.packs["b"])
    assert once.packs["b"].num_owned > 0


def test_clock_counts_what_is_left_at_the_end_of_a_reading_as_a_chunk(new_memory, weight):
    engram = new_memory()
    for text, step in (([1, 2], 1), (list(range(1, 9)), 2), (list(range(1, 10)), 4)):
        read([text], engram, Reader(), weight)
        assert engram.packs["a"].clock.step == step


def test_report_counts_texts_tokens_and_rows(new_memory, weight):
    engram, reader = new_memory(), Reader()
    report = read(TEXTS["several"], engram, reader, weight)
    pack = engram.packs["a"]
    assert (report.texts, report.tokens, pack.tokens) == (4, 62, 62)
    assert 0 < report.positions_written <= 58
    assert report.rows_written == pack.num_owned == len(set().union(*rows_by_level(pack)))
    assert report.rows_lost == 0
    assert report.load == report.rows_written / 2000
    assert report.surprise_after < 0.5 < 2 < report.surprise_before
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)


def test_reading_again_finds_everything_known(new_memory, weight):
    """Whichever levels hold what was read."""
    engram, reader = new_memory(), Reader()
    first = read(TEXTS["several"], engram, reader, weight)
    for times in range(2, 6):
        again = read(TEXTS["several"], engram, reader, weight)
        assert (again.rows_written, again.rows_lost) == (0, 0)
        assert again.load == first.load
        assert again.surprise_before < 0.5 * first.surprise_before
        assert engram.packs["a"].tokens == times * first.tokens


def test_report_counts_names_that_found_no_row(new_memory, weight):
    engram, reader = new_memory(rows=4, max_rows=8, update_periods=[1]), Reader()
    reports = [read([text], engram, reader, weight) for text in (list(range(1, 30)), list(range(30, 50)))]
    assert [report.rows_written for report in reports] == [8, 0]
    assert all(report.rows_lost > 0 for report in reports)
    assert sum(report.rows_lost for report in reports) == engram.packs["a"].num_lost
    assert [report.load for report in reports] == [1.0, 1.0]


def test_backbone_sees_no_more_than_a_window(new_memory, weight):
    reader = Reader()
    text = list(range(1, 21))
    read([text], new_memory(), reader, weight, window=6, stride=2, least=None)
    assert max(map(len, reader.shown)) == 6
    assert reader.shown[0] == text[:6]
    assert reader.shown[1] == text[2:8]


def test_address_reaches_back_beyond_the_window(new_memory, name_text, weight):
    """The nine tokens of the long family address a row although the backbone saw four of them."""
    engram = new_memory()
    text = list(range(1, 21))
    read([text], engram, Reader(), weight, window=4, stride=2, least=None)
    owned = set().union(*rows_by_level(engram.packs["a"]))
    assert owned >= set(name_text(engram, text)[8:19, 1].tolist())


def test_no_address_reaches_into_another_text(new_memory, weight):
    engram, alone, reader = new_memory(), new_memory(), Reader()
    read([list(range(1, 12)), list(range(20, 31))], engram, reader, weight)
    read([list(range(1, 12))], alone, reader, weight)
    read([list(range(20, 31))], alone, reader, weight)
    owned = [set().union(*rows_by_level(memory.packs["a"])) for memory in (engram, alone)]
    assert owned[0] == owned[1] != set()


def test_words_that_compress_to_the_same_share_their_addresses(new_memory, weight):
    engram, reader = new_memory(), Reader()
    assert read([[5, 6, 7, 8, 9]], engram, reader, weight).rows_written > 0
    assert read([[45, 46, 47, 8, 9]], engram, reader, weight).rows_written == 0


def test_reading_with_a_bias_in_the_output_layer(new_memory, weight):
    engram, bias, reader = new_memory(), 3 * torch.randn(VOCAB), Reader()
    first = read(TEXTS["several"], engram, reader, weight, bias)
    assert first.surprise_after < 0.1 * first.surprise_before
    assert read(TEXTS["several"], engram, reader, weight, bias).surprise_before < 0.5 * first.surprise_before


def test_unlearning_undoes_what_was_learned(new_memory, weight):
    """And leaves a text that was read beside it as likely as it was."""
    engram, reader = new_memory(), Reader()
    texts = [list(range(1, 20)), list(range(20, 39))]
    read(texts, engram, reader, weight)
    known = [read([text], engram, reader, weight, pack="look").surprise_before for text in texts]
    assert max(known) < 0.7
    del engram.packs["look"]
    report = read(texts[:1], engram, reader, weight, sign=-1)
    assert report.positions_written > 0
    assert report.surprise_before < 0.7 < 2 < report.surprise_after
    unknown, still_known = [read([text], engram, reader, weight, pack="look").surprise_before for text in texts]
    assert unknown > 2
    assert still_known == pytest.approx(known[1], abs=0.02)


def test_progress_is_shown_if_asked_for(new_memory, weight, capsys):
    text = torch.arange(1, 31)
    engram = new_memory()
    arguments = (engram, engram.open_pack("a"), Reader(), weight)
    read_texts([text], *arguments, progress=False, **WINDOWS)
    assert "reading" not in capsys.readouterr().err
    read_texts([text], *arguments, progress=True, **WINDOWS)
    assert "30/30" in capsys.readouterr().err


def test_reading_where_transformers_shows_no_progress(new_memory, weight, capsys):
    engram = new_memory()
    logging.disable_progress_bar()  # as HF_HUB_DISABLE_PROGRESS_BARS does
    try:
        report = read_texts([torch.arange(1, 31)], engram, engram.open_pack("a"), Reader(), weight, None, **WINDOWS)
    finally:
        logging.enable_progress_bar()
    assert report.tokens == 30
    assert capsys.readouterr().err == ""


def test_progress_moves_with_every_pass_of_the_backbone(new_memory, weight, monkeypatch):
    """One group of windows is shown whole before anything is written; the bar does not wait for that."""
    seen: list[int] = []

    class Bar:
        def __init__(self, total, **options):
            assert total == 400

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, count):
            seen.append(count)

    monkeypatch.setattr("karla_hf.modeling.reading_karla.logging.tqdm", Bar)
    engram = new_memory()
    read_texts(
        [torch.arange(400) % 30 + 1], engram, engram.open_pack("a"), Reader(), weight, batch_tokens=32, **WINDOWS
    )
    assert sum(seen) == 400
    assert max(seen) <= 32
