"""Karlas and packs on the Hub: pushed in one commit, pulled whole or not at all."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelInfo, get_token, snapshot_download
from huggingface_hub.errors import StrictDataclassError

from karla_hf.backbones import load_tokenizer
from karla_hf.card import pack_card_text, render_card, write_card
from karla_hf.card_results import Measured
from karla_hf.checkpoints import (
    check_checkpoint,
    load_checkpoint,
    load_memory,
    save_tokenizer,
    writing,
)
from karla_hf.head_and_memory import load_without_backbone
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.modeling.exchange_karla import export_pack, import_pack, verify_engram
from karla_hf.modeling.hub_karla import commit_files, file_names, hub_errors, open_repository
from karla_hf.modeling.manifest_karla import MANIFEST
from karla_hf.modeling.memory_karla import tokenizer_hash
from karla_hf.modeling.packs_karla import save_engram
from karla_hf.modeling.public_karla import (
    CARD,
    RESULTS,
    check_public,
    is_published,
    keeps_card,
    public_backbone,
    public_memory,
    published_files,
)
from karla_hf.modeling.publishing_karla import keeps_remote_card, publish


_PACK_FILE = re.compile(r"[\w.-]+-[0-9a-f]{16}\.safetensors")
NOT_PUSHED, NOT_PULLED = "nothing was pushed", "nothing was pulled"


def push(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    packs: Sequence[str] | None = None,
    revision: str | None = None,
    message: str | None = None,
    include_backbone: bool = False,
    base_model: str | None = None,
    measured: Measured | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> CommitInfo:
    """Push a Karla from its folder: memory, packed head, code, tokenizer and card, in one commit.

    A `README.md` in the folder is the card. Without one, a card that was written there by hand, or with numbers, stays,
    unless what follows from `measured` on is given; else a card is made.

    Args:
        directory: the folder. Not modified.
        repo_id: `owner/name`, or a name of the token's owner; made if new.
        private: whether a new repository is private.
        packs, revision, include_backbone, base_model: as in `KarlaForCausalLM.push_to_hub`.
        message: first line of the commit.
        measured: results for the card.
        datasets: names on the Hub of what it was trained on, for the card.
        license: of what is published, for the card.

    Raises:
        OSError: if this is no Karla, a file is damaged, the Hub refuses, or another push came first.
        ValueError: if the backbone has no name on the Hub, a path or a token would be published, or two cards are meant.
        KeyError: if there is no such pack.
    """
    source = Path(directory)
    fresh_card = bool(measured or datasets or license)
    if fresh_card and keeps_card(source):
        raise ValueError(
            f"{source} has a {CARD} already, which is the card; write a new one there with `karla card --force`, or push "
            "without --eval, --dataset and --license."
        )
    model = load_checkpoint(source)[0] if include_backbone else load_without_backbone(source)
    tokenizer = load_tokenizer(str(source))
    if model.tokenizer_sha256 is not None and tokenizer_hash(tokenizer) != model.tokenizer_sha256:
        raise ValueError(
            f"The tokenizer in {source} has another vocabulary than the one that the memory was made with; put the "
            "backbone's tokenizer there again."
        )
    with tempfile.TemporaryDirectory(prefix="karla-push-") as name:
        folder = Path(name)
        model.save_public(folder, include_backbone=include_backbone, packs=packs, base_model=base_model)
        save_tokenizer(tokenizer, folder)
        if keeps_card(source):
            shutil.copyfile(source / CARD, folder / CARD)
        for path in (source / RESULTS).glob("*.yaml"):
            (folder / RESULTS).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / RESULTS / path.name)

        def write(found: str) -> None:
            text = render_card(folder, found, measured=measured, datasets=datasets, license=license)
            write_card(folder, text, measured)

        return publish(
            folder, repo_id, write, fresh_card=fresh_card, private=private or None, revision=revision, message=message
        )


def pull(repo_id: str, directory: str | Path, *, revision: str | None = None) -> str:
    """Bring a Karla into a new folder; what it holds is checked before the folder gets its name.

    Only what belongs to a Karla is downloaded, and none of its code is run.

    Args:
        repo_id: `owner/name`.
        directory: new or empty.
        revision: branch, tag or commit; None is `main`.

    Returns:
        The commit.

    Raises:
        OSError: if the folder holds something, the repository is no Karla or is damaged, or the Hub refuses.
        ValueError: if the name is no repository's, or its files do not fit each other.
    """
    target = Path(directory).resolve()
    _check_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        folder = Path(name) / "fresh"
        head = _look(repo_id, revision)
        if "config.json" not in file_names(head):
            what = (
                "a pack of a memory; `karla pack pull` adds it to a Karla"
                if MANIFEST in file_names(head)
                else "no Karla"
            )
            raise OSError(f"{head.id} holds {what}; {NOT_PULLED}.")
        _download(head, ["config.json"], folder)
        _check_model_type(head, folder / "config.json")
        _download(head, filter(is_published, file_names(head)), folder)
        _check_whole(head, folder)
        folder.rename(target)
    return str(head.sha)


def push_pack(
    directory: str | Path,
    pack: str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """Push one pack to a repository of its own, in one commit; the pack there before, if any, is replaced.

    Args:
        directory: folder of a Karla. Not modified.
        pack: the pack.
        repo_id, private, revision, message, base_model: as in `push`.

    Raises:
        OSError: if a file is damaged, the Hub refuses, or another push came first.
        ValueError: if the backbone has no name on the Hub, or the repository holds a model.
        KeyError: if there is no such pack.
    """
    engram, tokenizer_sha256 = load_memory(directory)
    config = KarlaConfig.from_pretrained(str(directory))
    backbone = public_backbone(config.base_model_name_or_path, base_model, config.backbone_included)
    memory = public_memory(engram, [pack], backbone)
    with tempfile.TemporaryDirectory(prefix="karla-push-") as name:
        folder = Path(name) / "pack"
        export_pack(memory, pack, folder, tokenizer_sha256)
        names = {path.name for path in folder.iterdir()}
        api = HfApi(library_name="karla-hf")
        with hub_errors(repo_id, NOT_PUSHED, write=True, revision=revision):
            head = open_repository(api, repo_id, private=private or None, revision=revision, create_pr=False)
            there = file_names(head)
            if "config.json" in there:
                raise ValueError(f"{head.id} holds a model; give the pack a repository of its own.")
            if not keeps_remote_card(api, head):
                (folder / CARD).write_text(pack_card_text(memory, pack, head.id, backbone), encoding="utf-8")
                names.add(CARD)
            check_public(folder, names, get_token())
            stale = {file for file in there - names if _PACK_FILE.fullmatch(file)}
            message = message or f"Upload pack {pack}"
            return commit_files(api, head, folder, names, stale, message=message, revision=revision)


def pull_pack(
    directory: str | Path, repo_id: str, *, name: str | None = None, revision: str | None = None
) -> tuple[str, int]:
    """Add a pack from the Hub to a Karla; its files are checked, and it is refused if it does not fit.

    Args:
        directory: folder of the Karla, whose memory is changed.
        repo_id: where the pack is.
        name: its name here; None keeps its own.
        revision: branch, tag or commit; None is `main`.

    Returns:
        Its name and its rows.

    Raises:
        OSError: if there is no pack, it is damaged, or the Hub refuses.
        ValueError: if the pack does not fit this memory, or a pack of that name is here already.
    """
    check_checkpoint(directory)
    with tempfile.TemporaryDirectory(prefix="karla-pull-") as folder:
        head = _look(repo_id, revision)
        there = file_names(head)
        if MANIFEST not in there:
            what = "a model; `karla pull` brings it" if "config.json" in there else "no pack of a memory"
            raise OSError(f"{head.id} holds {what}; {NOT_PULLED}.")
        files = [MANIFEST, *filter(_PACK_FILE.fullmatch, there)]
        _download(head, files, Path(folder))
        with writing(directory):
            engram, tokenizer_sha256 = load_memory(directory)
            try:
                found = import_pack(engram, folder, name, tokenizer_sha256)
            except (OSError, ValueError) as error:
                raise type(error)(str(error).replace(folder, head.id)) from error
            save_engram(engram, directory, tokenizer_sha256)
    return found, engram.packs[found].num_owned


def _look(repo_id: str, revision: str | None) -> ModelInfo:
    with hub_errors(repo_id, NOT_PULLED, write=False, revision=revision):
        return HfApi(library_name="karla-hf").model_info(repo_id, revision=revision)


def _download(head: ModelInfo, names: Iterable[str], folder: Path) -> None:
    """Bring files of one commit into a folder; a name that would leave it is refused by huggingface_hub."""
    with hub_errors(head.id, NOT_PULLED, write=False, revision=head.sha):
        snapshot_download(head.id, revision=head.sha, local_dir=folder, allow_patterns=sorted(names))
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # what huggingface_hub notes for a second download


def _check_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OSError(f"{target} is there already; give a new or an empty folder.")


def _check_model_type(head: ModelInfo, path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise OSError(f"config.json of {head.id} is no JSON object ({error}); {NOT_PULLED}.") from error
    if found != KarlaConfig.model_type:
        raise OSError(f"{head.id} holds a model of type {found!r}, not a Karla; {NOT_PULLED}.")


def _check_whole(head: ModelInfo, folder: Path) -> None:
    """Load memory and head once and compare the memory's files with their hashes; remove what belongs to nothing."""
    try:
        names = published_files(folder)
        load_without_backbone(folder)
        damaged = [f"{file}: {reason}" for file, reason in verify_engram(folder).items()]
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        damaged = [" ".join(str(error).split()).replace(f"{folder}/", "").rstrip(".")]
    if damaged:
        raise OSError(f"{head.id} is damaged ({'; '.join(damaged)}); {NOT_PULLED}.")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in names:
            path.unlink()
