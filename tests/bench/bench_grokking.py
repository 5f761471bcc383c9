"""Modular addition, learned by heart and then understood or not, and what the detector says of it."""

import tempfile
from pathlib import Path

from karla_hf.modular import draw_grokking, run_modular


RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "grokking" / "modular-addition.yaml"
STEPS = "2000"
ACTIONS = ["--weight_decay", "0.01", "--grokking_raise_decay", "true", "--grokking_finish", "true"]
HEAD = ["--learner", "ctm", "--learning_rate", "0.005", "--max_grad_norm", "1", "--max_steps", "2500"]
# by name, the options and the seeds
RUNS: dict[str, tuple[list[str], range]] = {
    "weight decay 1": (["--weight_decay", "1"], range(3)),
    "weight decay 0.01": (["--weight_decay", "0.01"], range(6)),
    "weight decay 0": (["--weight_decay", "0"], range(6)),
    "0.01, raised by the callback": (ACTIONS, range(3)),
    "0.01, slow gradients when stalled": (["--weight_decay", "0.01", "--grokking_slow_gradients", "true"], range(3)),
    "CTM head, weight decay 1": ([*HEAD, "--weight_decay", "1"], range(3)),
    "CTM head, weight decay 0.01": ([*HEAD, "--weight_decay", "0.01"], range(1)),
}


def run() -> dict:
    """Every kind of run with every seed (about fifteen minutes on one core)."""
    rows, shown = {}, {}
    for name, (options, seeds) in RUNS.items():
        found = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                settings = ["--max_steps", STEPS, "--output_dir", folder, "--seed", str(seed)]
                found.append(run_modular(RECIPE, [*settings, *options]))
        rows[name] = _row(found)
        shown[name] = found[0]
    return {"rows": rows, "runs": shown}


def _row(runs: list[dict]) -> dict[str, float]:
    grokked = [run for run in runs if run["state"] == "GROKKED"]
    reached = [run for run in runs if run["probes"][-1]["val_score"] >= 0.95]
    late = [run["detected_step"] - run["t95"] for run in grokked]
    return {
        "runs": len(runs),
        "grokked": len(grokked),
        "at .95 at the end": len(reached),
        "mem_step": _mean([run["mem_step"] for run in runs]),
        "t50": _mean([run["t50"] for run in grokked]),
        "t95": _mean([run["t95"] for run in grokked]),
        "t99": _mean([run["t99"] for run in grokked]),
        "found, steps after t95": max(late, default=float("nan")),
        "CPU s": _mean([run["seconds"] for run in runs]),
    }


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def draw(result: dict, path: Path) -> None:
    """The first seed of every kind of run."""
    draw_grokking(result["runs"], path)
