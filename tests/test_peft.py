"""LoRA on the frozen backbone with peft: trained, saved, loaded again, merged; nothing is lost without a word."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny import OPTIONS, make_backbone, make_tokenizer, save_backbone, speak
from torch import nn

from karla_hf import KarlaForCausalLM


IDS = torch.arange(2, 26).view(2, 12)
LORA = {"r": 4, "lora_alpha": 32, "target_modules": r".*backbone.*\.(q_proj|v_proj)"}
FACT = "The harbour master of Tiskel is Orla Venn."


@pytest.fixture
def folder(tmp_path):
    """A saved Karla that has read something, and its backbone."""
    save_backbone(tmp_path / "backbone", intermediate_size=128)
    karla = KarlaForCausalLM.from_backbone(str(tmp_path / "backbone"), **OPTIONS)
    speak(karla).read(FACT, make_tokenizer(), progress=False)
    karla.save_pretrained(tmp_path / "karla")
    return tmp_path


@pytest.fixture
def karla(folder):
    return KarlaForCausalLM.from_pretrained(folder / "karla")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def train(model, steps: int = 8) -> list[float]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=2e-2), []
    for _ in range(steps):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_adapter_trains_is_saved_and_loaded_onto_a_fresh_karla(folder, karla):
    bare = logits(karla)
    model = get_peft_model(karla, LoraConfig(**LORA))
    frozen = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    trained = logits(model)
    assert not torch.equal(trained, bare)
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(KarlaForCausalLM.from_pretrained(folder / "karla"), folder / "adapter")
    assert torch.equal(logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), bare)


def test_the_head_trains_and_is_saved_with_the_adapter(folder, karla):
    model = get_peft_model(karla, LoraConfig(**LORA, modules_to_save=["ctm"]))
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    assert any("ctm" in name for name in before)
    assert any("lora_" in name for name in before)
    train(model)
    changed = {
        name for name, value in model.named_parameters() if name in before and not torch.equal(value, before[name])
    }
    assert any(".ctm.modules_to_save" in name for name in changed)
    assert any("lora_B" in name for name in changed)
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(KarlaForCausalLM.from_pretrained(folder / "karla"), folder / "adapter")
    assert torch.equal(logits(again), logits(model))
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged", include_backbone=True)
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(folder / "merged")), logits(merged))


def test_a_merged_karla_is_saved_with_its_backbone_only(folder, karla):
    model = get_peft_model(karla, LoraConfig(**LORA))
    train(model)
    trained = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-4)
    name = merged.config.base_model_name_or_path
    said = (
        rf"^The backbone's weights are no longer those of '{name}' \(\S+q_proj\.weight is another\), as after merging an "
        "adapter, so a checkpoint without them would lose the change; use include_backbone=True.$"
    )
    with pytest.raises(ValueError, match=said):
        merged.save_pretrained(folder / "lost")
    assert not (folder / "lost").exists()
    merged.save_pretrained(folder / "merged", include_backbone=True)
    assert (merged.config.backbone_included, merged.config.backbone_changed) == (False, False)
    again = KarlaForCausalLM.from_pretrained(folder / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert (again.config.backbone_included, again.config.backbone_changed) == (True, True)
    again.save_pretrained(folder / "twice")
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(folder / "twice")), logits(merged))
    with pytest.raises(ValueError, match=rf"no longer those of '{name}', as after merging"):
        again.save_pretrained(folder / "lost", include_backbone=False)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_into_a_single_layer_is_seen(folder, safe_merge, dtype):
    karla = KarlaForCausalLM.from_pretrained(folder / "karla", backbone_kwargs={"dtype": dtype})
    model = get_peft_model(karla, LoraConfig(r=1, target_modules=r".*backbone.*layers\.1\..*o_proj"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert merged.model.changed_weights() == ["layers.1.self_attn.o_proj.weight"]


def test_an_adapter_that_was_taken_out_again_has_changed_nothing(folder, karla):
    before = logits(karla)
    unloaded = get_peft_model(karla, LoraConfig(**LORA)).unload()
    unloaded.save_pretrained(folder / "again")
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(folder / "again")), before)


@pytest.mark.parametrize("include_backbone", [False, True])
def test_a_karla_with_adapters_in_place_is_not_saved_without_them(folder, karla, include_backbone):
    model = get_peft_model(karla, LoraConfig(**LORA))
    said = (
        r"^6 layers \(model\.backbone\.layers\.0\.self_attn\.q_proj first\) carry adapters of peft, which a Karla's own "
        r"checkpoint does not hold; save them with the PeftModel's save_pretrained, or merge them first with "
        r"merge_and_unload\(\)\.$"
    )
    with pytest.raises(ValueError, match=said):
        model.get_base_model().save_pretrained(folder / "lost", include_backbone=include_backbone)
    assert not (folder / "lost").exists()


def test_rounding_and_moving_the_weights_does_not_change_them(folder, karla):
    karla.bfloat16().float().to("cpu").save_pretrained(folder / "again")
    assert karla.model.changed_weights() == []
    karla.lm_head.weight.data.add_(1.0)
    assert {"embed_tokens.weight", "1.weight"} == set(karla.model.changed_weights())
    karla.half()
    assert {"embed_tokens.weight", "1.weight"} == set(karla.model.changed_weights())


def test_a_backbone_that_is_trained_itself_is_not_lost(folder, karla):
    karla.model.backbone.requires_grad_(True)
    train(karla, steps=1)
    with pytest.raises(ValueError, match="no longer those of"):
        karla.save_pretrained(folder / "lost")


def test_quantised_weights_are_unchanged_until_an_adapter_is_merged(folder):
    karla = KarlaForCausalLM.from_backbone(str(folder / "backbone"), quantization="nf4", **OPTIONS)
    karla.save_pretrained(folder / "four")
    logits(karla)  # bitsandbytes may repack the weights at the first call
    karla.save_pretrained(folder / "four")
    assert karla.model.changed_weights() == []
    backbone = karla.model.backbone
    backbone.is_loaded_in_4bit = True  # so that peft takes its layers for 4-bit weights
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), backbone)
    with pytest.raises(ValueError, match=r"^3 layers"):
        karla.save_pretrained(folder / "four")
    for layer in backbone.layers:
        layer.self_attn.q_proj.merge()
        layer.self_attn.q_proj = layer.self_attn.q_proj.get_base_layer()
    assert len(karla.model.changed_weights()) == 3
    with pytest.raises(ValueError, match="no longer those of"):
        karla.save_pretrained(folder / "four")


def test_a_backbone_without_a_name_may_be_changed(tmp_path):
    karla = KarlaForCausalLM.from_backbone(make_backbone(), make_tokenizer(), **OPTIONS)
    karla.lm_head.weight.data.mul_(2.0)
    karla.save_pretrained(tmp_path / "own")
    again = KarlaForCausalLM.from_pretrained(tmp_path / "own")
    assert torch.equal(logits(again), logits(karla))
    assert again.config.backbone_changed is False
