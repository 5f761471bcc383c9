"""HOPE models as the commands use them: model and tokenizer in one folder; what is learned is saved at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedTokenizerBase

from karla_hf.checkpoints import check_kind, check_target, move_into_place, save_tokenizer
from karla_hf.modeling.encoder_hope import default_encoder, load_encoder_tokenizer
from karla_hf.modeling.learning_hope import LEARNING_FILE, load_learning, save_learning
from karla_hf.modeling.lock_karla import lock_folder
from karla_hf.modeling.modeling_hope import HopeForCausalLM


def create_hope(
    encoder: str | None,
    directory: str | Path,
    *,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> HopeForCausalLM:
    """Put fresh fast weights and levels on a sentence encoder and save them with its tokenizer.

    Args:
        encoder: a Hub name or a folder, which is remembered by its absolute path.
        directory: the new folder. It may exist if it is empty, or, with `force`, if it holds a HOPE.
        revision: of the encoder on the Hub.
        options: fields of `HopeConfig`.
        force: replace the HOPE in `directory`, what it has learned included.

    Raises:
        ValueError: for options that the model cannot take.
        OSError: if `directory` may not be used or written, or the encoder is found nowhere; what was there is whole.
    """
    target = Path(directory).resolve()
    check_target(target, force, "hope")
    model, tokenizer = fresh_hope(encoder, revision=revision, options=options)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging:
        fresh = Path(staging) / "fresh"
        model.save_pretrained(fresh)
        save_tokenizer(tokenizer, fresh)
        with lock_folder(target) if target.exists() and any(target.iterdir()) else nullcontext():
            move_into_place(fresh, target, Path(staging))
            Path(target, LEARNING_FILE).unlink(missing_ok=True)
    return model


def fresh_hope(
    encoder: str | None, *, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[HopeForCausalLM, PreTrainedTokenizerBase]:
    """An untrained HOPE on an encoder, and the encoder's tokenizer. Arguments and errors as of `create_hope`."""
    name = str(Path(encoder).resolve()) if encoder and os.path.isdir(encoder) else encoder or default_encoder()
    try:
        model = HopeForCausalLM.from_encoder(name, revision=revision, **(options or {}))
    except StrictDataclassError as error:
        raise ValueError(f"A model option cannot be used: {str(error.__cause__).removesuffix('.')}.") from error
    return model, load_encoder_tokenizer(name, revision)


def load_hope(directory: str | Path) -> tuple[HopeForCausalLM, PreTrainedTokenizerBase]:
    """Load a HOPE, with what it has learned, and its encoder's tokenizer, from the folder or, if it is not there, by name.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        OSError: if this is no HOPE, a file is missing or damaged, or the encoder is found nowhere.
        ValueError: if the encoder is not the one that the model was made on.
    """
    check_kind(directory, "hope")
    model = cast(HopeForCausalLM, HopeForCausalLM.from_pretrained(str(directory)).eval())
    if Path(directory, "tokenizer_config.json").is_file():
        return model, load_encoder_tokenizer(str(directory))
    if model.config.encoder_name_or_path is None:
        raise OSError(f"{directory} holds no tokenizer, and names no encoder; save its encoder's tokenizer there.")
    return model, load_encoder_tokenizer(model.config.encoder_name_or_path, model.config.encoder_revision)


def is_untrained(model: HopeForCausalLM) -> bool:
    """Whether the weights are those of a fresh model: every norm is one, and no gate of the encoder's context is open.

    Any training changes them, with whatever trainer.
    """
    norms = [module.weight for module in model.modules() if isinstance(module, nn.RMSNorm)]
    gate = getattr(model.model.slow, "gate", None)
    return all(bool((norm == 1).all()) for norm in norms) and (gate is None or not bool(gate.any()))


@contextmanager
def learning(model: HopeForCausalLM, directory: str | Path) -> Iterator[None]:
    """Inside, what was learned may change; afterwards it is saved. After a failure it is as before, in RAM and on disk.

    What another process has learned in the meantime is loaded first.

    Raises:
        OSError: if another process is writing to the folder, or it cannot be written.
    """
    path = Path(directory, LEARNING_FILE)
    with lock_folder(Path(directory)):
        _load_learned(model, path)
        try:
            yield
            _save_learned(model, path)
        except BaseException:
            _load_learned(model, path)
            raise


def _load_learned(model: HopeForCausalLM, path: Path) -> None:
    if path.is_file():
        load_learning(model, path)
    else:
        model.reset_learning()


def _save_learned(model: HopeForCausalLM, path: Path) -> None:
    if not model.has_learned:
        path.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as staging:
        fresh = Path(staging, path.name)
        try:
            save_learning(model, fresh)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(f"{path} cannot be written ({error}); make room and try again.") from error
        os.replace(fresh, path)
