import pytest
import torch
from tiny import BagOfWords, make_backbone, make_tokenizer

from karla_hf.baselines import EPOCHS, LEARNING_RATES, Task, best_lora, compare
from karla_hf.facts import make_facts


COLUMNS = ["recall", "re-read", "related", "unrelated", "seconds", "seconds to ask", "bytes"]


def make_task(split):
    facts = make_facts(6, split=split)
    return Task(facts, "The ferry is late. " * 20, "The ferry was early. " * 10, "Apples are red. " * 10)


@pytest.fixture(scope="module")
def compared():
    backbone, tokenizer = make_backbone(), make_tokenizer()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    result = compare(
        backbone,
        tokenizer,
        make_task("test"),
        make_task("development"),
        encoder=BagOfWords(),
        learning_rates=(1e-3, 1e-2),
        epochs=(1, 2),
    )
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    return result


def test_every_method_has_a_row_with_every_column(compared):
    assert list(compared["rows"]) == [
        *("bare backbone", "Karla, one reading", "kNN-LM", "kNN-LM within a radius", "retrieval into the prompt"),
        *("LoRA, 1 epochs, 1e-3", "LoRA, 2 epochs, 1e-3", "LoRA, 1 epochs, 1e-2", "LoRA, 2 epochs, 1e-2"),
    ]
    assert all(list(row) == COLUMNS for row in compared["rows"].values())
    assert compared["facts"] == 6
    assert {"kNN-LM: share", "kNN-LM: temperature", "retrieval: top_k"} <= set(compared["chosen"])


def test_learning_shows_and_costs(compared):
    rows = compared["rows"]
    bare = rows.pop("bare backbone")
    assert bare["bytes"] == bare["seconds"] == bare["recall"] == 0
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in rows.values())
    assert rows["Karla, one reading"]["re-read"] < 0.5 * bare["re-read"]
    assert rows["kNN-LM"]["re-read"] < 0.5 * bare["re-read"]
    assert rows["LoRA, 2 epochs, 1e-2"]["seconds"] > rows["LoRA, 1 epochs, 1e-2"]["seconds"]
    rows["bare backbone"] = bare


def test_lora_is_shown_at_the_rate_that_is_best_for_it():
    def row(recall, reread):
        return {"recall": recall, "re-read": reread}

    rows = {
        "kNN-LM": row(9, 1.0),
        "LoRA, 1 epochs, 1e-3": row(1, 9.0),
        "LoRA, 4 epochs, 1e-3": row(3, 4.0),
        "LoRA, 1 epochs, 2e-4": row(1, 8.0),
        "LoRA, 4 epochs, 2e-4": row(2, 3.0),
    }
    assert list(best_lora(rows)) == ["LoRA, 1 epochs, 2e-4", "LoRA, 4 epochs, 1e-3"]


def test_the_issue_asks_for_these_epochs_and_three_rates():
    assert EPOCHS == (1, 4, 16)
    assert len(LEARNING_RATES) == 3
