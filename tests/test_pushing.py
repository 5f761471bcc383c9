"""What a trainer pushes, over a Hub on this machine."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_client import BACKBONE, connect, files_of_repository, make_karla, make_pushed_backbone, titles
from huggingface_hub import ModelCard, snapshot_download
from tiny import make_backbone, make_tokenizer
from trl import SFTConfig

from karla_hf import KarlaForCausalLM
from karla_hf.trainer import KarlaSFTTrainer


IDS = torch.tensor([[5, 17, 300, 42, 8, 99, 123, 250]])
PICKLES = (".bin", ".pt", ".pth", ".pkl")


@pytest.fixture(scope="module")
def folder(loopback_hub, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pushing")
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, loopback_hub)
        make_pushed_backbone()
        make_karla(root / "karla")
    return root


@pytest.fixture
def api(loopback_hub, folder, monkeypatch):
    return connect(monkeypatch, loopback_hub)


def make_trainer(model: KarlaForCausalLM, output: Path, **options) -> KarlaSFTTrainer:
    rows = Dataset.from_dict({"text": ["The ferry leaves Brivo at seven."] * 4})
    arguments = SFTConfig(
        str(output), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True,
        max_length=16, bf16=False, **options,
    )  # fmt: skip
    return KarlaSFTTrainer(model, arguments, train_dataset=rows, processing_class=make_tokenizer(pad_token="<|end|>"))


@pytest.mark.slow
def test_training_pushes_what_belongs_to_the_model_and_our_card(folder, api, tmp_path):
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    trainer = make_trainer(
        model, tmp_path / "out", push_to_hub=True, hub_model_id="trained", hub_always_push=True, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(dataset_name="karla/ferries")
    steps = ["Training in progress, step 2", "Training in progress, step 1"]
    assert titles(api, "karla/trained") == ["End of training", *steps, "initial commit"]
    assert (tmp_path / "out" / "training_args.bin").is_file(), "transformers keeps it here"
    for commit in api.list_repo_commits("karla/trained"):
        names = files_of_repository(api, "karla/trained", commit.commit_id)
        assert not [name for name in names if name.endswith(PICKLES) or "checkpoint-" in name]
    snapshot = Path(snapshot_download("karla/trained"))
    assert json.loads((snapshot / "config.json").read_text())["ctm_packed"]
    card = ModelCard((snapshot / "README.md").read_text(encoding="utf-8"))
    assert card.content == (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (card.data.base_model, card.data.datasets) == (BACKBONE, ["karla/ferries"])
    assert {"custom_code", "trl", "sft"} <= set(card.data.tags)
    assert 'name, revision = "karla/trained", "main"' in card.text
    assert "generated" not in card.text.lower()
    pushed = KarlaForCausalLM.from_pretrained("karla/trained")
    assert torch.equal(pushed(IDS).logits, model.eval()(IDS).logits)
    assert not model.config.ctm_packed, "the model trains on"


def test_the_end_alone_is_pushed_if_so_asked(folder, api, tmp_path):
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    trainer = make_trainer(
        model, tmp_path / "out", push_to_hub=True, hub_model_id="at-the-end", hub_strategy="end", save_steps=1,
        hub_private_repo=True,
    )  # fmt: skip
    trainer.train()
    assert titles(api, "karla/at-the-end") == ["initial commit"]
    trainer.push_to_hub("Done")
    assert titles(api, "karla/at-the-end") == ["Done", "initial commit"]
    assert api.model_info("karla/at-the-end").private
    assert (tmp_path / "out" / "training_args.bin").is_file(), "transformers keeps it here"
    assert not [name for name in files_of_repository(api, "karla/at-the-end") if name.endswith(PICKLES)]


def test_what_cannot_be_pushed_is_refused_before_training(folder, api, tmp_path):
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    with pytest.raises(
        ValueError, match=r"`hub_strategy` is 'checkpoint', which pushes the optimiser's state as a pickle"
    ):
        make_trainer(model, tmp_path / "out", push_to_hub=True, hub_model_id="no", hub_strategy="checkpoint")
    nameless = KarlaForCausalLM.from_backbone(make_backbone(), make_tokenizer(), engram_rows_per_head=500)
    with pytest.raises(ValueError, match=r"^The backbone has no name, so nobody could load what is pushed"):
        make_trainer(nameless, tmp_path / "out", push_to_hub=True, hub_model_id="no")
    assert not api.repo_exists("karla/no")


def test_a_trainer_that_pushes_nothing_writes_our_card_too(folder, api, tmp_path):
    model = KarlaForCausalLM.from_pretrained(str(folder / "karla"))
    make_trainer(model, tmp_path / "out", save_steps=1).train()
    card = ModelCard((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    assert card.data.base_model == BACKBONE
    assert card.text.lstrip().startswith("# out")
