"""Training with trained rows: which rows change, at which rate, clipped with the rest, and resumed exactly."""

import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tiny import OPTIONS, save_backbone
from trl import SFTConfig

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.modeling.sentences_karla import NO_TOKEN
from karla_hf.optimizer import RowsAdamW
from karla_hf.trainer import KarlaSFTTrainer
from karla_hf.training import run_recipe


ROWS = {"engram_layer_ids": [0, 1], "engram_layer_head_dim": 4, "engram_layer_rows_per_head": 300}
TRAINING = {
    "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False, "max_length": 32,
    "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
TEXT = "The ferry leaves at nine and comes back at noon.\n\n"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("models") / "backbone", intermediate_size=128)


@pytest.fixture
def make_trainer(backbone, tmp_path):
    """Function that makes a trainer of a fresh Karla with trained rows."""

    def make(rows=None, model_options=None, **options) -> KarlaSFTTrainer:
        model = KarlaForCausalLM.from_backbone(str(backbone), **{**OPTIONS, **ROWS, **(model_options or {})})
        rows = rows or Dataset.from_dict({"input_ids": torch.randint(1, 200, (16, 9)).tolist()})
        arguments = SFTConfig(output_dir=str(tmp_path / "out"), **{**TRAINING, "save_strategy": "no", **options})
        tokenizer = load_tokenizer(str(backbone))
        tokenizer.pad_token = tokenizer.eos_token
        return KarlaSFTTrainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )

    return make


@pytest.fixture
def recipe(backbone, tmp_path):
    """Function that writes a recipe which learns a short text by heart, and returns its path."""

    def write(**changes):
        (tmp_path / "text.txt").write_text(TEXT * 40)
        values = {
            **OPTIONS, **ROWS, **TRAINING, "model_name_or_path": str(backbone), "packing": True,
            "packing_strategy": "wrapped", "dataset_files": [str(tmp_path / "text.txt")], "learning_rate": 1e-2,
            "output_dir": str(tmp_path / "out"), "max_steps": 6, "save_steps": 3, "logging_steps": 9, **changes,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


def addressed(model, ids) -> set[int]:
    """Rows that texts of token ids [B, T] address."""
    rows = model.model.layer_engram.rows
    history = torch.nn.functional.pad(rows.compress(ids), (max(rows.orders) - 1, 0), value=NO_TOKEN)
    return set(rows.addresses(history).flatten().tolist())


@pytest.mark.parametrize("tick_loss", ["last", "two_tick"])
def test_only_addressed_rows_and_own_weights_change(make_trainer, tick_loss):
    trainer = make_trainer(max_steps=4, learning_rate=1e-2, weight_decay=0.1, model_options={"tick_loss": tick_loss})
    model = trainer.model
    for gate in model.model.layer_engram.gates:  # with zeros there, the first step would leave its rows alone
        torch.nn.init.normal_(gate.value.weight, std=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    ids = torch.tensor(trainer.train_dataset["input_ids"])
    name = "model.layer_engram.rows.weight"
    changed = (model.get_parameter(name) != before[name]).any(1).nonzero().flatten().tolist()
    touched = addressed(model, ids)
    assert set(changed) <= touched
    assert len(changed) > 0.8 * len(touched)  # the last tokens predict nothing
    assert len(touched) < len(before[name]) / 2
    untouched = torch.tensor(sorted(set(range(len(before[name]))) - touched))
    rest = [rows.detach()[untouched].numpy().tobytes() for rows in (before[name], model.get_parameter(name))]
    assert rest[0] == rest[1]
    for other, parameter in model.named_parameters():
        own = other.startswith(("model.ctm.", "model.layer_engram."))
        assert own != torch.equal(parameter, before[other]), other


def test_rows_take_five_times_the_rate_and_no_decay(make_trainer):
    trainer = make_trainer(max_steps=4, learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="linear")
    rows, rates = trainer.model.model.layer_engram.rows.weight, []
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    assert type(trainer.optimizer) is RowsAdamW
    *dense, own, ternary = trainer.optimizer.param_groups
    assert own["params"] == [rows]
    assert (own["weight_decay"], own["sparse"]) == (0.0, True)
    assert [group["weight_decay"] for group in (*dense, ternary)] == [0.1, 0.0, 0.1]
    assert ternary["ternary"]
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == sum(
        parameter.requires_grad for parameter in trainer.model.parameters()
    )
    for _ in range(3):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == [pytest.approx([r, r, 5 * r, r]) for r in (1e-2, 7.5e-3, 5e-3)]


def test_model_without_rows_or_with_frozen_rows_keeps_the_optimiser_of_the_trainer(make_trainer):
    trainer = make_trainer(max_steps=1, model_options={"engram_layer_ids": None})
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
    trainer = make_trainer(max_steps=1)
    trainer.model.model.layer_engram.requires_grad_(False)
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_other_optimisers_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"^`optim` is 'adafactor', but trained rows need sparse steps; give 'adamw_"):
        make_trainer(max_steps=1, optim="adafactor").create_optimizer()


@pytest.mark.parametrize("bound", [0.0, 1e-3, 1e9])
def test_gradient_norm_counts_and_clips_the_rows(make_trainer, bound):
    trainer = make_trainer(max_steps=1, max_grad_norm=bound)
    model = trainer.model.train()
    torch.nn.init.normal_(model.model.layer_engram.gates[0].value.weight)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for _ in range(2):  # accumulated: the sparse gradient holds every row twice
        model(**batch).loss.backward()
    gradients = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    found = trainer._clip_grad_norm(model) if bound else trainer._get_grad_norm(model)
    assert float(found) == pytest.approx(norm.item(), rel=1e-5)
    factor = min(1.0, bound / norm.item()) if bound else 1.0
    after = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    for first, second in zip(gradients, after, strict=True):
        torch.testing.assert_close(first * factor, second, rtol=1e-3, atol=1e-9)


def test_training_learns_through_the_rows_alone(make_trainer):
    """With the head frozen in silence, what is learned is in the rows."""
    rows = Dataset.from_dict({"text": [TEXT] * 16})
    trainer = make_trainer(rows, max_steps=30, learning_rate=1e-2, logging_steps=30)
    trainer.model.model.ctm.requires_grad_(False)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_is_bitwise_the_uninterrupted_one(recipe, tmp_path, accumulation):
    changes = {
        "max_steps": 6,
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "save_packed": False,
    }
    path = recipe(**changes, gradient_accumulation_steps=accumulation, output_dir=str(tmp_path / "whole"))
    run_recipe(path)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    run_recipe(path, ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "true"])
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert whole.read_bytes() != (tmp_path / "whole" / "checkpoint-3" / "model.safetensors").read_bytes()
    names = load_file(whole).keys()
    assert {name.split(".")[1] for name in names} == {"ctm", "layer_engram"}
    assert "model.layer_engram.rows.weight" in names


def test_quantised_backbone_is_trained_on(recipe, tmp_path):
    summary = run_recipe(recipe(backbone_quantization="nf4", max_steps=20, save_strategy="no"))
    assert summary["karla_loss"] < 0.8 * summary["backbone_loss"]
    loaded = KarlaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.engram_layer_ids == [0, 1]
