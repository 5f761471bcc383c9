import importlib.util
import json

import pytest
import torch
from tiny import CHAT_TEMPLATE, OPTIONS, make_backbone, make_tokenizer, save_backbone, save_karla, speak
from typer.testing import CliRunner

from karla_hf import KarlaForCausalLM
from karla_hf.cli import app
from karla_hf.reasoning import ask, bare_backbone, make_questions


IDS = torch.arange(2, 26).view(2, 12)


@pytest.fixture
def karla():
    return speak(KarlaForCausalLM.from_backbone(make_backbone(), make_tokenizer(), **OPTIONS))


def test_the_bare_backbone_is_the_backbone_and_shares_its_weights(karla):
    bare = bare_backbone(karla)
    assert type(bare).__name__ == "LlamaForCausalLM"
    assert bare.get_input_embeddings() is karla.get_input_embeddings()
    with torch.no_grad():
        assert torch.equal(bare(IDS).logits, make_backbone()(IDS).logits)
        assert not torch.equal(karla(IDS).logits, bare(IDS).logits)


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "leg_counting"])
def test_questions_are_the_same_for_a_seed_and_have_their_answer_among_others(name):
    questions = make_questions(name, 12, seed=3)
    assert make_questions(name, 12, seed=3).rows == questions.rows
    assert make_questions(name, 12, seed=4).rows != questions.rows
    for row in questions.rows:
        assert row["choices"][row["label"]] == row["answer"]
        assert len(set(row["choices"])) == len(row["choices"]) == 4
        assert [questions.score(choice, row["index"]) == 1.0 for choice in row["choices"]].count(True) == 1
    assert len({row["label"] for row in questions.rows}) > 1


def test_an_answer_that_was_read_counts_and_no_other(karla):
    """What stood behind the last "Answer:" that was read is answered to every question, so to one of them rightly."""
    tokenizer = make_tokenizer()
    questions = {"spell_backward": make_questions("spell_backward", 5, seed=0)}
    row = questions["spell_backward"].rows[2]
    karla.read(f"{row['question']}\nAnswer: {row['answer']}\n\n", tokenizer, progress=False)
    (score,) = ask(karla, tokenizer, questions)
    assert (score.task, score.asked, score.answered, score.choices) == ("spell_backward", 5, 1, 4)
    assert 1 <= score.chosen < 5
    (bare,) = ask(bare_backbone(karla), tokenizer, questions)
    assert (bare.asked, bare.answered) == (5, 0)


def test_the_command_shows_one_table_and_writes_the_numbers(tmp_path):
    folder = save_karla(tmp_path / "karla", save_backbone(tmp_path / "backbone", chat_template=CHAT_TEMPLATE))
    words = ["--task", "gcd", "--task", "spell_backward", "--size", "3", "--seed", "2", "--json", tmp_path / "r.json"]
    result = CliRunner().invoke(app, ["eval", "reasoning", str(folder), *map(str, words)])
    assert result.exit_code == 0, result.output
    assert "gcd" in result.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["size"], found["seed"]) == (3, 2)
    assert [score["task"] for score in found["karla"]] == ["gcd", "spell_backward"]
    assert found["karla"] == found["backbone"], "a fresh Karla answers as its backbone does"


def told(*arguments) -> str:
    """What the command says on standard error."""
    result = CliRunner().invoke(app, ["eval", "reasoning", *map(str, arguments)])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return result.stderr.strip()


def test_what_cannot_be_measured_is_told_in_one_sentence(tmp_path, monkeypatch):
    assert told(tmp_path, "--task", "chain_sun") == (
        "Error: reasoning-gym has no task 'chain_sun'; give one that it has, such as chain_sum, decimal_chain_sum."
    )
    assert told(tmp_path, "--task", "leg_counting") == (
        f"Error: {tmp_path} is no Karla (it has no config.json); give a folder that `karla new` or `save_pretrained` made."
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    assert told(tmp_path) == (
        "Error: `karla eval reasoning` needs the extra `eval`; install it with `pip install 'karla-hf[eval]'`."
    )


def test_answers_that_are_all_the_same_are_refused():
    said = r"^All 2 answers of gcd are the same, so there is nothing to choose among; raise --size\.$"
    with pytest.raises(ValueError, match=said):
        make_questions("gcd", 2, seed=11)
