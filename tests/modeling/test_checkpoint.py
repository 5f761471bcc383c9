"""Checkpoints: what is saved, that it comes back exactly, and that a failed save or a damaged file harms nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

from karla_hf import KarlaConfig, KarlaForCausalLM, KarlaModel
from karla_hf.modeling import checkpoint_karla


IDS = torch.arange(2, 40)[None]


HUB_FILES = {
    path.name
    for path in Path(checkpoint_karla.__file__).parent.glob("*_karla.py")
    if not path.name.startswith("reference_")  # slow twins, for tests alone
}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def stored(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkpoint_holds_head_memory_code_and_the_backbones_name(named, saved, backbone_folder):
    files = {path.name for path in saved.iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} | HUB_FILES
    assert "engram" in files
    assert not any(name.startswith((".", "reference_")) or name.endswith(".tmp") for name in files)
    assert set(stored(saved)) == {f"model.ctm.{name}" for name in named.model.ctm.state_dict()}
    config = json.loads((saved / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(backbone_folder)
    assert config["backbone_included"] is False
    assert "quantization_config" not in config
    head = sum(tensor.nbytes for tensor in named.model.ctm.state_dict().values())
    assert (saved / "model.safetensors").stat().st_size < head + 10_000


def test_reloaded_karla_is_equal(named, saved, tokenizer, remember):
    loaded, report = KarlaForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert torch.equal(logits(loaded), logits(named))
    assert (
        loaded.packs() == named.packs() == {"default": loaded.packs()["default"], "second": loaded.packs()["second"]}
    )
    assert loaded.tokenizer_sha256 == named.tokenizer_sha256
    assert not loaded.training
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in named.named_parameters() if p.requires_grad
    }
    assert torch.equal(loaded.generate(IDS, max_new_tokens=5), named.generate(IDS, max_new_tokens=5))
    for karla in (loaded, named):
        remember(karla, IDS + 100, pack="third")
        karla.forget("second")
    assert torch.equal(logits(loaded), logits(named))


def test_saving_what_was_loaded_saves_the_same(named, saved, tmp_path):
    KarlaForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    first, again = contents(saved), contents(tmp_path / "again")
    assert {name: data for name, data in first.items() if not name.startswith("tokenizer")} == again


@pytest.mark.parametrize("tied", [False, True])
def test_self_contained_checkpoint(make_backbone, make_karla, remember, tmp_path, tied):
    karla = make_karla(make_backbone(tie_word_embeddings=tied))
    remember(karla, IDS)
    karla.save_pretrained(tmp_path)
    names = set(stored(tmp_path))
    assert any(name.startswith("model.backbone.layers.2.") for name in names)
    assert ("lm_head.weight" in names) is not tied
    loaded = KarlaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(karla))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    assert all(n.startswith("model.ctm.") for n, p in loaded.named_parameters() if p.requires_grad)
    assert torch.equal(logits(loaded.train()), logits(karla))
    assert not loaded.model.backbone.training
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again").keys() >= {"model.safetensors"}
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(tmp_path / "again")), logits(karla))


@pytest.mark.parametrize("tied", [False, True])
def test_bare_model_of_a_self_contained_checkpoint(make_backbone, make_karla, tmp_path, tied):
    karla = make_karla(make_backbone(tie_word_embeddings=tied))
    karla.save_pretrained(tmp_path)
    model = KarlaModel.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, karla.model(IDS).last_hidden_state)
        if tied:
            found, expected = (m(IDS, certainty_threshold=0.5) for m in (model, karla.model))
            assert torch.equal(found.ticks_used, expected.ticks_used)
            assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        else:
            with pytest.raises(
                ValueError, match=r"without the output layer .*; load the checkpoint as KarlaForCausalLM"
            ):
                model(IDS, certainty_threshold=0.5)


def test_named_karla_can_be_saved_with_its_backbone(named, backbone_folder, tmp_path):
    expected = logits(named)
    named.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert named.config.backbone_included is False
    shutil.rmtree(backbone_folder)
    whole = KarlaForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(whole), expected)
    assert whole.config.backbone_included is True


def test_auto_classes_load_the_installed_package(named, saved):
    assert type(AutoConfig.from_pretrained(saved)) is KarlaConfig
    causal_lm, model = AutoModelForCausalLM.from_pretrained(saved), AutoModel.from_pretrained(saved)
    assert (type(causal_lm), type(model)) == (KarlaForCausalLM, KarlaModel)
    assert torch.equal(logits(causal_lm), logits(named))
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, named.model(IDS).last_hidden_state)


def test_karla_model_saves_and_reloads(named, saved, tmp_path):
    model = KarlaModel.from_pretrained(saved)
    model.save_pretrained(tmp_path / "model")
    assert set(stored(tmp_path / "model")) == {f"ctm.{name}" for name in named.model.ctm.state_dict()}
    again = KarlaModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, named.model(IDS).last_hidden_state)


def test_pipeline_writes_text(named, saved, words):
    write = pipeline("text-generation", model=str(saved), tokenizer=AutoTokenizer.from_pretrained(saved))
    text = words(IDS[0, :9])
    found = write(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    expected = named.generate(IDS[:, :9], max_new_tokens=5, do_sample=False)[0, 9:]
    assert found == text + write.tokenizer.decode(expected, skip_special_tokens=True)


def test_fresh_process_without_the_package_gets_the_same(named, saved, tmp_path):
    """Only transformers and what the folder holds: five classes, logits, memory, generation, saving."""
    code = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "karla_hf":
            raise ImportError("karla_hf is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(2, 40)[None]
with torch.no_grad():
    result = {
        "logits": model(ids).logits,
        "state": AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state,
        "generated": model.generate(ids, max_new_tokens=5, do_sample=False),
    }
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
result["text"] = write("w5 w6 w7 w8 w9", max_new_tokens=5, do_sample=False)[0]["generated_text"]
model.read("w50 w51 w52 w53 w54 w55 w56", tokenizer, pack="there", progress=False)
model.save_pretrained(out + "/saved")
with torch.no_grad():
    result["after"] = AutoModelForCausalLM.from_pretrained(out + "/saved", trust_remote_code=True)(ids + 40).logits
    assert torch.equal(result["after"], model(ids + 40).logits)
result["modules"] = [name for name in sys.modules if name.split(".")[0] == "karla_hf"]
torch.save(result, out + "/result.pt")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, str(saved), str(tmp_path)]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    assert result["modules"] == []
    assert torch.equal(result["logits"], logits(named))
    with torch.no_grad():
        assert torch.equal(result["state"], named.model(IDS).last_hidden_state)
    assert torch.equal(result["generated"], named.generate(IDS, max_new_tokens=5, do_sample=False))
    assert result["text"].startswith("w5 w6 w7 w8 w9")
    here = KarlaForCausalLM.from_pretrained(tmp_path / "saved")
    assert "there" in here.packs()
    with torch.no_grad():
        assert torch.equal(here(IDS + 40).logits, result["after"])


@pytest.mark.parametrize("packed", [False, True])
def test_head_without_neurons_comes_back_equal(make_karla, backbone_folder, tmp_path, packed):
    karla = make_karla(str(backbone_folder), ctm_num_neurons=0)
    expected = logits(karla)
    (karla.pack() if packed else karla).save_pretrained(tmp_path / "karla")
    assert {name.split(".")[2] for name in stored(tmp_path / "karla")} == {
        "memory", "stream_query", "stream_out", "stream_in", "stream_write",
    }  # fmt: skip
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(tmp_path / "karla")), expected)


def test_asked_dtype_reaches_head_and_backbone(named, saved):
    half = KarlaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert dtypes.pop("model.ctm.sync.decay") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    difference = logits(half).float() - logits(named)
    assert difference.abs().mean() < 0.1 * logits(named).std()


def test_backbone_kwargs_reach_the_backbone_alone(saved):
    mixed = KarlaForCausalLM.from_pretrained(saved, backbone_kwargs={"dtype": torch.bfloat16})
    assert mixed.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in mixed.model.ctm.parameters()} == {torch.float32}
    assert torch.isfinite(logits(mixed)).all()


def test_quantization_asked_at_load_reaches_the_backbone_and_not_the_head(named, saved):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for auto_class in (KarlaForCausalLM, AutoModelForCausalLM):
        karla = auto_class.from_pretrained(saved, quantization_config=quantization)
        assert karla.model.backbone.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        head = {name: (type(module), parameter.dtype) for name, module in karla.model.ctm.named_modules()
                for parameter in module.parameters(recurse=False)}  # fmt: skip
        assert head == {name: (type(module), parameter.dtype) for name, module in named.model.ctm.named_modules()
                        for parameter in module.parameters(recurse=False)}  # fmt: skip
        assert getattr(karla.config, "quantization_config", None) is None
        assert not getattr(karla, "is_quantized", False)
        assert logits(karla).shape == (1, 38, 300)
        with pytest.raises(ValueError, match="the backbone is quantised"):
            karla.save_pretrained(saved, include_backbone=True)


def test_fields_of_the_configuration_can_be_set_at_load(named, saved, backbone_folder, tmp_path):
    for auto_class in (KarlaForCausalLM, AutoModelForCausalLM):
        karla = auto_class.from_pretrained(saved, ctm_num_ticks=2, certainty_threshold=0.5)
        assert (karla.config.ctm_num_ticks, karla.config.certainty_threshold) == (2, 0.5)
    with torch.no_grad():
        assert torch.equal(karla(IDS).logits, named(IDS, max_ticks=2, certainty_threshold=0.5).logits)
    with pytest.raises(TypeError, match="ctm_ticks"):
        KarlaForCausalLM.from_pretrained(saved, ctm_ticks=2)
    backbone_folder.rename(tmp_path / "moved")
    moved = KarlaForCausalLM.from_pretrained(saved, base_model_name_or_path=str(tmp_path / "moved"))
    assert torch.equal(logits(moved), logits(named))


def test_packed_head_reloads_equal_and_smaller(named, saved, tmp_path):
    expected = logits(named)
    assert named.pack() is named
    assert torch.equal(logits(named), expected)
    named.save_pretrained(tmp_path / "packed")
    loaded, report = KarlaForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert torch.equal(logits(loaded), expected)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (saved, tmp_path / "packed")]
    ternary = sum(layer.weight.nbytes for layer in KarlaForCausalLM.from_pretrained(saved).model.ctm.modules()
                  if getattr(layer, "is_packed", None) is False)  # fmt: skip
    assert sizes[1] < sizes[0] - 0.9 * ternary
    assert {t.dtype for name, t in stored(tmp_path / "packed").items() if "packed" in name} == {torch.uint8}
    loaded.pack(False)
    torch.testing.assert_close(logits(loaded), expected)
    assert loaded.config.ctm_packed is False
    assert any(name.endswith("up.weight") for name, p in loaded.named_parameters() if p.requires_grad)


def test_packed_head_in_half_precision_keeps_its_scales(named, tmp_path):
    named.pack().save_pretrained(tmp_path / "packed")
    half = KarlaForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert half.model.ctm.up.weight_scale.dtype == torch.float32
    difference = logits(half).float() - logits(named)
    assert difference.abs().mean() < 0.1 * logits(named).std()


def test_trainers_state_dict_is_cut_to_the_head(named, tmp_path):
    named.save_pretrained(tmp_path / "trainer", state_dict=named.state_dict())
    assert set(stored(tmp_path / "trainer")) == {f"model.ctm.{name}" for name in named.model.ctm.state_dict()}
    assert torch.equal(logits(KarlaForCausalLM.from_pretrained(tmp_path / "trainer")), logits(named))


def test_other_processes_write_nothing_of_the_memory(named, tmp_path):
    named.save_pretrained(tmp_path / "rank", is_main_process=False)
    assert not (tmp_path / "rank" / "engram").exists()


def test_memory_alone_can_be_saved_into_a_checkpoint(named, saved, remember):
    before = contents(saved)
    remember(named, IDS + 60, pack="later")
    named.save_memory(saved)
    after = contents(saved)
    assert {name for name in before if before[name] != after.get(name)} == {"engram/manifest.json"}
    assert all(name.startswith("engram/later-") for name in after.keys() - before.keys())
    assert KarlaForCausalLM.from_pretrained(saved).packs() == named.packs()


def test_backbone_without_a_name_needs_to_be_included(make_karla, tmp_path):
    with pytest.raises(ValueError, match=r"^The backbone has no name to load it by, .*; use include_backbone=True\.$"):
        make_karla().save_pretrained(tmp_path, include_backbone=False)
