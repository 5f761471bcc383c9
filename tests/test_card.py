"""The model card: what it says, and where its numbers come from."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hub_client import connect, make_karla, make_pushed_backbone, refuse, succeed
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub._eval_results import parse_eval_result_entries
from tiny import make_tokenizer, save_backbone, save_karla

from karla_hf import KarlaForCausalLM, hub
from karla_hf.bench import Row, measure
from karla_hf.card import card_text, make_card
from karla_hf.card_results import read_measured
from karla_hf.facts import make_facts, write_facts


CONFIG = {"base_model_name_or_path": "owner/backbone", "backbone_included": False, "ctm_num_ticks": 4}


@pytest.fixture(scope="module")
def folder(loopback_hub, tmp_path_factory) -> Path:
    """A Karla that has read, and what the commands measured of it; not to be changed."""
    root = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, loopback_hub)
        make_pushed_backbone()
        make_karla(root / "karla")
        write_facts(make_facts(3), root / "facts.jsonl")
        (root / "story.txt").write_text("The ferry leaves Brivo at seven. " * 4, encoding="utf-8")
        succeed("eval", "recall", root / "karla", root / "facts.jsonl", "--json", root / "recall.json")
        succeed("eval", "perplexity", root / "karla", root / "story.txt", "--json", root / "perplexity.json")
        succeed(
            "eval", "ticks", root / "karla", root / "story.txt", "--max-loss-rise", "9", "--json", root / "ticks.json"
        )
    row = Row("write | read", 1, "rows", lambda: sum(range(99)), "a <loop>", lambda: sum(range(999)))
    machine = {"machine": "x86_64 Linux, AVX2", "threads": 1}
    speeds = {"bench": "speed", "rows": {row.name: measure(row, rounds=1)}, **machine}
    quality = {
        "bench": "baselines",
        "rows": {"Karla": {"recall": 38, "unrelated": 19.3512}, "LoRA": {"recall": 0, "unrelated": None}},
    }
    (root / "bench.json").write_text(json.dumps([speeds, quality | machine]), encoding="utf-8")
    return root


@pytest.fixture
def api(loopback_hub, folder, monkeypatch):
    """A client that may write; this process is one too."""
    return connect(monkeypatch, loopback_hub)


def test_a_card_without_numbers_has_no_table_of_them(api):
    text = card_text(CONFIG, "owner/karla", ["mine"], datasets=["owner/data"])
    card = ModelCard(text)
    card.validate()
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.base_model, data.base_model_relation, data.datasets) == ("owner/backbone", "adapter", ["owner/data"])
    assert data.tags == ["karla", "engram", "bitnet", "custom_code", "mine"]
    assert data.eval_results is None
    assert "## Measured" not in text
    assert "|" not in text
    assert "{" not in text.replace("{#", "")


def test_every_number_is_one_that_a_command_wrote(folder, api, tmp_path):
    karla = shutil.copytree(folder / "karla", tmp_path / "karla")
    names = ["recall", "ticks", "bench"]
    options = [part for name in names for part in ("--eval", folder / f"{name}.json")]
    shown = succeed(
        "card", karla, "karla/measured", *options, "--eval", f"owner/stories={folder / 'perplexity.json'}", "--dataset",
        "owner/train", "--license", "mit",
    )  # fmt: skip
    assert shown == f"Wrote README.md, .eval_results/karla.yaml in {karla}.\n"
    text = (karla / "README.md").read_text(encoding="utf-8")
    recall, perplexity, ticks, bench = (json.loads((folder / f"{name}.json").read_text()) for name in
                                        ("recall", "perplexity", "ticks", "bench"))  # fmt: skip
    assert f"| all | 3 | {recall['memory_off']['exact']} | {recall['memory_on']['exact']} |" in text
    (file,) = perplexity["files"]
    assert f"| story.txt | {file['tokens']} | {file['memory_off']:,.3f} | {file['memory_on']:,.3f} |" in text
    assert f"| 3 | {ticks['per_tick'][3]['loss']:.4f} | {ticks['per_tick'][3]['token_accuracy']:.1%} |" in text
    assert f"At certainty {ticks['chosen']['threshold']:g}" in text
    assert f"| write \\| read | {bench[0]['rows']['write | read']['value']:,.2f} rows/s | a &lt;loop> |" in text
    assert "| Karla | 38 | 19.35 |" in text
    assert "| LoRA | 0 |  |" in text
    assert str(folder) not in text
    card = ModelCard(text)
    card.validate()
    found = {(result.task_name, result.dataset_type, result.dataset_name): result for result in card.data.eval_results}
    assert found["recall", "own-data", "3 facts"].metric_value == recall["memory_on"]["exact"] / 3
    story = found["perplexity", "owner/stories", f"story.txt, {file['tokens']} tokens"]
    assert (story.metric_type, story.metric_value) == ("perplexity", file["memory_on"])
    assert len(found) == 2
    assert (card.data.license, card.data.metrics) == ("mit", ["exact_match", "perplexity"])
    (entry,) = parse_eval_result_entries(
        yaml.safe_load((karla / ".eval_results/karla.yaml").read_text(encoding="utf-8"))
    )
    assert (entry.dataset_id, entry.task_id, entry.value) == ("owner/stories", "perplexity", file["memory_on"])
    assert refuse("card", karla, "karla/measured") == f"{karla} has a README.md already; give --force to replace it."
    assert refuse("push", karla, "karla/measured", "--dataset", "owner/x") == (
        f"{karla} has a README.md already, which is the card; write a new one there with `karla card --force`, or push "
        "without --eval, --dataset and --license."
    )
    hub.push(karla, "karla/measured")
    snapshot = Path(snapshot_download("karla/measured"))
    assert (snapshot / "README.md").read_text(encoding="utf-8") == text
    assert (snapshot / ".eval_results/karla.yaml").read_bytes() == (karla / ".eval_results/karla.yaml").read_bytes()
    succeed("card", karla, "karla/measured", "--force")
    assert "## Measured" not in (karla / "README.md").read_text(encoding="utf-8")


def card_of(api, repo_id: str) -> str:
    return Path(api.hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")


def test_a_card_is_made_anew_until_it_has_numbers_or_another_author(folder, api):
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    model.push_to_hub("karla/cards")
    assert "| ferry |" in card_of(api, "karla/cards")
    model.read("Nothing else.", make_tokenizer(), pack="more", progress=False)
    model.push_to_hub("karla/cards")
    assert "| more |" in card_of(api, "karla/cards")
    succeed("push", folder / "karla", "karla/cards", "--eval", folder / "recall.json")
    measured = card_of(api, "karla/cards")
    assert "## Measured" in measured
    model.push_to_hub("karla/cards")
    assert card_of(api, "karla/cards") == measured
    api.upload_file(path_or_fileobj=b"# Mine\n", path_in_repo="README.md", repo_id="karla/cards")
    model.push_to_hub("karla/cards")
    hub.push(folder / "karla", "karla/cards")
    assert card_of(api, "karla/cards") == "# Mine\n"


def test_the_quick_start_runs_on_a_folder(folder, api, tmp_path, capsys):
    karla = shutil.copytree(folder / "karla", tmp_path / "karla")
    make_card(karla, "karla/quick")
    code = (karla / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code.replace("karla/quick", str(karla)), names)
    assert "The ferry leaves" in capsys.readouterr().out
    assert list(names["model"].engram.packs) == ["ferry"]


def test_a_result_of_training_is_a_score_too(tmp_path):
    result = {"data": "owner/poems", "backbone_loss": 3.0, "karla_loss": 2.0, "tokens": 1000, "steps": 20}
    (tmp_path / "summary.json").write_text(json.dumps(result), encoding="utf-8")
    measured = read_measured([str(tmp_path / "summary.json")])
    assert measured.tables[0].rows == [["bare backbone", "3.0000", "20.086"], ["Karla", "2.0000", "7.389"]]
    assert measured.scores[0].value == pytest.approx(7.389, abs=1e-3)
    (tmp_path / "a=b.json").write_text(json.dumps(result), encoding="utf-8")
    assert len(read_measured([str(tmp_path / "a=b.json")]).tables) == 1, "a name with = in it, which is a file"


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"facts": 3}', '{"files": [{}]}', '{"bench": "x", "rows": {}}', "null",
                '{"facts": 0, "memory_off": {"by_form": {}, "exact": 0}, "memory_on": {"by_form": {}, "exact": 0}}'],
)  # fmt: skip
def test_a_file_that_no_command_wrote_is_refused(folder, tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content, encoding="utf-8")
    assert refuse("card", folder / "karla", "karla/x", "--eval", path, "--force") == (
        f"{path} is no result of `karla eval`, `karla bench` or `karla train`; give a file that --json of one of them wrote."
    )


def test_names_that_are_none_are_refused(folder, tmp_path):
    sentence = "is no name on the Hub; give `owner/name` of letters, digits, '-', '_' and '.'."
    assert refuse("card", folder / "karla", "a b", "--force") == f"'a b' {sentence}"
    assert refuse("card", folder / "karla", "karla/x", "--force", "--dataset", "a//b") == f"'a//b' {sentence}"
    assert refuse("card", folder / "karla", "karla/x", "--eval", "a b=result.json") == f"'a b' {sentence}"
    assert refuse("card", tmp_path, "karla/x").startswith(f"{tmp_path} is no Karla (it has no config.json)")


def test_a_backbone_of_ones_own_is_no_base_model(folder, tmp_path):
    text = card_text(CONFIG | {"base_model_name_or_path": None, "backbone_included": True}, "owner/karla")
    assert ModelCard(text).data.base_model is None
    assert "The backbone's weights are in this repository" in text


def test_a_card_does_not_name_a_folder(folder, tmp_path):
    karla = save_karla(tmp_path / "karla", save_backbone(tmp_path / "backbone"))
    make_card(karla, "karla/x")
    text = (karla / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "The backbone is not in this repository, and has no name on the Hub." in text
