"""What of a checkpoint may be published: its own files, with names that others can use, without paths and tokens."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from .engram_karla import Engram
from .exchange_karla import find_pack
from .manifest_karla import FOLDER, MANIFEST, files_of, parse_manifest
from .saving_karla import damaged_files


CARD, RESULTS = "README.md", ".eval_results"
RENEWED = "<!-- karla-hf makes this card anew with every push; take this line out to keep what you write. -->"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors")
_OURS = re.compile(rf"{FOLDER}/[\w-][\w.-]*|{_WEIGHTS.pattern}|model\.safetensors\.index\.json|\w+_(?:karla|ctm)\.py")
_RESULT = re.compile(r"\.eval_results/[\w-][\w.-]*\.yaml")
_LOCAL_PATH = re.compile(r"(?:file://|~[/\\]|/[^/\s]+/|[A-Za-z]:[/\\]|\\\\).*")
_TEXTS = (".json", ".jinja", ".md", ".py", ".txt", ".yaml")


def public_backbone(name: str | None, base_model: str | None, include_backbone: bool) -> str | None:
    """The name by which others find a backbone: `base_model`, or `name` unless it is a folder.

    Raises:
        ValueError: if there is no such name and the backbone is not included.
    """
    if base_model is not None:
        if not is_hub_name(base_model):
            raise ValueError(f"base_model is {base_model!r}, which is no name on the Hub; give one like `owner/name`.")
        return base_model
    if name is not None and is_hub_name(name):
        return name
    if include_backbone:
        return None
    known = "has no name" if name is None else f"is the folder {name!r}, which only this machine has"
    raise ValueError(
        f"The backbone {known}, so nobody could load what is pushed; push it to the Hub and give its name there as "
        "base_model, or include the backbone."
    )


def is_hub_name(name: str) -> bool:
    """Whether a name can be one on the Hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def public_memory(engram: Engram, packs: Sequence[str], backbone: str | None) -> Engram:
    """Packs of a memory as they may be published: made with a backbone of that name, and sources without folders.

    Args:
        engram: the memory. Not modified; the result shares its rows.
        packs: names of the packs.
        backbone: the backbone's public name.

    Raises:
        KeyError: if there is no such pack.
        OSError: if a pack is damaged.
    """
    public = Engram(engram.constants, engram.families, engram.layout)
    public.lexicon, public.saved = engram.lexicon, dict(engram.saved)
    public.made_with = _public_origin(engram.made_with, backbone)
    for name in packs:
        pack = copy.copy(find_pack(engram, name))
        damaged = damaged_files(engram, pack)
        if damaged:
            raise OSError(f"The pack {name!r} is damaged ({', '.join(damaged)}); restore it, or push without it.")
        pack.sources = list(dict.fromkeys(public_title(source) for source in pack.sources))
        if pack.stored.get("made_with"):
            pack.stored = {**pack.stored, "made_with": _public_origin(pack.stored["made_with"], backbone)}
        public.packs[name] = pack
    return public


def _public_origin(made_with: dict, backbone: str | None) -> dict:
    return {**made_with, "backbone": backbone} if made_with else {}


def public_title(title: str) -> str:
    """A title as it is, or the last part of one that is a local path.

    Example:
        >>> public_title("The handbook"), public_title("/home/ann/notes/plan.txt")
        ('The handbook', 'plan.txt')
    """
    if not is_local_path(title):
        return title
    return (PureWindowsPath(title) if "\\" in title else PurePath(title)).name or "a local file"


def is_local_path(text: str) -> bool:
    """Whether a text is the path of a file on some machine.

    Example:
        >>> is_local_path("/home/ann/model"), is_local_path("owner/model"), is_local_path("</s>")
        (True, False, False)
    """
    return _LOCAL_PATH.fullmatch(text) is not None


def published_files(folder: Path) -> set[str]:
    """Paths below a checkpoint's folder of the files that belong to it, as its own files say.

    Raises:
        OSError: if a file that they name is missing, or one of them is damaged.
        ValueError: if one names a file that cannot belong to a checkpoint.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"config.json", *weight_files(folder)}
    for reference in config.get("auto_map", {}).values():
        code = folder / f"{reference.rpartition('--')[2].partition('.')[0]}.py"
        names |= {code.name} | {Path(path).name for path in get_relative_import_files(code)}
    manifest = folder / FOLDER / MANIFEST
    if manifest.is_file():
        stored = files_of(parse_manifest(manifest, manifest.read_bytes()))
        names |= {f"{FOLDER}/{MANIFEST}"} | {f"{FOLDER}/{file.file}" for file in stored}
    optional = [CARD, "generation_config.json", *TOKENIZER_FILES]
    names |= {name for name in optional if (folder / name).is_file()}
    return names | {f"{RESULTS}/{path.name}" for path in (folder / RESULTS).glob("*.yaml")}


def keeps_card(folder: Path) -> bool:
    """Whether a folder has a card that is not to be made anew."""
    path = folder / CARD
    return path.is_file() and RENEWED not in path.read_text(encoding="utf-8")


def is_published(name: str) -> bool:
    """Whether a file of that name can belong to a checkpoint.

    Example:
        >>> is_published("engram/manifest.json"), is_published("training_args.bin")
        (True, False)
    """
    others = ("config.json", "generation_config.json", CARD, *TOKENIZER_FILES)
    return name in others or bool(_OURS.fullmatch(name)) or bool(_RESULT.fullmatch(name))


def stale_files(there: set[str], names: set[str]) -> set[str]:
    """Files of a repository that a checkpoint wrote and that are not among its `names` any more.

    Example:
        >>> stale_files({"model.safetensors", "notes.txt"}, {"model-00001-of-00002.safetensors"})
        {'model.safetensors'}
    """
    return {name for name in there - names if _OURS.fullmatch(name)}


def weight_files(folder: Path) -> set[str]:
    """Names of the files that hold a checkpoint's weights, and of their index.

    Raises:
        ValueError: if the index names a file that cannot hold weights.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {"model.safetensors"}
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in files:
        if not _WEIGHTS.fullmatch(name):
            raise ValueError(f"{index} names {name!r}, which is no file of weights; save the checkpoint again.")
    return {index.name} | files


def check_public(folder: Path, names: set[str], token: str | None = None) -> None:
    """Raise ValueError if a text file that is to be pushed holds a token, the home folder, or JSON with a local path."""
    home = f"{Path.home()}/"
    for name in sorted(names):
        if not name.endswith(_TEXTS):
            continue
        text = (folder / name).read_text(encoding="utf-8")
        if token and token in text:
            raise ValueError(f"{name} holds your Hub token, so it is not pushed; remove the token, and revoke it.")
        if name == CARD and len(home) > 2 and home in text:
            raise ValueError(f"{name} names a file below {home}, so it is not pushed; remove that path.")
        if (
            name.endswith(".json")
            and not name.startswith("tokenizer.")
            and name not in ("vocab.json", "added_tokens.json")
        ):
            for key, value in _strings(json.loads(text)):
                if is_local_path(value):
                    raise ValueError(
                        f"{name} has {key} {value!r}, a path on this machine, so it is not pushed; remove it."
                    )


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for inner, found in value.items() if isinstance(value, dict) else ((key, found) for found in value):
            yield from _strings(found, inner)
