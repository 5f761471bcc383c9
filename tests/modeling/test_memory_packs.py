"""What a model does with its packs: sources, export, import, merge, and two models on one folder."""

import json

import pytest
import torch

from karla_hf import KarlaForCausalLM


IDS = torch.arange(2, 40)[None]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_titles_become_the_sources_of_a_pack(karla, tokenizer, words, named, tmp_path):
    text = words(IDS[0])
    karla.read(text, tokenizer, pack="a", title="one.txt", progress=False)
    karla.read([text, text], tokenizer, pack="a", title=["two.txt", "one.txt", "three.txt"], progress=False)
    karla.read(text, tokenizer, pack="a", progress=False)
    karla.read(text, tokenizer, pack="a", title="never.txt", sign=-1, progress=False)
    assert karla.engram.packs["a"].sources == ["one.txt", "two.txt", "three.txt"]
    karla.save_pretrained(tmp_path)
    assert KarlaForCausalLM.from_pretrained(tmp_path).engram.packs["a"].sources == ["one.txt", "two.txt", "three.txt"]


def test_pack_travels_between_models_on_one_backbone(named, backbone_folder, make_karla, remember, tmp_path):
    named.export_pack("second", tmp_path / "pack")
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert manifest["made_with"] == {"backbone": str(backbone_folder), "revision": None, "source": None, "seed": 0}
    assert manifest["tokenizer_sha256"] == named.tokenizer_sha256
    other = make_karla(str(backbone_folder), speaks=False)
    assert other.import_pack(tmp_path / "pack", name="theirs") == "theirs"
    assert other.packs() == {"theirs": named.packs()["second"]}
    other.save_pretrained(tmp_path / "other")
    again = KarlaForCausalLM.from_pretrained(tmp_path / "other")
    assert torch.equal(logits(again), logits(other))
    remember(other, IDS, pack="own")
    other.forget("theirs")
    other.forget("own")
    assert torch.equal(logits(other), logits(make_karla(str(backbone_folder), speaks=False)))


def test_pack_of_another_model_is_refused(named, make_karla, backbone_folder, tmp_path):
    named.export_pack("second", tmp_path / "pack")
    for options, reason in (({"engram_seed": 1}, "another seed"), ({"engram_head_dim": 4}, "row width 64 instead of 32"),
                            ({"engram_update_periods": [1, 4]}, "update periods")):  # fmt: skip
        with pytest.raises(ValueError, match=f"was made with {reason}.*, so it does not fit this memory"):
            make_karla(str(backbone_folder), **options).import_pack(tmp_path / "pack")


def test_merged_packs_give_the_logits_of_the_stack(named, tmp_path):
    before = logits(named)
    named.merge_packs(["second", "default"], "all")
    assert list(named.packs()) == ["all"]
    torch.testing.assert_close(logits(named), before, atol=0.05, rtol=0.05)
    named.save_pretrained(tmp_path)
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(tmp_path)), logits(named))


def test_two_models_on_one_folder_do_not_lose_each_others_work(named, saved, remember, tmp_path):
    first, second = KarlaForCausalLM.from_pretrained(saved), KarlaForCausalLM.from_pretrained(saved)
    remember(first, IDS + 60, pack="first")
    remember(second, IDS + 90, pack="second")
    first.save_memory(saved)
    with pytest.raises(
        OSError, match="was changed by another process since it was loaded; load it again, or save to an"
    ):
        second.save_memory(saved)
    second.save_pretrained(tmp_path / "elsewhere")
    assert "first" in KarlaForCausalLM.from_pretrained(saved).packs()


def test_many_checkpoints_of_one_model_are_complete(named, remember, tmp_path):
    for step in range(12):
        remember(named, IDS + 5 * step, pack="p")
        named.save_memory(tmp_path / str(step % 3))
        named.save_pretrained(tmp_path / "all")
        found = KarlaForCausalLM.from_pretrained(tmp_path / "all")
        assert torch.equal(logits(found, IDS + 5 * step), logits(named, IDS + 5 * step))
        assert found.packs() == named.packs()
