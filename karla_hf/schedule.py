"""The three phases as one job, which goes on where it was stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from trl import GRPOConfig, SFTConfig

from karla_hf.arguments import MODEL_OPTIONS, KarlaArguments, read_recipe
from karla_hf.fine_tuning import FineTuneArguments, run_finetune_recipe
from karla_hf.overrides import as_overrides, read_overrides
from karla_hf.pope_arguments import PopeArguments
from karla_hf.pope_training import run_pope_recipe
from karla_hf.report import new_console, write_json
from karla_hf.run_evaluation import FINE_TUNE, POPE, WARM_UP, measure, results_table, sources
from karla_hf.runs import SUMMARY, keep_recipe, kept, last_checkpoint, read_kept, read_summary
from karla_hf.training import CHANGEABLE_OPTIONS, run_recipe


OWN = ("phase", "phases", "output_dir")  # keys of the schedule itself
# What the schedule sets for every phase, and, from the second on, what belongs to a fresh Karla.
SET = ("phase", "output_dir", "resume_from_checkpoint")
FRESH = ("model_name_or_path", "model_revision", "backbone_quantization")


class Kind(NamedTuple):
    """How a phase is trained: by which function, and which dataclasses its keys belong to."""

    train: Callable[[str | Path, Sequence[str]], dict[str, Any]]
    own: type
    training: type


KINDS = {
    WARM_UP: Kind(run_recipe, KarlaArguments, SFTConfig),
    POPE: Kind(run_pope_recipe, PopeArguments, GRPOConfig),
    FINE_TUNE: Kind(run_finetune_recipe, FineTuneArguments, SFTConfig),
}


class Phase(NamedTuple):
    """A phase of a schedule.

    Attributes:
        name: of `KINDS`.
        recipe: its file.
        changes: values that go before the recipe's.
        folder: its `output_dir`.
    """

    name: str
    recipe: Path
    changes: dict[str, Any]
    folder: Path


def run_all(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train phase after phase, each on the Karla of the one before, and compare them.

    A phase is finished when its `summary.json` is there, and is then not trained again; one that is not goes on from its last
    whole checkpoint. Each phase has its own folder in `output_dir`; all but the last keep the floats behind ternary weights,
    unless `save_packed` is set, so that the next phase begins with them. At the end the Karlas of all phases are measured on the
    same held-out rows (of the last phase with texts) and problems.

    Args:
        path: the recipe: `output_dir`, and `phases`, a mapping from "warm-up", "pope" and "fine-tune", in the order of the
            training, to `recipe` (a file beside this one) and the keys that are replaced in it. Any other key is for all phases.
        overrides: `--KEY VALUE` for every phase that has the key, `--PHASE.KEY VALUE` for one; the last mention counts.

    Returns:
        `phases`: what was measured for each, and the `folder` it lies in. Of several processes, only the first measures;
        the others return no phases.

    Raises:
        FileNotFoundError, ValueError: for recipes that cannot be used, or a phase that was begun with other values.
        OSError: if a model is found nowhere, or the results cannot be written.
    """
    values = _read(path)
    changes = {key: value for key, value in values.items() if key not in OWN}
    for key, value in read_overrides(overrides).items():
        changes.pop(key, None)  # so that the last mention stands last
        changes[key] = value
    folder = Path(str(changes.pop("output_dir", None) or values["output_dir"]))
    phases = plan(path, values["phases"], changes, folder)
    for phase in phases:
        _check_begun(phase)
    keep_recipe({**values, "output_dir": str(folder), "overrides": list(overrides)}, folder)
    console = new_console()
    for number, phase in enumerate(phases, start=1):
        at = f"Phase {number} of {len(phases)}, {phase.name}"
        if read_summary(phase.folder) is not None:
            console.print(f"{at}: finished before, in {phase.folder}.", markup=False)
            continue
        last = last_checkpoint(phase.folder)
        console.print(f"{at}: {'begins' if last is None else f'goes on from {last.name}'}.", markup=False)
        resume = {} if last is None else {"resume_from_checkpoint": str(last)}
        KINDS[phase.name].train(phase.recipe, as_overrides({**phase.changes, **resume}))
    if any(read_summary(phase.folder) is None for phase in phases):
        return {"phases": {}}  # of another process
    summary = {"recipe": str(path), "phases": {phase.name: _measure(phase, phases) for phase in phases}}
    write_json(folder / SUMMARY, summary)
    console.print(results_table(summary["phases"]))  # type: ignore[arg-type]
    return summary


def plan(path: str | Path, phases: Mapping[str, Any], changes: Mapping[str, Any], folder: Path) -> list[Phase]:
    """The phases of a schedule with the values that each of them gets.

    Args:
        path: of the schedule's recipe.
        phases: as they stand there.
        changes: by key, or by `PHASE.KEY`, in the order in which they count.
        folder: `output_dir` of the whole.

    Raises:
        FileNotFoundError, ValueError: for a phase or a key that cannot be used.
    """
    found: list[Phase] = []
    used: set[str] = set()
    for name, own in phases.items():
        if name not in KINDS or not isinstance(own, dict) or not isinstance(own.get("recipe"), str):
            raise ValueError(
                f"{path}: phase {name!r} cannot be used; give {', '.join(KINDS)}, each a mapping with `recipe: FILE`."
            )
        recipe = Path(path).parent / own["recipe"]
        if read_recipe(recipe).get("phase", WARM_UP) != name:
            raise ValueError(f"{path}: {recipe} is no recipe of the phase {name!r}; give one that is.")
        values = {key: value for key, value in own.items() if key != "recipe"}
        for key, value in changes.items():
            phase, dot, short = key.rpartition(".")
            if phase.replace("_", "-") == name if dot else short in _known(name, first=not found):
                values[short] = value
                used.add(key)
        fixed = sorted(set(values) & {*SET, *(FRESH if found else ())})
        if fixed:
            raise ValueError(f"{path}: `{fixed[0]}` of the phase {name!r} is set by the schedule; remove it.")
        values["output_dir"] = str(folder / name)
        if name != list(phases)[-1]:
            values.setdefault("save_packed", False)
        if found:
            values["model_name_or_path"] = str(found[-1].folder)
        found.append(Phase(name, recipe, values, folder / name))
    unused = [key for key in changes if key not in used]
    if unused:
        raise ValueError(
            f"{path}: `{unused[0]}` is a key of none of the phases {', '.join(phases)}; correct it, or remove it."
        )
    return found


def _read(path: str | Path) -> dict[str, Any]:
    values = read_recipe(path)
    phases = values.get("phases")
    if not isinstance(phases, dict) or not phases or not values.get("output_dir"):
        raise ValueError(f"{path}: a recipe with `phase: all` needs `output_dir` and `phases`; add what is missing.")
    return values


def _known(name: str, first: bool) -> set[str]:
    """Keys that a phase takes where they are given for all phases."""
    kind = KINDS[name]
    known = {item.name for part in (kind.own, kind.training) for item in fields(part) if item.init}
    return known - set(SET) | set(MODEL_OPTIONS) if first else known - {*SET, *FRESH} | set(CHANGEABLE_OPTIONS)


def _check_begun(phase: Phase) -> None:
    """Refuse to go on with a phase that was begun with other values."""
    before = read_kept(phase.folder)
    if before is None or (read_summary(phase.folder) is None and last_checkpoint(phase.folder) is None):
        return
    now = kept(read_recipe(phase.recipe, as_overrides(phase.changes)))
    other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if other:
        raise ValueError(
            f"{phase.folder} was begun with `{other[0]}` {before.get(other[0])!r}, but now it is {now.get(other[0])!r}; give "
            "the same, another `output_dir`, or delete the folder to train the phase again."
        )


def _measure(phase: Phase, phases: Sequence[Phase]) -> dict[str, Any]:
    """What `measure` gives for a phase, kept in its folder, so that it is measured once."""
    folders = {other.name: other.folder for other in phases}
    summary = read_summary(phase.folder) or {}
    done = summary.get("evaluation")
    if done is None:
        known = _known_passes(phase, phases)
        done = measure(phase.folder, sources(folders), known, phase.folder / "pass.jsonl")
        write_json(phase.folder / SUMMARY, {**summary, "evaluation": done})
    return {"folder": str(phase.folder), **done}


def _known_passes(phase: Phase, phases: Sequence[Phase]) -> dict[str, float] | None:
    """pass@k as Phase 2 measured it: before, of the Karla it began with, and after."""
    names = [other.name for other in phases]
    if POPE not in names:
        return None
    at = names.index(POPE)
    moment = {at - 1: "before", at: "after"}.get(names.index(phase.name))
    if moment is None:
        return None
    found = (read_summary(phases[at].folder) or {})[moment]
    return {key: found[key] for key in ("pass@1", "pass@16", "problems")}
