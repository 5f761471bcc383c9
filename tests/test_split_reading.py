"""Reading in two calls writes what reading in one call writes, to the byte, n-grams and answers to questions alike."""

import numpy as np
import pytest

from karla_hf import KarlaForCausalLM
from karla_hf.facts import make_facts
from tests.tiny import OPTIONS, make_backbone, make_tokenizer


CHUNK = 4


def contents(karla):
    """Clock and every level's names and rows."""
    pack = karla.engram.packs["default"]
    return pack.clock.step, [level.items() for level in pack.levels]


@pytest.fixture
def texts():
    """Facts that end with a chunk, so that a second call begins where the first ended."""
    tokenizer = make_tokenizer()
    facts = [fact.text for fact in make_facts(80)]
    return [text for text in facts if (len(tokenizer(text)["input_ids"]) - 1) % CHUNK == 0][:6]


def test_two_calls_write_what_one_writes(texts):
    assert len(texts) == 6
    tokenizer, karlas = make_tokenizer(), []
    for calls in ([texts], [texts[:3], texts[3:]]):
        options = {**OPTIONS, "engram_chunk_size": CHUNK, "engram_update_periods": [1, 2, 8]}
        karla = KarlaForCausalLM.from_backbone(make_backbone(), tokenizer, **options)
        for part in calls:
            karla.read(part, tokenizer, progress=False)
        karlas.append(karla)
    (step, levels), (other_step, other_levels) = map(contents, karlas)
    assert step == other_step > 8
    without = KarlaForCausalLM.from_backbone(make_backbone(), tokenizer, **{**OPTIONS, "engram_cues": False})
    without.read(texts, tokenizer, progress=False)
    assert karlas[0].packs()["default"] > without.packs()["default"]  # there are answers in it
    for (names, rows), (other_names, other_rows) in zip(levels, other_levels, strict=True):
        assert np.array_equal(names, other_names)
        assert len(names)
        assert np.array_equal(rows.view(np.int16), other_rows.view(np.int16))
