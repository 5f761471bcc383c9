"""POPE against plain GRPO on a task that a small base almost never solves: one budget, one trainer, different data.

    python -m karla_hf.pope_demo recipes/pope-demo/demo.yaml --seeds 1

By itself it spreads the runs over `workers` processes. Under torchrun, its processes share every run instead:

    torchrun --nproc_per_node 2 -m karla_hf.pope_demo recipes/pope-demo/demo.yaml
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import disable_progress_bars
from rich.console import Console
from transformers import HfArgumentParser
from transformers.utils import logging
from trl import GRPOConfig

from karla_hf.pope_demo_arms import ARMS, GRPO, POPE, run_arm
from karla_hf.pope_demo_problems import DemoArguments, prepare
from karla_hf.pope_demo_report import BASE, Job, collect, describe, draw, markdown_table, show
from karla_hf.report import new_console, write_json


def read_recipe(recipe: Path, overrides: list[str] = ()) -> tuple[DemoArguments, dict[str, Any]]:  # type: ignore[assignment]
    """The demonstration's options and the trainer's settings.

    Args:
        recipe: YAML of `DemoArguments` and TRL's `GRPOConfig`.
        overrides: `--key value` pairs.

    Raises:
        ValueError: for a key that neither has, or a setting that the demonstration cannot use.
    """
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values |= {
        key.removeprefix("--"): yaml.safe_load(value) for key, value in zip(*[iter(overrides)] * 2, strict=True)
    }
    settings = {key: value for key, value in values.items() if key not in DemoArguments.__dataclass_fields__}
    parser = HfArgumentParser([DemoArguments, GRPOConfig])  # type: ignore[list-item]
    options = parser.parse_dict(values)[0]
    for key in ("seeds", "workers", "problems", "held_out", "easy", "curve_every"):
        if getattr(options, key) < 1:
            raise ValueError(f"`{key}` is {getattr(options, key)}; give 1 or more.")
    if not 0 <= options.rare <= options.length:
        raise ValueError(f"`rare` is {options.rare}; give 0 to `length` = {options.length}.")
    return options, settings


def run(recipe: Path, overrides: list[str] = ()) -> dict[str, Any]:  # type: ignore[assignment]
    """Run every arm with every seed; writes `results.json`, `table.md` and `curves.png` to the recipe's `output_dir`.

    A finished job leaves a file there, too; a run with the same settings that was interrupted takes its result from it.

    Args:
        recipe: see `read_recipe`.
        overrides: see `read_recipe`.

    Returns:
        As `collect`, with `settings`, `processes`, `seconds` on the clock of this run and `cpu_seconds` of all jobs; {} in all
        processes of torchrun but the first.

    Raises:
        ValueError: see `read_recipe`, `prepare` and `run_arm`.
    """
    options, settings = read_recipe(recipe, overrides)
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    shared = int(os.environ.get("WORLD_SIZE", "1"))
    console = new_console() if int(os.environ.get("RANK", "0")) == 0 else Console(quiet=True)
    began, found = time.perf_counter(), {}
    for job, result in _together(options, settings) if shared > 1 else _side_by_side(options, settings):
        found[job] = result
        if "pass@1" in result and int(os.environ.get("RANK", "0")) == 0:
            write_json(_file(settings, job), {"of": _settings_of(job, options, settings), "result": result})
        console.print(f"{time.perf_counter() - began:5.0f} s  {describe(job, result)}", highlight=False)
    if shared > 1 and not PartialState().is_main_process:
        return {}
    results = {
        **collect(found, options),
        "settings": {**vars(options), **settings},
        "processes": shared if shared > 1 else options.workers,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": sum(result["cpu_seconds"] for result in found.values()),
    }
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(markdown_table(results), encoding="utf-8")
    draw(results, folder / "curves.png")
    show(results, console)
    return results


def list_jobs(options: DemoArguments) -> list[Job]:
    """Every job, each after the one it needs."""
    jobs = [Job(name, options.right, seed) for seed in range(options.seeds) for name in (BASE, *ARMS)]
    return jobs + [Job(name, right, 0) for right in options.sweep or [] for name in (BASE, GRPO, POPE)]


def needed(job: Job, options: DemoArguments) -> Job | None:
    """The job whose files a job reads: an arm its base, and a base of the sweep the one it is adapted from.

    Example:
        >>> needed(Job(GRPO, 0.25, 0), DemoArguments())
        Job(name='base', right=0.25, seed=0)
        >>> needed(Job(BASE, 0.25, 0), DemoArguments())
        Job(name='base', right=0.05, seed=0)
    """
    if job.name != BASE:
        return job._replace(name=BASE)
    return None if job.right == options.right else job._replace(right=options.right)


def work(job: Job, options: DemoArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """Do one job in this process, or this process's part of it, unless it is done; what it needs of others is in files."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's use of transformers
    folder, first = _folder(settings, job), needed(job, options)
    if _file(settings, job).exists():
        done = json.loads(_file(settings, job).read_text(encoding="utf-8"))
        if done["of"] == _settings_of(job, options, settings):
            return done["result"]
    options = replace(options, right=job.right)
    if job.name != BASE:
        return run_arm(job.name, options, {**settings, "output_dir": str(folder)}, job.seed, folder)
    if int(os.environ.get("RANK", "0")) != 0:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    return prepare(options, job.seed, folder, None if first is None else _folder(settings, first) / "base")


def _together(options: DemoArguments, settings: dict[str, Any]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """All processes of torchrun do one job after the other."""
    state = PartialState(cpu=settings.get("use_cpu", False))
    for job in list_jobs(options):
        result = work(job, options, settings)
        state.wait_for_everyone()
        yield job, result


def _side_by_side(options: DemoArguments, settings: dict[str, Any]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Several processes do a job each."""
    waiting, done = list_jobs(options), set[Job | None]([None])
    running: dict[Future, Job] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        try:
            while waiting or running:
                ready = [job for job in waiting if needed(job, options) in done]
                running |= {pool.submit(work, job, options, settings): job for job in ready}
                waiting = [job for job in waiting if job not in ready]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    yield job, future.result()
                    done.add(job)
        finally:
            pool.shutdown(cancel_futures=True)


def _settings_of(job: Job, options: DemoArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """What the result of a job depends on: everything but which other jobs there are, and where."""
    values = {**vars(options), **settings, "name": job.name, "right": job.right, "seed": job.seed}
    others = ("seeds", "sweep", "workers", "output_dir")
    return {**{key: value for key, value in values.items() if key not in others}, "first": options.right}


def _file(settings: dict[str, Any], job: Job) -> Path:
    return _folder(settings, job) / f"{job.name}.json"


def _folder(settings: dict[str, Any], job: Job) -> Path:
    return Path(settings["output_dir"]) / f"right{job.right:g}-seed{job.seed}"


if __name__ == "__main__":
    if len(sys.argv) < 2 or len(sys.argv) % 2:
        sys.exit("Give a recipe and overrides: python -m karla_hf.pope_demo RECIPE [--key value ...]")
    try:
        run(Path(sys.argv[1]), sys.argv[2:])
    except ValueError as error:
        sys.exit(str(error))
