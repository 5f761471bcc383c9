"""Checkpoints as the commands use them: model and tokenizer in one folder, made whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from karla_hf.backbones import load_tokenizer
from karla_hf.errors import as_sentence
from karla_hf.modeling.configuration_karla import KarlaConfig, check_config_keys
from karla_hf.modeling.engram_karla import Engram
from karla_hf.modeling.lock_karla import lock_folder
from karla_hf.modeling.memory_karla import tokenizer_hash
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.packs_karla import FOLDER, load_engram


# What transformers raises on the way through a configuration with values of the wrong kind.
_BROKEN_CONFIG = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    StrictDataclassError,
)


def create_checkpoint(
    backbone: str,
    directory: str | Path,
    *,
    quantization: str | None = None,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> KarlaForCausalLM:
    """Put a fresh memory and head on a backbone and save them with its tokenizer.

    Args:
        backbone: a Hub name or a folder; a folder is remembered by its absolute path.
        directory: the new folder. It may exist if it is empty, or, with `force`, if it holds a Karla.
        quantization: None, "nf4" or "int8", for the backbone.
        revision: of the backbone on the Hub.
        options: fields of `KarlaConfig`.
        force: replace the Karla in `directory`, its memory included.

    Returns:
        The model.

    Raises:
        ValueError: for unknown options, values that an option does not take, or a backbone that is no causal LM.
        OSError: if `directory` may not be used or written, or the backbone is found nowhere; what was there before is
            whole.
    """
    options = dict(options or {})
    check_options(options)
    target = Path(directory).resolve()
    check_target(target, force)
    name = str(Path(backbone).resolve()) if os.path.isdir(backbone) else backbone
    tokenizer = load_tokenizer(name, revision=revision)
    model = KarlaForCausalLM.from_backbone(name, tokenizer, revision=revision, quantization=quantization, **options)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging:
        fresh = Path(staging) / "fresh"
        model.save_pretrained(fresh)
        save_tokenizer(tokenizer, fresh)
        with writing(target) if force and target.exists() and any(target.iterdir()) else nullcontext():
            move_into_place(fresh, target, Path(staging))
    return model


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless the options are fields of `KarlaConfig` and their values have the fields' types.

    Example:
        >>> check_options({"ctm_num_ticks": 4})
        >>> check_options({"ctm_num_ticks": "four"})
        Traceback (most recent call last):
        ValueError: `ctm_num_ticks` is 'four', but it takes int; give a value of that type.
    """
    check_config_keys(options)
    for key, value in options.items():
        expected = KarlaConfig.__annotations__[key]
        try:
            type_validator(key, float(value) if type(value) is int and expected == float | None else value, expected)
        except TypeError as error:
            kind = expected.__name__ if isinstance(expected, type) else expected
            raise ValueError(f"`{key}` is {value!r}, but it takes {kind}; give a value of that type.") from error


def load_checkpoint(directory: str | Path) -> tuple[KarlaForCausalLM, PreTrainedTokenizerBase]:
    """Load a Karla and its tokenizer.

    Args:
        directory: a folder that holds both.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        OSError: if this is no Karla, a file is missing or damaged, or the backbone is found nowhere.
        ValueError: if memory, tokenizer and backbone do not fit each other.
    """
    load_config(directory)
    tokenizer = load_tokenizer(str(directory))
    model = KarlaForCausalLM.from_pretrained(str(directory)).eval()
    if model.tokenizer_sha256 is not None and tokenizer_hash(tokenizer) != model.tokenizer_sha256:
        raise ValueError(
            f"The tokenizer in {directory} has another vocabulary than the one that the memory was made with; put the "
            "backbone's tokenizer there again."
        )
    return model, tokenizer


def load_config(directory: str | Path) -> KarlaConfig:
    """Load the configuration of a Karla.

    Raises:
        OSError: if this is no Karla, or its configuration is damaged.
        StrictDataclassClassValidationError: if a value is out of range.
    """
    check_checkpoint(directory)
    try:
        config: Any = KarlaConfig.from_pretrained(str(directory))
        sizes = config.text_config.hidden_size, config.text_config.vocab_size
        if not all(type(size) is int and size > 0 for size in sizes):
            raise TypeError(f"its backbone has hidden_size {sizes[0]!r} and vocab_size {sizes[1]!r}")
        return config
    except _BROKEN_CONFIG as error:
        if as_sentence(error) is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{directory}/config.json is no configuration of a Karla ({reason}); restore it from a good copy."
        ) from error


def load_memory(directory: str | Path) -> tuple[Engram, str | None]:
    """Load the memory of a Karla without its backbone.

    Returns:
        The memory and the hash of its tokenizer, as `save_engram` takes them.

    Raises:
        OSError: if this is no Karla, or a file of its memory is missing or damaged.
        ValueError: if the memory does not fit the configuration.
    """
    config: Any = load_config(directory).text_config

    def find(name: str) -> str | None:
        path = Path(directory, name)
        return str(path) if path.is_file() else None

    loaded = load_engram(find, config.hidden_size, config.vocab_size)
    if loaded is None:
        raise OSError(f"{directory} has no engram/manifest.json, so it has no memory; restore it from a good copy.")
    return loaded


@contextmanager
def writing(directory: str | Path) -> Iterator[None]:
    """Be the only one who changes the memory of a Karla, from loading it to saving it.

    Raises:
        OSError: if this is no Karla, or another process is writing to its memory.
    """
    check_checkpoint(directory)
    with lock_folder(Path(directory, FOLDER)):
        yield


def save_option(directory: str | Path, key: str, value: Any) -> None:
    """Change one model option in the configuration of a Karla, whole or not at all.

    Raises:
        OSError: if this is no Karla, or another process is writing to it.
        ValueError: if the option does not exist, or has another type.
        StrictDataclassClassValidationError: if the value is out of range.
    """
    check_options({key: value})
    with writing(directory):
        path = Path(directory, "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        config[key] = value
        KarlaConfig.from_dict(config)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as staging:
            fresh = Path(staging, "config.json")
            fresh.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(fresh, path)


MADE_BY = {"karla": "karla new", "hope": "karla new --hope"}
KINDS = {"karla": "Karla", "hope": "HOPE"}  # by model_type


def check_checkpoint(directory: str | Path) -> None:
    """Raise OSError unless a folder holds a Karla's configuration."""
    check_kind(directory, "karla")


def check_kind(directory: str | Path, kind: str) -> None:
    """Raise OSError unless a folder holds the configuration of a kind of `KINDS`."""
    found = model_kind(directory)
    if found == kind:
        return
    if found in KINDS:
        raise OSError(
            f"{directory} holds a {KINDS[found]}, but this needs a {KINDS[kind]}; make one with `{MADE_BY[kind]}`, or talk to "
            f"this one with `karla chat`."
        )
    raise OSError(
        f"{directory} holds a model of type {found!r}, not a {KINDS[kind]}; put a {KINDS[kind]} on it with `{MADE_BY[kind]}`."
    )


def model_kind(directory: str | Path) -> str | None:
    """The `model_type` of the configuration in a folder, such as "karla" or "hope".

    Raises:
        OSError: if there is no configuration, or it is damaged.
    """
    path = Path(directory, "config.json")
    if not path.is_file():
        where = "no folder" if not Path(directory).is_dir() else "no Karla (it has no config.json)"
        raise OSError(f"{directory} is {where}; give a folder that `karla new` or `save_pretrained` made.")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is no JSON object ({error}); restore it from a good copy.") from error


def check_target(target: Path, force: bool, kind: str = "karla") -> None:
    """Raise OSError unless a folder may be made: new, empty, or, with `force`, one that holds a model of this kind."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OSError(f"{target} is a file; give a new folder.")
    if not any(target.iterdir()):
        return
    try:
        check_kind(target, kind)
    except OSError as error:
        raise OSError(f"{target} holds other files; give a new or an empty folder.") from error
    if not force:
        raise OSError(
            f"{target} already holds a {KINDS[kind]}; give a new folder, or --force to replace it and its memory."
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer, without a note of how it was loaded.

    Raises:
        OSError: if it cannot be written.
    """
    path = directory / "tokenizer_config.json"
    try:
        tokenizer.save_pretrained(directory)
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("is_local", "local_files_only", "name_or_path"):
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no class of its own for a failed write
            raise
        raise OSError(f"The tokenizer cannot be written ({error}).") from error


def move_into_place(fresh: Path, target: Path, staging: Path) -> None:
    """Give the fresh folder its name; into a folder that exists, move entry by entry, the replaced ones to `staging`."""
    if not target.exists():
        fresh.rename(target)
        return
    for path in fresh.iterdir():
        old = target / path.name
        if old.is_dir():
            old.rename(staging / path.name)
        path.replace(old)
