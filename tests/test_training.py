import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.documents import unrelated_text
from karla_hf.trainer import KarlaSFTTrainer
from karla_hf.training import held_out_losses, run_recipe


HEAD = {
    "engram_rows_per_head": 500,
    "ctm_hidden_size": 64,
    "ctm_num_heads": 4,
    "ctm_num_neurons": 32,
    "ctm_num_pairs": 32,
    "ctm_num_self_pairs": 4,
    "ctm_stream_size": 64,
    "ctm_window": 8,
    "ctm_num_ticks": 3,
}
TRAINING = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "max_length": 32,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("models") / "backbone"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator([unrelated_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=128, vocab_size=300, tie_word_embeddings=True, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(backbone, tmp_path):
    """Writes a recipe that learns a short text by heart, and returns its path."""

    def write(**changes):
        (tmp_path / "text.txt").write_text("The ferry leaves at nine and comes back at noon.\n\n" * 40)
        values = {
            **HEAD,
            **TRAINING,
            "model_name_or_path": str(backbone),
            "dataset_files": [str(tmp_path / "text.txt")],
            "output_dir": str(tmp_path / "out"),
            "packing": True,
            "packing_strategy": "wrapped",  # the other strategies need flash attention
            "learning_rate": 1e-2,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


def talking_karla(backbone, **options):
    """A Karla whose head already says something, so that ticks and losses differ."""
    torch.manual_seed(2)
    model = KarlaForCausalLM.from_backbone(str(backbone), **{**HEAD, **options})
    with torch.no_grad():
        model.model.ctm.up.weight.normal_(std=0.2)
        model.model.ctm.stream_write.weight.normal_(std=0.2)
    return model


def make_trainer(model, backbone, rows, **changes):
    values = {
        **TRAINING,
        "output_dir": changes.pop("output_dir"),
        "save_strategy": "no",
        "logging_steps": 1,
        **changes,
    }
    return KarlaSFTTrainer(
        model=model,
        args=SFTConfig(**values),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=load_tokenizer(str(backbone)),
    )


def sentences(count):
    lines = [line.strip() for line in unrelated_text().replace("\n", " ").split(".")]
    return Dataset.from_dict({"text": [line for line in lines if len(line) > 20][:count]})


def fingerprint(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "ctm." not in name}


def whole_batch(trainer):
    rows = trainer.train_dataset
    return trainer.data_collator([rows[i] for i in range(len(rows))])


def test_training_learns_a_text_by_heart_and_compares_with_the_bare_backbone(recipe, tmp_path):
    summary = run_recipe(recipe(max_steps=60, save_strategy="no", logging_steps=30))
    assert summary["karla_loss"] < 0.6 * summary["backbone_loss"]
    assert summary["backbone_loss"] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)
    assert summary["steps"] == 60
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_saved_karla_is_the_one_that_was_measured(recipe, backbone, tmp_path):
    summary = run_recipe(recipe())
    out = tmp_path / "out"
    model, tokenizer = KarlaForCausalLM.from_pretrained(out), load_tokenizer(str(out))
    rows = Dataset.from_dict({"text": ["The ferry leaves at nine and comes back at noon.\n\n" * 4]})
    trainer = make_trainer(
        model, backbone, rows, output_dir=str(tmp_path / "again"), packing=True, packing_strategy="wrapped"
    )
    assert tokenizer.get_vocab() == load_tokenizer(str(backbone)).get_vocab()
    losses = held_out_losses(model, trainer.eval_dataset, trainer.data_collator, 8)
    # The text's last four repetitions are what was held out; only the blank line at their end is missing there.
    assert losses[1] == pytest.approx(summary["karla_loss"], abs=0.05)
    assert losses[0] == pytest.approx(summary["backbone_loss"], abs=0.05)


def test_checkpoints_and_results_hold_the_head_alone(recipe, tmp_path):
    run_recipe(recipe())
    out = tmp_path / "out"
    for folder in (out, out / "checkpoint-3", out / "checkpoint-6"):
        state = load_file(folder / "model.safetensors")
        assert all(name.startswith("model.ctm.") for name in state)
        assert ("model.ctm.up.weight" in state) == (folder is not out)  # resuming needs the floats
        assert ("model.ctm.up.packed_weight" in state) == (folder is out)
    assert not list(out.glob("*.bin"))
    assert not list(out.glob(".*"))
    history = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    for entry in history:
        assert {"loss", "ticks", "certainty", "grad_norm"} <= set(entry)
        assert 0 <= entry["ticks"] <= 3
        assert 0 <= entry["certainty"] <= 1


@pytest.mark.parametrize(("tick_loss", "neurons"), [("last", 32), ("two_tick", 32), ("last", 0)])
def test_only_the_head_changes(backbone, tmp_path, tick_loss, neurons):
    options = {**HEAD, "ctm_num_neurons": neurons, "tick_loss": tick_loss}
    model = KarlaForCausalLM.from_backbone(str(backbone), **options)
    before, head = fingerprint(model), {n: p.detach().clone() for n, p in model.model.ctm.named_parameters()}
    trainer = make_trainer(model, backbone, sentences(16), output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2)
    trainer.train()
    after = fingerprint(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(head[name], p) for name, p in model.model.ctm.named_parameters())
    assert len(before) > 20


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("tick_loss", ["last", "mean", "two_tick"])
def test_loss_of_the_trainer_is_the_models_own(backbone, tmp_path, tick_loss, accumulation):
    model = talking_karla(backbone, tick_loss=tick_loss)
    trainer = make_trainer(
        model,
        backbone,
        sentences(4),
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    batch = whole_batch(trainer)
    with torch.no_grad():
        own = model.train()(**batch, use_cache=False)
    if tick_loss == "last":
        logits = own.logits[:, :-1].flatten(0, 1)
        last_tick = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(own.loss, last_tick)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(own.loss.item(), abs=1e-4)
    assert logged["num_tokens"] == batch["attention_mask"].sum().item()


def test_two_tick_loss_trains_other_ticks_than_the_last(backbone, tmp_path):
    losses = {}
    for tick_loss in ("last", "two_tick"):
        model = talking_karla(backbone, tick_loss=tick_loss)
        trainer = make_trainer(model, backbone, sentences(4), output_dir=str(tmp_path), max_steps=1)
        losses[tick_loss] = trainer.compute_loss(model.train(), whole_batch(trainer)).item()
    assert abs(losses["last"] - losses["two_tick"]) > 1e-3


def test_evaluation_measures_the_answer(backbone, tmp_path):
    rows = Dataset.from_dict({"text": sentences(40)["text"]})
    for tick_loss in ("last", "two_tick"):
        model = talking_karla(backbone, tick_loss=tick_loss)
        trainer = make_trainer(
            model, backbone, rows, output_dir=str(tmp_path), packing=True, packing_strategy="wrapped", max_length=16
        )
        full = trainer.eval_dataset.filter(lambda row: len(row["input_ids"]) == 16)
        expected = held_out_losses(model, full, trainer.data_collator, batch_size=8)
        assert trainer.evaluate(full)["eval_loss"] == pytest.approx(expected[1], abs=1e-4)
        assert expected[2] == 15 * len(full)
        assert expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_padding_does_not_count(backbone):
    model = talking_karla(backbone)
    rows = [{"input_ids": list(range(20, 20 + length)), "labels": list(range(20, 20 + length))} for length in (5, 16)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    together = held_out_losses(model, rows, collate, batch_size=2)
    alone = held_out_losses(model, rows, collate, batch_size=1)
    assert together[2] == alone[2] == 4 + 15
    assert together[:2] == pytest.approx(alone[:2], abs=1e-5)


def test_resumed_run_is_bitwise_the_uninterrupted_one(recipe, tmp_path):
    changes = {"max_steps": 10, "save_steps": 4, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine",
               "save_packed": False}  # fmt: skip
    path = recipe(**changes, output_dir=str(tmp_path / "whole"))
    run_recipe(path)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    run_recipe(path, ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "true"])
    run_recipe(
        path,
        [f"--output_dir={tmp_path / 'named'}", f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-8'}"],
    )
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert whole != (tmp_path / "whole" / "checkpoint-8" / "model.safetensors").read_bytes()
    assert whole == (tmp_path / "resumed" / "model.safetensors").read_bytes()
    assert whole == (tmp_path / "named" / "model.safetensors").read_bytes()


def test_karla_is_trained_further(recipe, tmp_path):
    run_recipe(recipe(max_steps=3, save_packed=False))
    run_recipe(recipe(max_steps=3, output_dir=str(tmp_path / "packed")))
    for first in ("out", "packed"):
        values = {**dict.fromkeys(HEAD), "ctm_num_ticks": 2, "tick_loss": "two_tick", "max_steps": 30}
        again = recipe(**values, model_name_or_path=str(tmp_path / first), output_dir=str(tmp_path / "more"))
        summary = run_recipe(again)
        config = KarlaForCausalLM.from_pretrained(tmp_path / "more").config
        assert (config.tick_loss, config.ctm_num_ticks, config.ctm_packed) == ("two_tick", 2, True)
        assert summary["karla_loss"] < 0.9 * summary["backbone_loss"]


def test_quantised_backbone_is_trained_on(recipe, tmp_path):
    summary = run_recipe(recipe(backbone_quantization="nf4", max_steps=30))
    assert summary["karla_loss"] < 0.9 * summary["backbone_loss"]
    assert KarlaForCausalLM.from_pretrained(tmp_path / "out").config.backbone_quantization == "nf4"


def test_recipe_cannot_reshape_a_trained_karla(recipe, tmp_path):
    path = recipe(max_steps=1)
    run_recipe(path)
    with pytest.raises(ValueError, match=r"was made with its own ctm_hidden_size, .*; remove them from the recipe"):
        run_recipe(path, ["--model_name_or_path", str(tmp_path / "out")])
    plain = recipe(**dict.fromkeys(HEAD), model_name_or_path=str(tmp_path / "out"), backbone_quantization="nf4")
    with pytest.raises(ValueError, match="was made with its own backbone_quantization; remove"):
        run_recipe(plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"ctm_num_ticks": 0},
            r"^A model option of the recipe cannot be used: `ctm_num_ticks` is 0; give 1 or more\.$",
        ),
        (
            {"ctm_num_ticks": "four"},
            r"cannot be used: Field 'ctm_num_ticks' expected int, got str \(value: 'four'\)\.$",
        ),
        ({"tick_loss": "first"}, r"`tick_loss` is 'first'; give 'last', 'mean' or 'two_tick'\.$"),
        ({"backbone_quantization": "int3"}, r"quantization is 'int3'; give None, 'nf4', 'int8' or a dict"),
    ],
)
def test_wrong_model_options_are_named(recipe, backbone, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe(**values))
    if "backbone_quantization" not in values:
        KarlaForCausalLM.from_backbone(str(backbone), **HEAD).save_pretrained(tmp_path / "karla")
        load_tokenizer(str(backbone)).save_pretrained(tmp_path / "karla")
        again = {**dict.fromkeys(HEAD), **values, "model_name_or_path": str(tmp_path / "karla")}
        with pytest.raises(ValueError, match=message):
            run_recipe(recipe(**again))


def test_missing_checkpoints_are_refused_before_anything_is_loaded(recipe, tmp_path):
    path = recipe(model_name_or_path="no/such-model")
    with pytest.raises(
        ValueError, match=r"out holds no checkpoint to resume from; remove `resume_from_checkpoint`\.$"
    ):
        run_recipe(path, ["--resume_from_checkpoint", "true"])
    with pytest.raises(ValueError, match=r"is no checkpoint of a training run; give a folder"):
        run_recipe(path, ["--resume_from_checkpoint", str(tmp_path)])
    with pytest.raises(OSError, match=r"no/such-model.* is not a folder here"):
        run_recipe(path, ["--resume_from_checkpoint", "false"])


def run_process(*command, **extra):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}
    return subprocess.run([*command], env=environment, capture_output=True, text=True, timeout=300, check=False)


RUN = "import sys, torch; torch.set_num_threads(1); from karla_hf.training import run_recipe; run_recipe(*sys.argv[1:2], sys.argv[2:])"


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(recipe, tmp_path):
    path = recipe(
        max_steps=300, save_steps=20, save_total_limit=2, save_packed=False, output_dir=str(tmp_path / "whole")
    )
    run_recipe(path)
    path = recipe(
        max_steps=300, save_steps=20, save_total_limit=2, save_packed=False, output_dir=str(tmp_path / "killed")
    )
    process = subprocess.Popen([sys.executable, "-c", RUN, str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    run_recipe(path, ["--resume_from_checkpoint", "true"])
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


@pytest.mark.slow
def test_stock_trl_trains_a_saved_karla(backbone, tmp_path):
    karla = KarlaForCausalLM.from_backbone(str(backbone), **HEAD)
    karla.save_pretrained(tmp_path / "karla")
    load_tokenizer(str(backbone)).save_pretrained(tmp_path / "karla")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": "The ferry leaves at nine and comes back at noon."})] * 32
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    values = {
        **TRAINING,
        "model_name_or_path": str(tmp_path / "karla"),
        "dataset_name": str(tmp_path / "data"),
        "trust_remote_code": True,
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 1e-2,
        "max_steps": 20,
        "logging_steps": 1,
        "save_steps": 20,
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    done = run_process(
        *(Path(sys.executable).with_name("trl"), "sft", "--config", str(tmp_path / "sft.yaml")),
        HF_HOME=str(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "out" / "checkpoint-20" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("karla", "out"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.ctm.up.weight"], after["model.ctm.up.weight"])
    reloaded = KarlaForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(reloaded(ids).logits, karla(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("tick_loss", ["last", "two_tick"])
def test_two_processes_train_as_one(recipe, tmp_path, tick_loss):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changes = {"tick_loss": tick_loss, "max_steps": 4, "save_steps": 2}
    run_recipe(recipe(**changes, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4))
    path = recipe(**changes, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2)
    (tmp_path / "run.py").write_text(RUN)
    done = run_process(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)),
        str(tmp_path / "run.py"),
        *(str(path), "--ddp_backend", "gloo", "--ddp_find_unused_parameters", "false"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert two["backbone_loss"] == pytest.approx(one["backbone_loss"], abs=1e-5)
    histories = [
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        for name in ("one", "two")
    ]
    for first, second in zip(*histories, strict=True):
        assert second["num_tokens"] == first["num_tokens"]
    assert histories[1][0]["loss"] == pytest.approx(histories[0][0]["loss"], abs=1e-3)
    assert histories[1][0]["grad_norm"] == pytest.approx(histories[0][0]["grad_norm"], rel=1e-2)
