"""Saving and loading HOPE: a checkpoint holds what was trained and names the frozen encoder instead of carrying it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import cached_file

from .encoder_hope import load_encoder, weights_sha256
from .learning_hope import LEARNING_FILE, load_learning, save_learning


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_ENCODER_ARGUMENTS = ("cache_dir", "local_files_only", "token")


class HopeCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the HOPE models."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load what was trained and what was learned, and the encoder that the checkpoint names.

        Args:
            pretrained_model_name_or_path: a folder or a Hub name.
            config: configuration to use instead of the saved one.
            kwargs: as in transformers, fields of the configuration included.

        Raises:
            OSError: if a file is missing or damaged, or the encoder is found nowhere.
            ValueError: if weights are missing or left over, or the encoder is not the one that the model was made on.
        """
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        if config is None:
            own = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.config_class.__annotations__}
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub, **own)
        loading_info = kwargs.pop("output_loading_info", False)
        options = {} if config.encoder_included else {"init_encoder": False}
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                output_loading_info=True,
                use_safetensors=True,
                **options,
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(
                f"The weights in {pretrained_model_name_or_path} are damaged ({error}); restore them from a good copy."
            ) from error
        wrong = sorted([*info["missing_keys"], *(k for k in info["unexpected_keys"] if not k.startswith("lm_head."))])
        if wrong:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not belong to this configuration: {len(wrong)} are "
                f"missing or left over, such as {wrong[0]}; load the checkpoint with the config.json that it was saved with."
            )
        if config.encoder_included:
            model.attach_encoder(model.hope.slow.encoder)
        else:
            model.load_named_encoder(**{key: hub[key] for key in _ENCODER_ARGUMENTS if key in hub})
        learned = cached_file(
            str(pretrained_model_name_or_path), LEARNING_FILE, _raise_exceptions_for_missing_entries=False, **hub
        )
        if learned is not None:
            load_learning(model, learned)
        return (model, info) if loading_info else model

    def load_named_encoder(self, **hub) -> None:
        """Load and attach the encoder that the configuration names. Errors as in `from_pretrained`."""
        config = self.config
        encoder = load_encoder(config.encoder_name_or_path, config.encoder_revision, **hub)
        found = weights_sha256(encoder)
        if config.encoder_sha256 is not None and found != config.encoder_sha256:
            raise ValueError(
                f"The weights of the encoder {config.encoder_name_or_path!r} have the hash {found[:12]}, but this model was "
                f"made on {config.encoder_sha256[:12]}; use the encoder that it was made on."
            )
        self.attach_encoder(encoder.to(device=self.hope.norm.weight.device, dtype=self.hope.norm.weight.dtype))

    def attach_encoder(self, encoder: nn.Module) -> None:
        """Take an encoder as slow memory: it is frozen, and its table becomes input and output embeddings."""
        self.hope.slow.encoder = encoder.requires_grad_(False).eval()

    def save_pretrained(self, save_directory, *, include_encoder=None, state_dict=None, push_to_hub=False, **kwargs):
        """Save what was trained and what was learned, and the encoder only if asked.

        Everything is written beside the target first and moved there file by file.

        Args:
            save_directory: the folder.
            include_encoder: whether to save the encoder's weights too; None keeps what the model was loaded with.
            state_dict: weights to save instead of the model's; those of the encoder are dropped unless included.
            push_to_hub: whether to upload the folder afterwards.
            kwargs: as in transformers.

        Raises:
            ValueError: if the encoder has no name and is not included.
            OSError: if the folder cannot be written.
        """
        include = self.config.encoder_included if include_encoder is None else include_encoder
        if not include and self.config.encoder_name_or_path is None:
            raise ValueError(
                "The encoder has no name to load it by, so a checkpoint without it could not be loaded; use "
                "include_encoder=True."
            )
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        before, self.config.encoder_included = self.config.encoder_included, include
        try:
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as staging:
                super().save_pretrained(staging, state_dict=self._own_state(state_dict, include), **kwargs)
                save_learning(self, Path(staging) / LEARNING_FILE)
                for path in Path(staging).iterdir():
                    os.replace(path, target / path.name)
        except SafetensorError as error:
            raise OSError(f"{target} cannot be written ({error}); what was there before is unchanged.") from error
        finally:
            self.config.encoder_included = before
        if not self.has_learned:
            (target / LEARNING_FILE).unlink(missing_ok=True)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def _own_state(self, state_dict: dict[str, torch.Tensor] | None, include_encoder: bool):
        if include_encoder:
            return state_dict
        state = self.state_dict() if state_dict is None else state_dict
        return {name: tensor for name, tensor in state.items() if not _is_encoders(name)}


def _is_encoders(name: str) -> bool:
    return name.startswith(("slow.encoder.", "model.slow.encoder.", "lm_head."))
