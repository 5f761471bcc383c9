"""Programs of others that use a Karla as they are: pipelines, TRL's commands, torchrun, lm-eval, and `hf` on a Hub."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from hub_fixtures import loopback_hub  # noqa: F401
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, OPTIONS, save_backbone, save_karla, speak
from tiny import TRAINING as TINY_TRAINING

from karla_hf import KarlaForCausalLM
from karla_hf.checkpoints import load_checkpoint
from karla_hf.evaluation import without_and_with_memory
from karla_hf.facts import make_facts


ROOT = Path(__file__).parent.parent
FACTS = make_facts(6)
TRAINING = {**TINY_TRAINING, "seed": 0}
# What a process runs that has transformers, and of Karla only what its folder holds.
WITHOUT_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "karla_hf":
            raise ImportError("karla_hf is not installed here")

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A backbone, and a Karla that has read FACTS and whose head speaks; not to be changed."""
    root = tmp_path_factory.mktemp("clients")
    save_karla(root / "karla", save_backbone(root / "backbone", chat_template=CHAT_TEMPLATE))
    model, tokenizer = load_checkpoint(root / "karla")
    speak(model).read([fact.text for fact in FACTS], tokenizer, progress=False)
    model.save_pretrained(root / "karla")
    return root


@pytest.fixture(scope="module")
def loaded(folder):
    return load_checkpoint(folder / "karla")


def run(*command: object, home: Path, **options) -> str:
    """Run a program that must succeed; returns what it prints."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HOME": str(home / "home")}
    if command[0] in ("trl", "torchrun", "lm_eval", "hf"):
        command = (Path(sys.executable).with_name(command[0]), *command[1:])
    options = {"env": variables, "cwd": home, **options}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pipeline_continues_text_and_chats_without_the_package(folder, loaded, tmp_path):
    code = """
import json
from transformers import pipeline
write = pipeline("text-generation", sys.argv[1], trust_remote_code=True)
options = {"max_new_tokens": 8, "do_sample": False}
message = {"role": "user", "content": "Where is the key?"}
print(json.dumps({
    "class": type(write.model).__name__,
    "text": [found[0]["generated_text"] for found in write(json.loads(sys.argv[2]), **options)],
    "chat": write([message], **options)[0]["generated_text"],
    "package": "karla_hf" in sys.modules,
}))
"""
    model, tokenizer = loaded
    prompts = [fact.prompt for fact in FACTS[:2]]
    arguments = (folder / "karla", json.dumps(prompts))
    found = json.loads(run(sys.executable, "-P", "-c", WITHOUT_THE_PACKAGE + code, *arguments, home=tmp_path))
    assert (found["class"], found["package"]) == ("KarlaForCausalLM", False)

    def continued(inputs) -> str:
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert found["text"] == [prompt + continued(tokenizer(prompt, return_tensors="pt")) for prompt in prompts]
    message = {"role": "user", "content": "Where is the key?"}
    inputs = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert found["chat"] == [message, {"role": "assistant", "content": continued(inputs)}]


@pytest.fixture
def task(tmp_path) -> Path:
    """A folder with a task for lm-eval: which of four answers continues a fact."""
    answers = [fact.answer for fact in FACTS[:4]]
    rows = [{"prompt": fact.prompt, "choices": answers, "label": n} for n, fact in enumerate(FACTS[:4])]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "task": "karla_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks" / "facts.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks" / "karla_facts.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "tasks"


def log_likelihood(loaded, prompt: str, answer: str) -> float:
    """Of the answer's tokens after the prompt, one forward pass for both."""
    model, tokenizer = loaded
    context, ids = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {answer}"))
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(scores[at - 1, ids[at]].item() for at in range(len(context), len(ids)))


def test_lm_eval_gets_the_models_own_log_likelihoods(loaded, task, tmp_path):
    settings = yaml.safe_load((task / "karla_facts.yaml").read_text())
    settings["dataset_kwargs"]["cache_dir"] = str(tmp_path / "cache")
    (task / "karla_facts.yaml").write_text(yaml.safe_dump(settings))
    model, tokenizer = loaded
    karla = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=3)

    def accuracy() -> float:
        tasks = TaskManager(include_path=str(task), include_defaults=False)
        found = lm_eval.simple_evaluate(model=karla, tasks=["karla_facts"], task_manager=tasks, bootstrap_iters=0)
        for sample in found["samples"]["karla_facts"]:
            direct = [log_likelihood(loaded, sample["doc"]["prompt"], answer) for answer in sample["doc"]["choices"]]
            assert [scores[0][0] for scores in sample["resps"]] == pytest.approx(direct, abs=1e-3)
        return found["results"]["karla_facts"]["acc,none"]

    off, on = without_and_with_memory(model, accuracy)
    assert on == 1.0 > off


@pytest.mark.slow
def test_lm_eval_command(folder, loaded, task, tmp_path):
    run(
        *("lm_eval", "--model", "hf", "--model_args", f"pretrained={folder / 'karla'},trust_remote_code=True"),
        *("--tasks", "karla_facts", "--include_path", task, "--device", "cpu", "--log_samples"),
        *("--output_path", tmp_path / "out"),
        home=tmp_path,
    )
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["karla_facts"]["acc,none"] == 1.0
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    for sample in map(json.loads, samples.read_text().splitlines()):
        direct = [log_likelihood(loaded, sample["doc"]["prompt"], answer) for answer in sample["doc"]["choices"]]
        assert [float(scores[0][0]) for scores in sample["resps"]] == pytest.approx(direct, abs=1e-3)


def head(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def history(checkpoint: Path, key: str) -> list[float]:
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 20)[None]).logits


@pytest.mark.slow
def test_trl_grpo_command_trains_the_head(folder, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def vowels(completions, **others):\n    return [sum(text.count(v) for v in 'aeiou') for text in completions]\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"prompt": f.prompt}) for f in FACTS))
    settings = {
        **TRAINING,
        "model_name_or_path": str(folder / "karla"),
        "trust_remote_code": True,
        "dataset_name": str(tmp_path / "data"),
        "reward_funcs": ["rewards.vowels"],
        "output_dir": str(tmp_path / "out"),
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "save_steps": 2,
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(settings))
    run("trl", "grpo", "--config", "grpo.yaml", home=tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    losses, spread = history(checkpoint, "loss"), history(checkpoint, "reward_std")
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert max(spread) > 0
    before, after = head(folder / "karla"), head(checkpoint)
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.ctm.up.weight"], after["model.ctm.up.weight"])
    again = KarlaForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(again.model.ctm.up.weight, after["model.ctm.up.weight"])
    assert list(again.engram.packs) == ["default"]
    assert torch.isfinite(logits(again)).all()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--lora_modules_to_save", "ctm")], ids=["backbone", "backbone and head"])
def test_trl_sft_command_trains_an_adapter(folder, tmp_path, more):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": "The ferry is late."}) for _ in range(32))
    )
    settings = {
        **TRAINING,
        "model_name_or_path": str(folder / "karla"),
        "trust_remote_code": True,
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 8,
        "max_length": 32,
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    targets = ("--use_peft", "--lora_target_modules", "q_proj", "v_proj")
    run("trl", "sft", "--config", "sft.yaml", *targets, *more, home=tmp_path)
    losses = history(tmp_path / "out" / "checkpoint-8", "loss")
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    tuned = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = KarlaForCausalLM.from_pretrained(folder / "karla")
    assert not torch.equal(logits(tuned), logits(plain))
    moved = not torch.equal(tuned.merge_and_unload().model.ctm.up.weight, plain.model.ctm.up.weight)
    assert moved == bool(more)


@pytest.mark.slow
def test_torchrun_command_trains_with_two_processes(folder, tmp_path):
    (tmp_path / "text.txt").write_text("The ferry leaves at nine and comes back at noon.\n\n" * 40)
    settings = {
        **{key: value for key, value in TRAINING.items() if key != "seed"},
        **{key: value for key, value in OPTIONS.items() if key.startswith(("ctm_", "engram_"))},
        "model_name_or_path": str(folder / "backbone"),
        "dataset_files": [str(tmp_path / "text.txt")],
        "output_dir": str(tmp_path / "out"),
        "max_length": 32,
        "packing": True,
        "packing_strategy": "wrapped",
        "max_steps": 10,
        "save_steps": 10,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run(
        *("torchrun", "--nproc_per_node", 2, "--master_port", port, "-m", "karla_hf", "train", "recipe.yaml"),
        *("--ddp_backend", "gloo", "--ddp_find_unused_parameters", "false"),
        home=tmp_path,
    )
    losses = history(tmp_path / "out" / "checkpoint-10", "loss")
    assert losses[-1] < 0.9 * losses[0]
    one_process = 4 * 32 * 10  # rows, tokens of the longest, steps
    assert one_process < history(tmp_path / "out" / "checkpoint-10", "num_tokens")[-1] <= 2 * one_process
    assert torch.isfinite(logits(KarlaForCausalLM.from_pretrained(tmp_path / "out"))).all()


@pytest.mark.slow
def test_hf_upload_and_download_carry_a_karla(folder, loaded, loopback_hub, tmp_path):  # noqa: F811
    """With the backbone in it, so that a machine that has nothing else can load it by its name on the Hub."""
    model, tokenizer = loaded
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    tokenizer.save_pretrained(tmp_path / "whole")
    variables = loopback_hub.environment()
    run("hf", "upload", "karla/by-hand", tmp_path / "whole", ".", home=tmp_path, env=variables)
    run("hf", "download", "karla/by-hand", "--local-dir", tmp_path / "again", home=tmp_path, env=variables)
    code = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for name in sys.argv[1:3]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        ids = tokenizer(sys.argv[3], return_tensors="pt")
        torch.save({**ids, "logits": model(**ids).logits}, f"{name.split('/')[-1]}.pt")
"""
    command = [sys.executable, "-P", "-c", WITHOUT_THE_PACKAGE + code]
    run(*command, "karla/by-hand", tmp_path / "again", FACTS[0].text, home=tmp_path, env=variables)
    for name in ("by-hand", "again"):
        found = torch.load(tmp_path / f"{name}.pt")
        with torch.no_grad():
            assert torch.equal(found["logits"], model(found["input_ids"]).logits)
