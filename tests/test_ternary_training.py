"""Muon and the way from float to ternary weights in KarlaSFTTrainer."""

import pytest
import torch
from datasets import Dataset
from tiny import OPTIONS, save_backbone
from transformers import TrainerCallback
from trl import SFTConfig

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.modeling.bitlinear_karla import BitLinear
from karla_hf.muon import MuonAdamW
from karla_hf.trainer import KarlaSFTTrainer


class Watch(TrainerCallback):
    """Writes down every step's share of ternary weights and the largest learning rate of each kind of group."""

    def __init__(self):
        self.shares, self.rates = [], []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.shares.append({layer.ternary_share for layer in model.modules() if isinstance(layer, BitLinear)})
        self.rates.append({bool(group.get("muon")): group["lr"] for group in optimizer.param_groups})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("models") / "backbone")


def make_trainer(backbone, folder, **options):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(backbone))
    tokenizer.pad_token = tokenizer.eos_token
    arguments = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False,
        "report_to": "none", "disable_tqdm": True, "max_steps": 6, "save_steps": 3, "learning_rate": 1e-3,
        "per_device_train_batch_size": 2, "output_dir": str(folder),
    }  # fmt: skip
    trainer = KarlaSFTTrainer(
        model=KarlaForCausalLM.from_backbone(str(backbone), **OPTIONS),
        args=SFTConfig(**{**arguments, **options}),
        train_dataset=Dataset.from_dict({"input_ids": torch.randint(1, 200, (16, 9)).tolist()}),
        processing_class=tokenizer,
        ternary_warmup=0.5,
        muon_learning_rate=0.02,
    )
    watch = Watch()
    trainer.add_callback(watch)
    return trainer, watch


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_weights_become_ternary_and_both_optimisers_follow_the_schedule(backbone, tmp_path):
    trainer, watch = make_trainer(backbone, tmp_path)
    before = weights(trainer)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, MuonAdamW)
    assert watch.shares == [{0.0}, {1 / 3}, {2 / 3}, {1.0}, {1.0}, {1.0}]
    for rates in watch.rates:  # both fall from their own peak
        assert rates[True] == pytest.approx(20 * rates[False])
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert {f"{n}.weight" for n, layer in trainer.model.named_modules() if isinstance(layer, BitLinear)} <= moved


def test_a_resumed_run_ends_as_one_that_was_never_stopped(backbone, tmp_path):
    whole, _ = make_trainer(backbone, tmp_path)
    whole.train()
    resumed, watch = make_trainer(backbone, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert watch.shares == [{1.0}] * 3
    again = weights(resumed)
    assert all(torch.equal(value, again[name]) for name, value in weights(whole).items())


def test_other_optimisers_are_refused(backbone, tmp_path):
    trainer, _ = make_trainer(backbone, tmp_path, optim="sgd")
    with pytest.raises(ValueError, match="`optim` is 'sgd', but beside Muon only"):
        trainer.create_optimizer()
