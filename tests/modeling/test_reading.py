"""Reading: windows over texts, and the writes that follow from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from karla_hf import KarlaConfig
from karla_hf.modeling.engram_karla import new_engram
from karla_hf.modeling.hashing_karla import NO_TOKEN, name_positions
from karla_hf.modeling.reading_karla import plan_windows, read_texts
from karla_hf.modeling.reference_engram import naive_write_chunk


HIDDEN, VOCAB = 24, 50
LAYOUT = {"window": 6, "stride": 3, "chunk": 7, "batch_tokens": 18}


def make_engram():
    families = [{"kind": "ngram", "order": n, "weight": 0.5} for n in (2, 9)]
    text_config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=1, vocab_size=VOCAB)
    config = KarlaConfig(
        text_config=text_config, engram_families=families, engram_num_heads=3, engram_rows_per_head=2003
    )
    return new_engram(config, torch.arange(VOCAB) % 40, pad_id=0)


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


def read(texts, engram, reader, weight, bias=None, **layout):
    table = engram.open_pack("a")
    texts = [torch.tensor(text) for text in texts]
    return read_texts(texts, engram, table, reader, weight, bias, progress=False, **{**LAYOUT, **layout})


def naive_read_texts(texts, engram, table, reader, weight, window, stride, chunk, batch_tokens):
    """One window after the other, one text's names at a time; surprises before and after, positions written."""
    per_batch = max(1, batch_tokens // window)
    windows = plan_windows([len(text) for text in texts], window, stride)
    before, after, written = [], [], 0
    for first in range(0, len(windows), per_batch):
        positions = []
        for w in windows[first : first + per_batch]:
            text = torch.tensor(texts[w.text])
            shown = text[w.start : w.end][None]
            states = reader(shown, torch.ones_like(shown))[0]
            history = torch.nn.functional.pad(engram.compress(text[None]), (engram.history, 0), value=NO_TOKEN)
            names = name_positions(history, engram.families, engram.constants).select(0)
            positions += [(names.select(t), states[t - w.start], text[t + 1]) for t in range(w.keep, w.end)]
        for at in range(0, len(positions), chunk):
            names, states, targets = zip(*positions[at : at + chunk], strict=True)
            names = type(names[0])(*(torch.stack(part) for part in zip(*names, strict=True)))
            result = naive_write_chunk(engram, table, names, torch.stack(states), torch.stack(targets), weight)
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


TEXTS = {
    "two tokens": [[3, 4]],
    "one window": [[1, 2, 3, 4, 5, 6, 7]],
    "one token more": [[1, 2, 3, 4, 5, 6, 7, 8]],
    "several": [list(range(1, 30)), [3, 4], list(range(45, 20, -1)), [7, 7, 7, 7, 7, 7]],
}


@pytest.mark.parametrize("texts", TEXTS)
def test_reading_equals_naive(texts):
    ours, theirs = make_engram(), make_engram()
    weight, reader = torch.randn(VOCAB, HIDDEN), Reader()
    for engram, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        table = engram.open_pack("a")
        table.rows = table.rows.to(dtype)
    report = read(TEXTS[texts], ours, reader, weight)
    before, after, written = naive_read_texts(
        TEXTS[texts], theirs, theirs.packs["a"], reader, weight, *(LAYOUT[key] for key in LAYOUT)
    )
    assert report.positions_written == written
    assert report.surprise_before == pytest.approx(sum(before) / len(before), rel=1e-4)
    assert report.surprise_after == pytest.approx(sum(after) / len(after), rel=1e-2, abs=1e-3)
    assert torch.equal(ours.packs["a"].owners, theirs.packs["a"].owners)
    torch.testing.assert_close(ours.packs["a"].rows.double(), theirs.packs["a"].rows, rtol=1e-2, atol=1e-3)


def test_report_counts_texts_tokens_and_rows():
    engram = make_engram()
    reader, weight = Reader(), torch.randn(VOCAB, HIDDEN)
    report = read(TEXTS["several"], engram, reader, weight)
    assert (report.texts, report.tokens) == (4, 62)
    assert 0 < report.positions_written <= 58
    assert report.rows_written == engram.packs["a"].num_owned
    assert report.load == report.rows_written / engram.constants.num_rows
    assert report.surprise_after < 0.5 < 2 < report.surprise_before
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
    again = read(TEXTS["several"], engram, reader, weight)
    assert again.rows_written == 0
    assert again.load == report.load
    assert again.surprise_before < 0.5 * report.surprise_before


def test_backbone_sees_no_more_than_a_window():
    reader = Reader()
    text = list(range(1, 21))
    read([text], make_engram(), reader, torch.randn(VOCAB, HIDDEN), window=6, stride=2)
    assert max(map(len, reader.shown)) == 6
    assert reader.shown[0] == text[:6]
    assert reader.shown[1] == text[2:8]


def test_address_reaches_back_beyond_the_window():
    """The nine tokens of the long family address a row although the backbone saw four of them."""
    engram = make_engram()
    text = list(range(1, 21))
    read([text], engram, Reader(), torch.randn(VOCAB, HIDDEN), window=4, stride=2)
    history = torch.nn.functional.pad(torch.tensor(text)[None], (8, 0), value=NO_TOKEN)
    names = name_positions(history, engram.families, engram.constants).select(0)
    owned = engram.packs["a"].owned(names)[:, 1].all(-1)
    assert owned[8:19].all()


def test_no_address_reaches_into_another_text():
    engram, alone = make_engram(), make_engram()
    weight, reader = torch.randn(VOCAB, HIDDEN), Reader()
    read([list(range(1, 12)), list(range(20, 31))], engram, reader, weight)
    read([list(range(1, 12))], alone, reader, weight)
    read([list(range(20, 31))], alone, reader, weight)
    assert torch.equal(engram.packs["a"].owners, alone.packs["a"].owners)


def test_words_that_compress_to_the_same_share_their_addresses():
    engram = make_engram()
    weight, reader = torch.randn(VOCAB, HIDDEN), Reader()
    read([[5, 6, 7, 8, 9]], engram, reader, weight)
    report = read([[45, 46, 47, 8, 9]], engram, reader, weight)
    assert report.rows_written == 0


def test_reading_with_a_bias_in_the_output_layer():
    engram = make_engram()
    weight, bias, reader = torch.randn(VOCAB, HIDDEN), 3 * torch.randn(VOCAB), Reader()
    first = read(TEXTS["several"], engram, reader, weight, bias)
    assert first.surprise_after < 0.1 * first.surprise_before
    assert read(TEXTS["several"], engram, reader, weight, bias).surprise_before < 0.5 * first.surprise_before


def test_progress_is_shown_if_asked_for(capsys):
    text = torch.arange(1, 31)
    engram = make_engram()
    arguments = (engram, engram.open_pack("a"), Reader(), torch.randn(VOCAB, HIDDEN))
    read_texts([text], *arguments, progress=False, **LAYOUT)
    assert "reading" not in capsys.readouterr().err
    read_texts([text], *arguments, progress=True, **LAYOUT)
    assert "30/30" in capsys.readouterr().err
