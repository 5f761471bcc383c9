import json
import math
import random
from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from test_cli import refuse, succeed
from tiny import VOCAB_SIZE, make_tokenizer
from tiny_hope import HOPE_OPTIONS, save_encoder, save_hope
from transformers import ModernBertConfig, ModernBertModel, TrainingArguments

from karla_hf import hope_data
from karla_hf.facts import make_facts
from karla_hf.hope_arguments import HopeArguments, parse_hope_recipe
from karla_hf.hope_checkpoints import is_untrained, load_hope
from karla_hf.hope_data import load_sequences, pack
from karla_hf.hope_training import HopeTrainer, held_out_loss, run_hope_recipe
from karla_hf.modeling.encoder_hope import weights_sha256
from karla_hf.multi_rate import MultiRateOptimizer
from karla_hf.transformer_peer import TransformerPeer, num_trainable


RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hope-training")
    save_encoder(root / "encoder")
    lines = random.Random(0).choices([fact.text for fact in make_facts(8)], k=120)
    (root / "texts.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture
def recipe(folder, tmp_path):
    values = {
        **HOPE_OPTIONS, "phase": "hope", "encoder_name_or_path": str(folder / "encoder"), "max_steps": 8,
        "dataset_files": [str(folder / "texts.txt")], "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "per_device_eval_batch_size": 4, "save_strategy": "steps", "save_steps": 4, "logging_steps": 4, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3,
        "output_dir": str(tmp_path / "out"), "initializer_range": 0.05,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_hope(folder)[0].state_dict().items() if "encoder" not in name}


def same(some, others) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_a_recipe_trains_saves_and_compares(folder, recipe, tmp_path):
    shown = succeed("train", recipe, "--compare", "true", "--max_steps", "60", "--json", tmp_path / "result.json")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == json.loads((tmp_path / "result.json").read_text())
    assert list(summary["losses"]) == ["HOPE", "bigrams (Kneser-Ney)", "unigrams", "causal transformer"]
    assert all(name in shown for name in summary["losses"])
    assert summary["losses"]["HOPE"] < summary["losses"]["unigrams"]
    assert summary["losses"]["causal transformer"] < summary["losses"]["unigrams"]
    sizes = summary["trainable"]
    assert sizes["causal transformer"] == pytest.approx(sizes["HOPE"], rel=0.02)
    assert (summary["steps"], summary["trained_tokens"]) == (60, 60 * 4 * 32)
    model, tokenizer = load_hope(tmp_path / "out")
    assert not is_untrained(model)
    assert weights_sha256(model.model.slow.encoder) == model.config.encoder_sha256
    arguments, training, _ = parse_hope_recipe(recipe)
    data = load_sequences(arguments, tokenizer, 32)
    assert held_out_loss(model, data.held_out, training) == pytest.approx(summary["losses"]["HOPE"], rel=1e-5)
    assert summary["held_out_tokens"] == len(data.held_out) * 31


def test_training_goes_on_in_the_middle_of_an_epoch_as_if_nothing_had_happened(recipe, tmp_path):
    run_hope_recipe(recipe)
    out = tmp_path / "out"
    straight, state = weights(out), json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert 0 < state["epoch"] < 1
    again = tmp_path / "again"
    run_hope_recipe(recipe, ["--output_dir", str(again), "--resume_from_checkpoint", str(out / "checkpoint-4")])
    assert same(weights(again), straight)


def test_training_goes_on_from_a_hope(folder, recipe, tmp_path):
    run_hope_recipe(recipe, ["--max_steps", "2"])
    values = json.loads(recipe.read_text())
    for key in ("encoder_name_or_path", *HOPE_OPTIONS):
        del values[key]
    values |= {"model_name_or_path": str(tmp_path / "out"), "output_dir": str(tmp_path / "more"), "learning_rate": 0.0}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    run_hope_recipe(recipe)
    assert same(weights(tmp_path / "more"), weights(tmp_path / "out"))


def test_mixed_precision(recipe, tmp_path):
    summary = run_hope_recipe(recipe, ["--bf16", "true", "--max_steps", "60"])
    assert summary["losses"]["HOPE"] < summary["losses"]["unigrams"]
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "out").values())


def test_levels_step_at_their_own_rates(folder, recipe, tmp_path):
    run_hope_recipe(recipe, ["--max_steps", "1"])
    torch.manual_seed(3)
    trained, fresh = weights(tmp_path / "out"), weights(save_hope(tmp_path / "fresh", folder / "encoder"))
    model, _ = load_hope(tmp_path / "fresh")
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True)
    optimizer = HopeTrainer(model=model, args=arguments).create_optimizer()
    assert isinstance(optimizer, MultiRateOptimizer)
    groups = [(g["name"], g["update_period"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert [group[:3] for group in groups] == [
        ("rest", 1, 0.1), ("rest", 1, 0.0), ("level 1", 1, 0.1), ("level 1", 1, 0.0), ("level 2", 2, 0.1),
        ("level 2", 2, 0.0),
    ]  # fmt: skip
    norms = {name: t for name, t in trained.items() if name.endswith("norm.weight")}
    slow = {name for name in norms if ".levels.1." in name}
    still = {name for name, t in norms.items() if bool((t == 1).all())}
    assert slow < still  # one step: level 2 was not due
    assert still - slow == {"model.slow.context_norm.weight"}  # its gate was closed
    assert trained.keys() == fresh.keys()


def test_a_stream_is_read_as_far_as_training_gets(folder, recipe, tmp_path, monkeypatch):
    texts = [fact.text for fact in make_facts(80)]
    stream = Dataset.from_dict({"text": texts, "title": texts}).to_iterable_dataset()
    asked = []
    monkeypatch.setattr(hope_data, "load_dataset", lambda *a, **k: asked.append((a, k)) or stream)
    values = json.loads(recipe.read_text())
    del values["dataset_files"]
    values |= {"dataset_name": "me/wiki", "dataset_config": "en", "streaming": True, "held_out_rows": 10}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    summary = run_hope_recipe(recipe)
    assert asked == [(("me/wiki", "en"), {"split": "train", "streaming": True})]
    assert list(summary["losses"]) == ["HOPE"]
    assert summary["steps"] == 8
    _, tokenizer = load_hope(tmp_path / "out")
    data = load_sequences(parse_hope_recipe(recipe).arguments, tokenizer, 32)
    assert data.held_out["input_ids"][:] == pack(texts[:10], tokenizer, 32)["input_ids"]
    assert isinstance(data.train, datasets.IterableDataset)
    assert set(next(iter(data.train))) == {"input_ids", "labels"}
    straight = weights(tmp_path / "out")
    again = tmp_path / "again"
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    run_hope_recipe(recipe, ["--output_dir", str(again), "--resume_from_checkpoint", checkpoint])
    assert same(weights(again), straight)


def test_the_granite_recipe_takes_a_step_on_a_tiny_modernbert(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    ModernBertModel(ModernBertConfig(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    texts = [fact.text for fact in make_facts(200)]
    monkeypatch.setattr(
        hope_data, "load_dataset", lambda *a, **k: Dataset.from_dict({"text": texts}).to_iterable_dataset()
    )
    small = {
        "encoder_name_or_path": tmp_path / "encoder", "output_dir": tmp_path / "out", "num_hidden_layers": 2,
        "sequence_length": 160, "held_out_rows": 20, "max_steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "use_cpu": "true", "disable_tqdm": "true", "dataloader_pin_memory": "false",
    }  # fmt: skip
    overrides = [str(part) for key, value in small.items() for part in (f"--{key}", value)]
    summary = run_hope_recipe(RECIPES / "hope-granite" / "pretrain.yaml", overrides)
    assert (summary["steps"], summary["trained_tokens"]) == (1, 2 * 2 * 160)
    model, _ = load_hope(tmp_path / "out")
    assert not is_untrained(model)
    assert type(model.model.slow.encoder).__name__ == "ModernBertModel"
    assert math.isfinite(summary["losses"]["HOPE"])


def test_texts_are_packed_end_to_end(folder):
    _, tokenizer = load_hope(save_hope(folder / "packed", folder / "encoder"))
    texts = ["The mill of Brivo.", "", "A ferry is late, and so is the next one."]
    rows = pack(texts, tokenizer, 4)
    whole = [
        t for text in texts for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    assert list(chain.from_iterable(rows["input_ids"])) == whole[: len(whole) // 4 * 4]
    assert rows["labels"] == rows["input_ids"]


def test_the_peer_is_causal_and_has_hopes_size_and_table(folder):
    hope, _ = load_hope(save_hope(folder / "peer", folder / "encoder"))
    peer = TransformerPeer(hope, 32).eval()
    assert num_trainable(peer) == pytest.approx(num_trainable(hope), rel=0.02)
    assert peer.table.data_ptr() == hope.get_output_embeddings().weight.data_ptr()
    ids = torch.arange(20)[None] + 7
    other = ids.clone()
    other[0, 12] = 3
    one, two = (peer(row, row)["logits"] for row in (ids, other))
    assert torch.equal(one[:, :12], two[:, :12])
    assert not torch.equal(one[:, 12:], two[:, 12:])
    total = peer(ids, ids, num_items_in_batch=1)["loss"]
    assert total.item() == pytest.approx(19 * peer(ids, ids)["loss"].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--encoder_name_or_path", "null"], "exactly one must be given"),
        (["--dataset_name", "a/b"], "Of `dataset_name` and `dataset_files` exactly one must be given"),
        (["--streaming", "true"], "only a Hub data set is streamed"),
        (["--held_out_share", "1.5"], "`held_out_share` is 1.5"),
        (["--held_out_rows", "0"], "`held_out_rows` is 0"),
        (["--chunksize", "8"], "did you mean `chunk_size`?"),
        (["--chunk_size", "0"], "`chunk_size` is 0"),
        (["--sequence_length", "100000"], "have fewer than 100000 tokens, one sequence"),
        (["--model_name_or_path", "x", "--encoder_name_or_path", "null"], "was made with its own"),
        (["--resume_from_checkpoint", "true"], "holds no checkpoint to resume from"),
        (["--phase", "hop"], "give warm-up, pope, fine-tune, all, hope or modular-addition"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_in_a_sentence(recipe, overrides, message):
    assert message in refuse("train", recipe, *overrides)


def test_a_stream_needs_an_end(recipe):
    with pytest.raises(ValueError, match="give `max_steps`"):
        parse_hope_recipe(
            recipe, ["--dataset_files", "null", "--dataset_name", "a/b", "--streaming", "true", "--max_steps", "-1"]
        )


def test_the_recipes_of_this_package_can_be_read():
    granite = parse_hope_recipe(RECIPES / "hope-granite" / "pretrain.yaml", ["--use_cpu", "true", "--bf16", "false"])
    assert isinstance(granite.arguments, HopeArguments)
    assert (granite.arguments.streaming, granite.options["num_hidden_layers"]) == (True, 32)
    minilm = parse_hope_recipe(RECIPES / "hope-minilm" / "pretrain.yaml")
    assert minilm.training.bf16
    docs = parse_hope_recipe(RECIPES / "hope-minilm" / "python-docs.yaml")
    assert docs.options == minilm.options
