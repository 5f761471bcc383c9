"""Training from stored backbone states: the same losses, whatever the data, and files that survive a kill."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tiny import OPTIONS, save_backbone, speak
from trl import SFTConfig

from karla_hf import KarlaForCausalLM, load_tokenizer, states
from karla_hf.documents import unrelated_text
from karla_hf.states import MANIFEST, StoredStates, store_states
from karla_hf.trainer import KarlaSFTTrainer
from karla_hf.training import run_recipe


TRAINING = {
    "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False, "max_length": 32,
    "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3, "max_steps": 5,
    "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip
PACKED = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
TEXTS = [line.strip() for line in unrelated_text().replace("\n", " ").split(".") if len(line) > 20]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("models") / "backbone", intermediate_size=128)


@pytest.fixture(scope="module")
def karla(backbone):
    torch.manual_seed(0)
    return speak(KarlaForCausalLM.from_backbone(str(backbone), **OPTIONS))


@pytest.fixture
def train(karla, backbone, tmp_path):
    """Function that trains a copy of the Karla; returns the logged losses and the trainer."""

    def run(rows, states_dir=None, dtype="float32", model=None, **options):
        model = copy.deepcopy(model or karla)
        tokenizer = load_tokenizer(str(backbone))
        tokenizer.pad_token = tokenizer.eos_token
        trainer = KarlaSFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path / "out"), **{**TRAINING, **options}),
            train_dataset=rows,
            eval_dataset=Dataset.from_dict({"text": TEXTS[-6:]}) if options.get("eval_strategy") else None,
            processing_class=tokenizer,
            states_dir=states_dir,
            states_dtype=dtype,
        )
        trainer.train()
        keys = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy", "ticks", "certainty")
        keys = [*keys, *(f"eval_{key}" for key in keys)]
        return [[entry[key] for key in keys if key in entry] for entry in trainer.state.log_history[:-1]], trainer

    return run


def texts():
    return Dataset.from_dict({"text": TEXTS[:16]})


def answers():
    """Prompts of several lengths with short answers."""
    prompts = [" ".join(text.split()[:length]) for text, length in zip(TEXTS, (2, 5, 3, 6) * 4, strict=False)]
    return Dataset.from_dict({"prompt": prompts, "completion": [" yes", " no", " perhaps", " it is"] * 4})


CASES = {
    "texts": (texts, {}),
    "wrapped": (texts, PACKED),
    "answers": (answers, {}),
    "answers wrapped": (answers, PACKED),
    "accumulated": (answers, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "evaluated": (texts, {"eval_strategy": "steps", "eval_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_training_without(train, tmp_path, case):
    make_rows, options = CASES[case]
    plain, _ = train(make_rows(), **options)
    cached, trainer = train(make_rows(), tmp_path / "states", **options)
    assert len(plain) >= 5
    for first, second in zip(plain, cached, strict=True):
        assert second == pytest.approx(first, abs=1e-5, rel=1e-4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["source_states"].shape == (*batch["input_ids"].shape, 4, 64)


def test_backbone_does_not_run_in_a_step(train, tmp_path):
    rows = texts()
    train(rows, tmp_path / "states")
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if type(module).__name__ == "LlamaModel" else None
    )
    try:
        train(rows, tmp_path / "states")
    finally:
        hook.remove()
    assert len(calls) == 1  # the probe


def test_memory_and_two_ticks_take_part(train, karla, backbone, tmp_path):
    model = copy.deepcopy(karla)
    model.config.tick_loss = "two_tick"
    silent, _ = train(texts(), tmp_path / "states", model=model)
    model.read(". ".join(TEXTS[:16]), load_tokenizer(str(backbone)), context="open", progress=False)
    plain, _ = train(texts(), model=model)
    cached, _ = train(texts(), tmp_path / "states", model=model)
    for first, second in zip(plain, cached, strict=True):
        assert second == pytest.approx(first, abs=1e-5, rel=1e-4)
    assert cached[0][0] < 0.9 * silent[0][0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(train, tmp_path, dtype):
    plain, _ = train(texts())
    cached, _ = train(texts(), tmp_path / "states", dtype)
    for first, second in zip(plain, cached, strict=True):
        assert second[0] == pytest.approx(first[0], abs=0.02)


def test_stored_rows_are_the_backbones_states(karla, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "SHARD_BYTES", 4 * 4 * 64 * 20)  # 20 tokens
    rows = [torch.randint(1, 300, (length,)).tolist() for length in (3, 9, 1, 30, 9, 9, 2)]
    stored = store_states(karla, rows, tmp_path, dtype="float32")
    assert stored.firsts == [0, 3, 4]
    assert stored.bytes == sum(load_file(path)["states"].nbytes for path in tmp_path.glob("*.safetensors"))
    for row, kept in zip(rows, map(stored.__getitem__, range(len(rows))), strict=True):
        torch.testing.assert_close(kept, karla.model.backbone_states(torch.tensor([row]))[0], rtol=0, atol=1e-5)
    out = karla.model.backbone(torch.tensor([rows[3]]), output_hidden_states=True)
    torch.testing.assert_close(stored[3][:, -1], out.last_hidden_state[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(stored[3][:, 0], out.hidden_states[0][0], rtol=0, atol=1e-5)


def test_last_layer_is_kept_where_the_head_does_not_read_it(backbone, tmp_path):
    model = KarlaForCausalLM.from_backbone(str(backbone), **OPTIONS, ctm_source_layers=[2, 0])
    ids = torch.randint(1, 300, (2, 11))
    given = model.model.backbone_states(ids)
    assert given.shape == (2, 11, 3, 64)
    speak(model)
    assert torch.equal(model(ids, source_states=given, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_killed_run_goes_on_with_what_is_missing(karla, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(states, "SHARD_BYTES", 1)
    rows = [[5, 6, 7], [8, 9], [10]]
    stored = store_states(karla, rows, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("states-*")}
    assert len(before) == 3
    assert "Backbone states of 6 tokens: 3.072 kB in" in " ".join(capsys.readouterr().out.split())
    stored.path(1).unlink()
    (tmp_path / "states-00001.123").write_bytes(b"half")
    again = store_states(karla, rows, tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("states-*")}
    assert {path for path in before if before[path] == after[path]} == {stored.path(0), stored.path(2)}
    assert after.keys() == before.keys()
    assert "1 of 3 files to compute" in " ".join(capsys.readouterr().out.split())
    torch.testing.assert_close(again[1], karla.model.backbone_states(torch.tensor([rows[1]]))[0].bfloat16())


def test_processes_share_the_work(karla, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "SHARD_BYTES", 1)
    rows = [[5, 6, 7], [8, 9], [10]]
    store_states(karla, rows, tmp_path, rank=0, world=2)
    assert sorted(path.name for path in tmp_path.glob("states-*")) == [f"states-0000{i}.safetensors" for i in (0, 2)]
    store_states(karla, rows, tmp_path, rank=1, world=2)
    assert len(list(tmp_path.glob("states-*"))) == 3


@pytest.mark.parametrize(
    ("change", "name"),
    [({"rows": [[5, 6, 8]]}, "data"), ({"dtype": "float32"}, "dtype"), ({"precision": "bf16"}, "precision")],
)
def test_states_of_something_else_are_replaced_with_a_sentence(karla, tmp_path, capsys, change, name):
    store_states(karla, [[5, 6, 7]], tmp_path)
    options = {"rows": [[5, 6, 7]], **change}
    stored = store_states(karla, options.pop("rows"), tmp_path, **options)
    said = " ".join(capsys.readouterr().out.split())
    assert f"are of another run ({name} differ); they are computed anew." in said
    assert json.loads((tmp_path / MANIFEST).read_text())["dtype"] == options.get("dtype", "bfloat16")
    torch.testing.assert_close(
        stored[0].float(), karla.model.backbone_states(torch.tensor([change.get("rows", [[5, 6, 7]])[0]]))[0],
        atol=0.05, rtol=0.01,
    )  # fmt: skip


def test_damage_and_lack_of_room_are_named(karla, tmp_path, monkeypatch):
    stored = store_states(karla, [[5, 6, 7]], tmp_path)
    stored.path(0).write_bytes(b"nonsense")
    with pytest.raises(OSError, match=r"states-00000\.safetensors cannot be read \(.*\); delete it, and the next run"):
        StoredStates(tmp_path, [3], 256, 2)[0]
    with pytest.raises(ValueError, match=r"cached states is 'int8'; give one of bfloat16, float16, float32\.$"):
        store_states(karla, [[5]], tmp_path, dtype="int8")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"need 5.* more in .*, where .* are free; give another `cache_dir`"):
        store_states(karla, [[5] * 1000], tmp_path / "other")


def test_what_cannot_be_stored_is_refused(train, backbone, tmp_path):
    rows = {"engram_layer_ids": [0], "engram_layer_head_dim": 4, "engram_layer_rows_per_head": 50}
    model = KarlaForCausalLM.from_backbone(str(backbone), **OPTIONS, **rows)
    with pytest.raises(ValueError, match=r"trained rows in it require gradients, so its states change.*; freeze them"):
        train(texts(), tmp_path / "states", model=model)
    with pytest.raises(
        ValueError, match=r"let the head look from one text into another; use `packing_strategy: wrapped`"
    ):
        train(texts(), tmp_path / "states", padding_free=True, max_length=None)
    assert not (tmp_path / "states").exists()


def test_recipe_with_states_resumes_bitwise(backbone, tmp_path):
    (tmp_path / "text.txt").write_text("The ferry leaves at nine and comes back at noon.\n\n" * 40)
    values = {
        **OPTIONS, **TRAINING, **PACKED, "model_name_or_path": str(backbone), "max_steps": 8, "learning_rate": 1e-2, "save_strategy": "steps",
        "save_steps": 4, "dataset_files": [str(tmp_path / "text.txt")], "cache_states": True, "save_packed": False,
        "cache_dir": str(tmp_path / "cache"), "ternary_weight_decay": 0.1, "ternary_decay_share": 0.5,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    summary = run_recipe(tmp_path / "recipe.yaml", ["--output_dir", str(tmp_path / "whole")])
    assert summary["karla_loss"] < summary["backbone_loss"]
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    run_recipe(
        tmp_path / "recipe.yaml", ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "true"]
    )
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["train"]
