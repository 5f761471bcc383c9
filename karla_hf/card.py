"""The model card: the template `model_card.md`, filled with what a checkpoint says and with numbers that commands wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from karla_hf.card_results import Measured, check_hub_name, eval_entries, eval_results
from karla_hf.checkpoints import check_checkpoint
from karla_hf.modeling.engram_karla import Engram
from karla_hf.modeling.manifest_karla import FOLDER, MANIFEST, files_of_pack, parse_manifest
from karla_hf.modeling.public_karla import CARD, RENEWED, RESULTS, is_hub_name, keeps_card
from karla_hf.modeling.publishing_karla import card_data


TEMPLATE = Path(__file__).with_name("model_card.md")


def render_card(
    folder: Path,
    repo_id: str,
    tags: Sequence[str] = (),
    *,
    measured: Measured | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """The card of a checkpoint.

    Args:
        folder: holds its `config.json`, and its memory if there is one. Not modified.
        repo_id: where it is, or will be.
        tags: tags beside our own.
        measured: what was measured of it; without, the card has no numbers.
        datasets: names on the Hub of what it was trained on.
        license: name of the licence of what is published; None is "apache-2.0", that of the code.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    path = folder / FOLDER / MANIFEST
    packs = parse_manifest(path, path.read_bytes())["packs"] if path.is_file() else []
    return card_text(config, repo_id, tags, packs=packs, measured=measured, datasets=datasets, license=license)


def card_text(
    config: Mapping[str, Any],
    repo_id: str,
    tags: Sequence[str] = (),
    *,
    packs: Sequence[Mapping[str, Any]] = (),
    measured: Measured | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """The same of a configuration and the packs that a manifest lists."""
    for name in datasets:
        check_hub_name(name)
    measured = measured or Measured([], [])
    more: dict[str, Any] = {"license": license} if license else {}
    if datasets:
        more["datasets"] = list(datasets)
    if measured.scores:
        more |= {"model_name": repo_id.rpartition("/")[2], "eval_results": eval_results(measured.scores)}
        more["metrics"] = sorted({score.metric for score in measured.scores})
    name = config["base_model_name_or_path"]
    base_model = name if name is not None and is_hub_name(name) else None
    data = card_data({"base_model_name_or_path": base_model}, tags, **more)
    sizes = [sum({file.file: file.size for file in files_of_pack(dict(pack))}.values()) for pack in packs]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        revision="main",
        base_model=base_model,
        ticks=config["ctm_num_ticks"],
        backbone_included=config["backbone_included"],
        packs=[{**pack, "size": size} for pack, size in zip(packs, sizes, strict=True)],
        tables=measured.tables,
        renewed=RENEWED,
    )
    return str(card).rstrip() + "\n"


def make_card(
    directory: Path,
    repo_id: str,
    *,
    measured: Measured | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write the card of a Karla into its folder; see `karla card`.

    Returns:
        The names of the files written.

    Raises:
        OSError: if this is no Karla, or it has a card and `force` is false.
        ValueError: if the name is no repository's or no data set's.
    """
    check_checkpoint(directory)
    for name in (repo_id, *datasets):
        check_hub_name(name)
    if keeps_card(directory) and not force:
        raise OSError(f"{directory} has a {CARD} already; give --force to replace it.")
    text = render_card(directory, repo_id, measured=measured, datasets=datasets, license=license)
    return write_card(directory, text, measured)


def pack_card_text(memory: Engram, pack: str, repo_id: str, backbone: str | None) -> str:
    """The card of a pack in a repository of its own.

    Args:
        memory: holds the pack. Not modified.
        pack: its name.
        repo_id: where it will be.
        backbone: the name on the Hub of the backbone that it was made with, if it has one.
    """
    data = ModelCardData(base_model=backbone, library_name="karla-hf", tags=["karla", "engram", "engram-pack"])
    found = memory.packs[pack]
    made = f" on [{backbone}](https://huggingface.co/{backbone})" if backbone else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\nA pack of a Karla's memory{made}: "
        f"{found.tokens:,} tokens read, {found.num_owned:,} rows. It can give back the text that it was made of.\n\n"
        f"```sh\nkarla pack pull DIR {repo_id}      # DIR: a Karla on the same backbone\nkarla forget DIR {pack}\n```\n\n{RENEWED}\n"
    )


def write_card(folder: Path, text: str, measured: Measured | None = None) -> list[str]:
    """Write a card, and the results on data sets of the Hub as `.eval_results/karla.yaml`, into a folder.

    Returns:
        The names of the files written.
    """
    (folder / CARD).write_text(text, encoding="utf-8")
    entries = eval_entries(measured.scores) if measured else []
    if not entries:
        return [CARD]
    (folder / RESULTS).mkdir(exist_ok=True)
    (folder / RESULTS / "karla.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return [CARD, f"{RESULTS}/karla.yaml"]
