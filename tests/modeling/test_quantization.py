"""Karla over a 4-bit (or 8-bit) backbone, on the CPU."""

import pytest
import torch
from transformers import DynamicCache

from karla_hf import KarlaForCausalLM


def quantized_bytes(karla) -> dict[str, bytes]:
    """The backbone's parameters as they are; `state_dict()` would unpack them."""
    return {name: parameter.detach().view(torch.uint8).numpy().tobytes() for name, parameter in
            karla.model.backbone.named_parameters()}  # fmt: skip


@pytest.fixture(params=["nf4", "int8"])
def quantized(request, backbone_folder, make_karla, remember, random_ids):
    """A Karla over a quantised backbone that speaks and has read `texts` [2, 30]."""
    karla = make_karla(str(backbone_folder), quantization=request.param)
    karla.texts = random_ids(2, 30)
    remember(karla, karla.texts)
    return karla


def test_backbone_is_quantised_and_the_head_is_not(quantized):
    weight = quantized.model.backbone.layers[0].mlp.up_proj.weight
    assert weight.dtype in (torch.uint8, torch.int8)
    assert {parameter.dtype for parameter in quantized.model.ctm.parameters()} == {torch.float32}
    assert quantized.config.backbone_quantization in ("nf4", "int8")
    assert getattr(quantized.config.text_config, "quantization_config", None) is None
    assert not getattr(quantized, "is_loaded_in_4bit", False)  # else TRL casts the head to bfloat16


def test_fresh_karla_is_its_quantised_backbone(backbone_folder, make_karla, random_ids):
    karla, ids = make_karla(str(backbone_folder), speaks=False, quantization="nf4"), random_ids(2, 9)
    with torch.no_grad():
        expected = karla.lm_head(karla.model.backbone(ids).last_hidden_state)
        assert torch.equal(karla(ids).logits, expected)


def test_reading_writes_what_surprises_the_quantised_backbone(quantized, remember):
    report = remember(quantized, quantized.texts)
    assert report.rows_written == 0
    assert report.surprise_before < 2


@torch.no_grad()
def test_pieces_equal_the_whole(quantized):
    whole = quantized(quantized.texts, use_cache=False).logits
    cache = DynamicCache()
    pieces = [quantized(p, past_key_values=cache).logits for p in quantized.texts.split([11, 1, 1, 9, 8], dim=1)]
    bound = 1e-4 if quantized.config.backbone_quantization == "nf4" else 0.05  # LLM.int8 also rounds activations
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=bound * whole.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation(quantized, options):
    found = quantized.generate(quantized.texts[:, :9], max_new_tokens=6, min_new_tokens=6, **options)
    assert found.shape == (2, 15)
    if options.get("use_cache", True) is False and quantized.config.backbone_quantization == "nf4":
        assert torch.equal(found, quantized.generate(quantized.texts[:, :9], max_new_tokens=6, min_new_tokens=6))


@torch.no_grad()
def test_reloaded_karla_is_equal(quantized, tmp_path):
    expected = quantized(quantized.texts).logits
    quantized.save_pretrained(tmp_path / "karla")
    assert torch.equal(quantized(quantized.texts).logits, expected), "saving leaves the backbone as it is"
    loaded = KarlaForCausalLM.from_pretrained(tmp_path / "karla")
    assert loaded.model.backbone.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    assert torch.equal(loaded(quantized.texts).logits, expected)


def test_quantised_backbone_cannot_be_included(quantized, tmp_path):
    with pytest.raises(
        ValueError, match=r"^include_backbone=True, but the backbone is quantised .*; save without it, or"
    ):
        quantized.save_pretrained(tmp_path / "karla", include_backbone=True)
    assert not (tmp_path / "karla").exists()


def test_head_trains_and_the_backbone_keeps_its_bytes(quantized):
    quantized.train()
    quantized(quantized.texts)  # bitsandbytes repacks its weights in the first forward pass
    before = quantized_bytes(quantized)
    optimizer = torch.optim.AdamW([p for p in quantized.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = quantized(quantized.texts, labels=quantized.texts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert quantized_bytes(quantized) == before


def test_quantisation_can_be_given_in_full(backbone_folder, make_karla, random_ids, tmp_path):
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    karla, ids = make_karla(str(backbone_folder), quantization=quantization), random_ids(1, 9)
    with torch.no_grad():
        expected = karla(ids).logits
        karla.save_pretrained(tmp_path / "karla")
        assert torch.equal(KarlaForCausalLM.from_pretrained(tmp_path / "karla")(ids).logits, expected)


def test_quantisation_with_a_torch_dtype_is_saved_as_its_name(backbone_folder, make_karla, tmp_path):
    quantization = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    karla = make_karla(str(backbone_folder), quantization=quantization)
    karla.save_pretrained(tmp_path / "karla")
    loaded = KarlaForCausalLM.from_pretrained(tmp_path / "karla")
    weight = loaded.model.backbone.layers[0].mlp.up_proj
    assert weight.compute_dtype == torch.bfloat16


def test_quantisation_can_be_dropped_at_load(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "karla")
    plain = KarlaForCausalLM.from_pretrained(tmp_path / "karla", backbone_quantization=None)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    plain.save_pretrained(tmp_path / "whole", include_backbone=True)
    whole = KarlaForCausalLM.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(whole(quantized.texts).logits, plain(quantized.texts).logits)
