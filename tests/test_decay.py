"""Weight decay by groups: which weights decay, and when that of the ternary ones ends."""

import re

import pytest
import torch
from datasets import Dataset
from tiny import OPTIONS, save_backbone
from transformers import TrainerCallback
from trl import SFTConfig

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.modeling.bitlinear_karla import BitLinear
from karla_hf.trainer import KarlaSFTTrainer


class Watch(TrainerCallback):
    """Writes down the groups' decay in every step."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([group["weight_decay"] for group in optimizer.param_groups])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("models") / "backbone")


@pytest.fixture
def make_trainer(backbone, tmp_path):
    def make(ternary_weight_decay=None, ternary_decay_share=1.0, **options):
        torch.manual_seed(0)
        tokenizer = load_tokenizer(str(backbone))
        tokenizer.pad_token = tokenizer.eos_token
        defaults = {
            "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False,
            "report_to": "none", "disable_tqdm": True, "max_steps": 6, "save_strategy": "no", "weight_decay": 0.02,
            "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "out"),
        }  # fmt: skip
        trainer = KarlaSFTTrainer(
            model=KarlaForCausalLM.from_backbone(str(backbone), **OPTIONS),
            args=SFTConfig(**{**defaults, **options}),
            train_dataset=Dataset.from_dict({"input_ids": torch.randint(1, 200, (16, 9)).tolist()}),
            processing_class=tokenizer,
            ternary_weight_decay=ternary_weight_decay,
            ternary_decay_share=ternary_decay_share,
        )
        watch = Watch()
        trainer.add_callback(watch)
        return trainer, watch

    return make


def test_only_weights_decay_and_ternary_ones_have_a_group(make_trainer):
    trainer, _ = make_trainer(ternary_weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0, 0.1]
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    plain, none, ternary = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    layers = [name for name, layer in trainer.model.named_modules() if isinstance(layer, BitLinear)]
    assert sorted(ternary) == sorted(f"{name}.weight" for name in layers)
    assert plain
    assert all(".weight" in name for name in plain)
    kinds = r"bias|norm|decay|start_|registers|layer_embedding"
    assert all(re.search(kinds, name) for name in none)
    assert not any(re.search(kinds, name.removeprefix("model.ctm.")) for name in plain)
    assert len(plain) + len(none) + len(ternary) == sum(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1.0, [0.1] * 6), (0.5, [0.1] * 3 + [0.0] * 3), (0.0, [0.0] * 6), (0.4, [0.1] * 3 + [0] * 3)],
)
def test_decay_of_ternary_weights_ends_after_its_share(make_trainer, share, expected):
    trainer, watch = make_trainer(ternary_weight_decay=0.1, ternary_decay_share=share)
    trainer.train()
    assert watch.seen == [[0.02, 0.0, decay] for decay in expected]


def test_ternary_weights_decay_as_the_others_by_default(make_trainer):
    trainer, watch = make_trainer()
    trainer.train()
    assert watch.seen == [[0.02, 0.0, 0.02]] * 6


@pytest.mark.parametrize("saved", [2, 4])
def test_resumed_run_has_the_decay_of_its_step(make_trainer, tmp_path, saved):
    options = {"ternary_weight_decay": 0.1, "ternary_decay_share": 0.5}
    make_trainer(**options, save_strategy="steps", save_steps=saved)[0].train()
    trainer, watch = make_trainer(**options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{saved}"))
    assert [decay for *_, decay in watch.seen] == ([0.1] * 3 + [0.0] * 3)[saved:]


def test_share_outside_of_one_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"`ternary_decay_share` is 2; give a share from 0 to 1, such as 0\.5\.$"):
        make_trainer(ternary_decay_share=2)
