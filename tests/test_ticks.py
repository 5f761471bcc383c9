"""Calibrating the threshold: from one pass over all ticks, what running every threshold would have given."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import OPTIONS, make_backbone, make_tokenizer, save_backbone, speak
from typer.testing import CliRunner

from karla_hf import KarlaForCausalLM
from karla_hf.checkpoints import create_checkpoint, load_checkpoint, save_option
from karla_hf.cli import app
from karla_hf.evaluation import answer_tokens
from karla_hf.facts import make_facts, write_facts
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.ticks import TickTable, calibrate, measure_ticks


TEXT = "The ferry leaves Brivo at seven. Nobody knows why it is late again. " * 3
FACTS = make_facts(6)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def karla(tokenizer):
    model = speak(KarlaForCausalLM.from_backbone(make_backbone(), tokenizer, **OPTIONS))
    model.read([fact.text for fact in FACTS[::2]], tokenizer, progress=False)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ticks")
    create_checkpoint(str(save_backbone(place / "backbone")), place / "karla", options=OPTIONS)
    model, tokenizer = load_checkpoint(place / "karla")
    speak(model).save_pretrained(place / "karla")
    tokenizer.save_pretrained(place / "karla")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    write_facts(FACTS, place / "facts.jsonl")
    return place


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.1, 1.0])
def test_every_threshold_is_what_running_it_gives(karla, tokenizer, threshold):
    table = measure_ticks(karla, tokenizer, [TEXT], progress=False)
    found = calibrate(table, thresholds=[threshold]).per_threshold[0]
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    out = karla(ids[:, :-1], use_cache=False, certainty_threshold=threshold)
    expected = torch.nn.functional.cross_entropy(out.logits[0], ids[0, 1:])
    assert found["ticks"] == pytest.approx(
        out.ticks_used.double().mean().item(), abs=0.02
    )  # rounding near a threshold
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-3)
    right = (out.logits[0].argmax(-1) == ids[0, 1:]).double().mean().item()
    assert found["token_accuracy"] == pytest.approx(right, abs=0.02)
    assert table.losses.shape == (OPTIONS["ctm_num_ticks"] + 1, ids.shape[1] - 1)


@torch.no_grad()
def test_answers_to_prompts_are_right_as_a_whole(karla, tokenizer):
    table = measure_ticks(karla, tokenizer, FACTS, progress=False)
    found = calibrate(table)
    right = []
    for fact in FACTS:
        prompt, answer = answer_tokens(fact, tokenizer)
        logits = karla(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        right.append(logits.argmax(-1).tolist() == answer)
    assert found.per_tick[-1]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found.tokens == sum(len(answer_tokens(fact, tokenizer)[1]) for fact in FACTS)


def test_long_texts_are_cut_into_contexts(karla, tokenizer, monkeypatch):
    monkeypatch.setattr("karla_hf.ticks.CONTEXT", 16)
    table = measure_ticks(karla, tokenizer, [TEXT, TEXT], progress=False)
    tokens = len(tokenizer(TEXT)["input_ids"])
    assert table.losses.shape[1] == 2 * (tokens - -(-tokens // 16))
    assert table.group.unique().tolist() == [0, 1]


def test_fewest_ticks_within_the_rise_are_chosen():
    sure = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.5, 0.9], [0.9, 0.9, 0.9]])
    losses = torch.tensor([[2.0, 1.02, 1.0], [1.5, 1.01, 1.0], [1.0, 1.0, 1.0]])
    table = TickTable(sure, losses, losses < 1.015, torch.tensor([0, 0, 1]))
    found = calibrate(table, max_rise=0.01, thresholds=[0.2, 0.4, 0.6, 0.95])
    assert [entry["ticks"] for entry in found.per_threshold] == pytest.approx([1 / 3, 2 / 3, 4 / 3, 2])
    assert found.chosen == found.per_threshold[2]
    assert calibrate(table, max_rise=1.0, thresholds=[0.2, 0.4]).chosen["threshold"] == 0.2
    assert calibrate(table, max_rise=0.0, thresholds=[0.2]).chosen is None
    assert [entry["accuracy"] for entry in found.per_tick] == [0.5, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"is -1; give 0 or more\."):
        calibrate(table, max_rise=-1)


def test_nothing_to_measure_is_refused(karla, tokenizer):
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_ticks(karla, tokenizer, [])
    with pytest.raises(ValueError, match="needs 2 or more"):
        measure_ticks(karla, tokenizer, ["a"], progress=False)


@pytest.mark.parametrize("name", ["text.txt", "facts.jsonl"])
def test_command_shows_writes_and_saves(folder, name):
    result = CliRunner().invoke(
        app, ["eval", "ticks", str(folder / "karla"), str(folder / name), "--json", str(folder / "out.json"), "--save"]
    )
    assert result.exit_code == 0, result.output
    assert "Tokens answer when they are certain" in result.output
    assert ("answers right" in result.output) == (name == "facts.jsonl")
    written = json.loads((folder / "out.json").read_text())
    assert written["max_loss_rise"] == 0.01
    assert written["chosen"]["rise"] <= 0.01
    assert len(written["per_tick"]) == OPTIONS["ctm_num_ticks"] + 1
    assert (folder / "out.png").read_bytes()[:4] == b"\x89PNG"
    model, _ = load_checkpoint(folder / "karla")
    assert model.config.certainty_threshold == written["chosen"]["threshold"]


def test_option_is_saved_alone(folder):
    before = json.loads((folder / "karla" / "config.json").read_text())
    save_option(folder / "karla", "certainty_threshold", 0.25)
    after = json.loads((folder / "karla" / "config.json").read_text())
    assert after == {**before, "certainty_threshold": 0.25}
    assert KarlaConfig.from_pretrained(str(folder / "karla")).certainty_threshold == 0.25
    with pytest.raises(StrictDataclassClassValidationError, match="give a number from 0 to 1"):
        save_option(folder / "karla", "certainty_threshold", 2.0)
    assert json.loads((folder / "karla" / "config.json").read_text()) == after
