"""What a folder may lead transformers to: safetensors in that folder, and no pickle, which can run code when it is opened.

Of a repository on the Hub, huggingface_hub checks every name itself; of a local folder, nobody does.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


_WEIGHTS_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_weights(folder: str | os.PathLike, subfolder: str = "") -> None:
    """Refuse a local folder whose weights are a pickle, or whose index names a file outside.

    Weights may be links: they are only ever read as safetensors. Files of a memory may not (see `open_tensors`), since
    they are copied into other folders.

    Args:
        folder: a folder; anything else, such as a Hub name, passes.
        subfolder: where in it the weights are.

    Raises:
        OSError: naming the file.
    """
    place = Path(folder, subfolder)
    if not place.is_dir():
        return
    for index in sorted(place.rglob("*.safetensors.index*.json")):
        check_index(index)
    named = (
        _read_object(place / "config.json").get("transformers_weights") if _is_file(place / "config.json") else None
    )
    if named is not None and not (
        isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise OSError(
            f"{place}/config.json names {named!r} as its weights, which are no safetensors; remove that entry."
        )
    adapter = _is_file(place / "adapter_config.json") and not _is_file(place / "adapter_model.safetensors")
    pickles = [path.name for pattern in _PICKLES for path in sorted(place.glob(pattern))]
    safe = any(place.glob("*.safetensors")) or any(place.rglob("*.safetensors.index*.json"))
    if pickles and (adapter or not safe):
        raise OSError(
            f"{place} holds its weights as a pickle ({pickles[0]}), which can run code when it is opened; save them as "
            "safetensors where you trust the file, for example with `save_pretrained`."
        )


def check_index(path: Path) -> None:
    """Refuse an index of weights in several files unless each is named as a safetensors file beside it, and is there.

    Args:
        path: a file such as `model.safetensors.index.json`.

    Raises:
        OSError: naming the index and what is wrong.
    """
    index = _read_object(path)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not isinstance(index.get("metadata"), dict):
        raise OSError(f"{path} is no index of weights; restore it from a good copy.")
    for name in files.values():
        if not isinstance(name, str) or not _WEIGHTS_NAME.fullmatch(name):
            raise OSError(f"{path} names {name!r}, which is no safetensors file in its folder; get the weights again.")
        if not _is_file(path.parent / name):
            raise OSError(f"{path} names {name!r}, which is missing; get the weights again.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except ValueError:  # a name that no file can have
        return False


def _read_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is no JSON ({error}); restore it from a good copy.") from error
    if not isinstance(found, dict):
        raise OSError(f"{path} is no JSON object; restore it from a good copy.")
    return found
