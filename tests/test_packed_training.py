"""A packed Karla trains on: through its floats if it is loaded so, else around its ternary weights, with a warning."""

import pytest
import torch
from datasets import Dataset
from tiny import OPTIONS, save_backbone, speak
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from karla_hf import KarlaForCausalLM, load_tokenizer


TERNARY = "model.ctm.stream_in."


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folder of a Karla whose head is packed and speaks."""
    folder = tmp_path_factory.mktemp("packed")
    backbone = save_backbone(folder / "backbone")
    torch.manual_seed(0)
    speak(KarlaForCausalLM.from_backbone(str(backbone), **OPTIONS)).pack().save_pretrained(folder / "karla")
    load_tokenizer(str(backbone)).save_pretrained(folder / "karla")
    return folder / "karla"


@pytest.fixture
def sft(packed, tmp_path):
    """Function that trains with TRL's own trainer; returns the model."""

    def train(model):
        tokenizer = load_tokenizer(str(packed))
        tokenizer.pad_token = tokenizer.eos_token
        arguments = SFTConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=False, learning_rate=1e-2,
            dataloader_pin_memory=False, report_to="none", disable_tqdm=True, max_steps=6, save_strategy="no",
        )  # fmt: skip
        rows = Dataset.from_dict({"text": ["The ferry leaves at nine and comes back at noon."] * 16})
        SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
        return model

    return train


@pytest.mark.parametrize("load", [KarlaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_loaded_as_floats_it_says_the_same_and_trains_everywhere(packed, sft, load):
    options = {} if load == KarlaForCausalLM.from_pretrained else {"trust_remote_code": True}
    model, ids = load(packed, ctm_packed=False, **options), torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(ids).logits, KarlaForCausalLM.from_pretrained(packed)(ids).logits)
    assert not model.config.ctm_packed
    before = {name: weight.detach().clone() for name, weight in model.model.ctm.named_parameters()}
    assert "stream_in.weight" in before
    after = dict(sft(model).model.ctm.named_parameters())
    assert not any(torch.equal(weight, after[name]) for name, weight in before.items())


def test_loaded_packed_its_ternary_weights_stay_and_a_warning_says_so(packed, sft, caplog):
    model = KarlaForCausalLM.from_pretrained(packed)
    before = {name: value.clone() for name, value in model.state_dict().items() if ".ctm." in name}
    logger = logging.get_logger("karla_hf.modeling.pretrained_karla")
    logger.warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        sft(model)
    finally:
        logger.removeHandler(caplog.handler)
    assert (
        "ternary weights stay as they are in training; to train them too, load it with `ctm_packed=False`"
        in caplog.text
    )
    after = model.state_dict()
    assert torch.equal(before[f"{TERNARY}packed_weight"], after[f"{TERNARY}packed_weight"])
    assert not torch.equal(before["model.ctm.synapse_norm.weight"], after["model.ctm.synapse_norm.weight"])


def test_floats_can_be_loaded_packed(packed, tmp_path):
    model = KarlaForCausalLM.from_pretrained(packed, ctm_packed=False)
    model.save_pretrained(tmp_path)
    again = KarlaForCausalLM.from_pretrained(tmp_path, ctm_packed=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert again.config.ctm_packed
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
