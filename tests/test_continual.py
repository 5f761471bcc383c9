import math

import pytest
import torch
from tiny import make_backbone, make_tokenizer

from karla_hf.continual import compare_streams, first_tokens, forgetting_matrix
from karla_hf.evaluation import perplexity


DOCUMENTS = {
    "ferry": "The ferry is late. " * 12,
    "bread": "Bread needs salt, and time. " * 8,
    "sums": "2 + 2 = 4; " * 12,
}
CONTROL = "Apples are red, and pears are not. " * 6


def test_a_learner_that_keeps_one_document_forgets_all_earlier_ones():
    known = []

    def read(text):
        known[:] = [text]

    matrix = forgetting_matrix(read, lambda text: 2.0 if text in known else 8.0, ["a", "b", "c"], "d")
    assert str(matrix) == str([[2.0, math.nan, math.nan, 8.0], [8.0, 2.0, math.nan, 8.0], [8.0, 8.0, 2.0, 8.0]])


@pytest.fixture(scope="module")
def compared():
    backbone, tokenizer = make_backbone(), make_tokenizer()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    options = {"passes": (1, 2), "learning_rates": (1e-6, 1e-2)}
    result = compare_streams(backbone, tokenizer, DOCUMENTS, CONTROL, ["Other words. " * 20], **options)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    return result


def test_the_matrices_have_nan_above_the_diagonal_only(compared):
    assert list(compared["matrices"]) == ["bare backbone", "Karla, one reading", "LoRA, 1 pass", "LoRA, 2 passes"]
    for name, matrix in compared["matrices"].items():
        assert len(matrix) == (1 if name == "bare backbone" else 3)
        for i, row in enumerate(matrix):
            unread = name != "bare backbone"
            assert [math.isnan(value) for value in row] == [unread and i < j < 3 for j in range(4)]


def test_each_document_is_known_after_it_was_read_and_the_backbone_is_the_measure(compared):
    bare, karla = compared["matrices"]["bare backbone"][0], compared["matrices"]["Karla, one reading"]
    texts = [*DOCUMENTS.values(), CONTROL]
    expected = [perplexity(make_backbone(), make_tokenizer(), text, progress=False) for text in texts]
    assert bare == pytest.approx(expected)
    assert all(karla[i][i] < 0.5 * bare[i] for i in range(3))


def test_the_learning_rate_is_chosen_on_the_other_documents(compared):
    assert compared["learning_rates"] == {"LoRA, 1 pass": 1e-2, "LoRA, 2 passes": 1e-2}


def test_rows_say_the_same_as_the_matrices(compared):
    assert compared["titles"] == [*DOCUMENTS, "unrelated"]
    row = compared["rows"]["Karla, one reading, after bread"]
    assert str(list(row.values())) == str(compared["matrices"]["Karla, one reading"][1])
    assert len(compared["rows"]) == 1 + 3 * 3


def test_first_tokens_is_a_beginning_of_the_text():
    tokenizer = make_tokenizer()
    text = DOCUMENTS["bread"]
    cut = first_tokens(text, tokenizer, 10)
    assert text.startswith(cut)
    assert tokenizer(cut)["input_ids"] == tokenizer(text)["input_ids"][:10]
    assert first_tokens(text, tokenizer, 10_000) == text
