"""What can be seen of a run: trackers, curves, and the bar."""

import json
import os
import subprocess
import sys

import pytest
from schedules import write_schedule
from typer.testing import CliRunner

from karla_hf import KarlaForCausalLM
from karla_hf.cli import app
from karla_hf.errors import as_sentence
from karla_hf.phases import run
from karla_hf.run_plot import plot_run
from karla_hf.runs import keep_recipe


def fine_tune(folder, **values):
    """Overrides for a short fine-tuning that begins with the tiny backbone."""
    write_schedule(folder)
    values = {
        "model_name_or_path": str(folder / "backbone"),
        "output_dir": str(folder / "out"),
        "save_steps": 4,
        **values,
    }
    return folder / "finetune.yaml", [
        part for key, value in values.items() for part in (f"--{key}", json.dumps(value))
    ]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder of a fine-tuning that reported to TensorBoard, and what it put on standard error."""
    folder = tmp_path_factory.mktemp("watched")
    path, overrides = fine_tune(folder, report_to="tensorboard", disable_tqdm=False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, torch; torch.set_num_threads(1); from karla_hf.phases import run; run(sys.argv[1], sys.argv[2:])"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(path), *overrides], env=environment, capture_output=True,
                              text=True, timeout=300, check=True)  # fmt: skip
    return folder / "out", finished.stderr


def test_tensorboard_has_the_curves(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = watched[0]
    (place,) = {file.parent for file in folder.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(place))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/ticks", "train/certainty"} <= tags
    assert {"train/grokking/state", "train/grokking/weight_norm", "train/expected_ticks"} <= tags
    assert {"eval/train_loss", "eval/val_loss"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/val_loss")] == [2, 4]


def test_bar_shows_the_phase(watched):
    assert "fine-tune:" in watched[1]


def test_command_draws_the_curves(watched, tmp_path):
    result = CliRunner().invoke(app, ["plot", str(watched[0]), "--output", str(tmp_path / "run.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    panels = plot_run(watched[0])
    assert panels == ["loss, nats per token", "learning rate", "ticks", "certainty", "weight norm", "grokking"]
    assert (watched[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_phases_stand_side_by_side(tmp_path):
    keep_recipe({"phases": {"warm-up": {}, "pope": {}, "fine-tune": {}}}, tmp_path)
    logs = {"warm-up": [{"loss": 2.0, "step": 1}, {"loss": 1.5, "step": 2, "memory_rows": 9}],
            "pope": [{"guided/accuracy": 0.5, "reward": 0.2, "step": 1}]}  # fmt: skip
    for name, history in logs.items():
        keep_recipe({"phase": name}, tmp_path / name)
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert plot_run(tmp_path) == ["loss, nats per token", "correct completions", "reward", "memory rows"]


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no log of a training run; give the `output_dir` of one that sav"
    ):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match=r"The figure would go to .*\.pdf; give a file that ends in \.png\.$"):
        plot_run(tmp_path, tmp_path / "x.pdf")
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1}]}')
    with pytest.raises(ValueError, match=r"The run has logged nothing yet; let it train longer, or log more") as error:
        plot_run(tmp_path)
    assert as_sentence(error.value) == str(error.value)


def test_trackio_keeps_all_here_and_tells_no_token(tmp_path):
    secret, write = "hf_" + "x" * 34, "write-" + "y" * 30
    path, overrides = fine_tune(tmp_path, report_to="trackio", project="karla", run_name="short", hub_token=secret)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_TOKEN": secret,
                   "TRACKIO_WRITE_TOKEN": write, "HF_HUB_OFFLINE": "1"}  # fmt: skip
    code = (
        "import sys, torch; torch.set_num_threads(1); from karla_hf.phases import run; run(sys.argv[1], sys.argv[2:])"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(path), *overrides], env=environment, capture_output=True,
                              text=True, timeout=300, check=False)  # fmt: skip
    shown = finished.stdout + finished.stderr
    assert finished.returncode == 0, shown
    stored = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("trackio" in str(file.relative_to(tmp_path)) and file.suffix == ".db" for file in stored)
    data = b"".join(file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file())
    for key in (b"learning_rate", b"certainty", b"ticks", b"grokking/state", b"expected_ticks"):
        assert key in data
    for token in (secret, write):
        assert token not in shown
        for file in stored:
            assert token.encode() not in file.read_bytes() or file.name == "training_args.bin", file


def test_what_the_memory_reads_is_logged_drawn_and_kept(tmp_path):
    write_schedule(tmp_path)
    text = {"max_steps": 1, "save_steps": 1, "read_texts": 5, "report_to": "tensorboard"}
    values = {**text, "model_name_or_path": str(tmp_path / "backbone"), "output_dir": str(tmp_path / "out")}
    summary = run(
        tmp_path / "warmup.yaml", [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]
    )
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    (entry,) = [entry for entry in history if "memory_writes" in entry]
    for key in ("memory_writes", "memory_rows", "surprise_before", "surprise_after"):
        assert entry[key] == summary[key]
    assert entry["surprise_after"] < entry["surprise_before"]
    pack = KarlaForCausalLM.from_pretrained(tmp_path / "out").engram.packs["training"]
    assert 0 < entry["memory_writes"] <= pack.tokens
    assert pack.num_owned == entry["memory_rows"]
    assert summary["loss_before_reading"] != summary["karla_loss"]
    assert summary["levels"]["L1"] == "every 64, 512 and 4096 tokens read"
    assert plot_run(tmp_path / "out")[-3:] == ["memory rows", "memory writes", "surprise of what is read"]
    assert any(b"memory_writes" in events.read_bytes() for events in tmp_path.rglob("events.out.tfevents*"))


def test_memory_rows_are_logged_where_there_are_some(tmp_path):
    from tiny import OPTIONS, save_karla

    from karla_hf.checkpoints import load_checkpoint

    write_schedule(tmp_path)
    karla = save_karla(tmp_path / "karla", tmp_path / "backbone")
    model, tokenizer = load_checkpoint(karla)
    written = model.read(["The vault of Orlin is open."], tokenizer).rows_written
    model.save_memory(karla)
    values = {"model_name_or_path": str(karla), "output_dir": str(tmp_path / "out"), "max_steps": 1, "save_steps": 1,
              "held_out_limit": 1}  # fmt: skip
    path = tmp_path / "warmup.yaml"
    lines = [line for line in path.read_text().splitlines() if line.split(":")[0] not in OPTIONS]
    path.write_text("\n".join(lines))
    run(path, [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert written > 0
    assert history[0]["memory_rows"] == written
