"""Saving and loading: a checkpoint holds memory and head, and names the frozen backbone instead of carrying it."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import cached_file, logging

from .backbone_karla import load_backbone, resolve_backbone
from .bitlinear_karla import set_packed
from .packs_karla import load_engram, save_engram
from .sharded_karla import collect
from .unchanged_karla import adapted_layers
from .weights_karla import check_weights


logger = logging.get_logger(__name__)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)
_BACKBONE_ARGUMENTS = ("dtype", "torch_dtype", "device_map", "attn_implementation", "quantization_config")


class KarlaCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of the Karla models."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, backbone_kwargs=None, **kwargs):
        """Load memory and head, and the backbone that the checkpoint names.

        Args:
            pretrained_model_name_or_path: a folder or a Hub name.
            config: configuration to use instead of the saved one.
            backbone_kwargs: arguments for loading the backbone alone; they go before those in `kwargs`.
            kwargs: as in transformers, fields of the configuration included; `ctm_packed=False` makes the ternary weights
                of a packed head trainable floats. `dtype`, `device_map` and
                `attn_implementation` reach the backbone as well; `quantization_config` reaches the backbone only.

        Raises:
            OSError: if a file is missing, damaged or no safetensors, or the backbone is found nowhere.
            ValueError: if memory and backbone do not fit each other, or trained rows are asked for that are not there.
        """
        check_weights(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        kwargs["use_safetensors"] = True
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        if config is None:
            own = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.config_class.__annotations__}
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub, **own)
        loading_info = kwargs.pop("output_loading_info", False)
        backbone = {key: kwargs[key] for key in _BACKBONE_ARGUMENTS if kwargs.get(key) is not None}
        backbone.update(backbone_kwargs or {})
        kwargs.pop("quantization_config", None)
        packed, saved = config.ctm_packed, cls.config_class.get_config_dict(pretrained_model_name_or_path, **hub)[0]
        config.ctm_packed = saved.get("ctm_packed", False)  # as the file is; converted below
        by_reference = not config.backbone_included
        options = {"init_backbone": False} if by_reference else {}
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                output_loading_info=True,
                **options,
                **kwargs,
            )
        except (SafetensorError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise OSError(
                f"The weights in {pretrained_model_name_or_path} are damaged ({reason}); restore them from a good copy."
            ) from error
        lost = [name for name in info["missing_keys"] if name.startswith(model.head_prefix)]
        if lost:
            raise OSError(
                f"The weights in {pretrained_model_name_or_path} lack {len(lost)} of the head, such as {min(lost)}, which "
                "would stay random; restore them from a good copy."
            )
        if by_reference:
            model.load_named_backbone(**backbone)
        else:  # loading made new parameters, which train, and no output layer of a bare KarlaModel
            karla = model.karla_model
            if config.text_config.tie_word_embeddings:
                karla._lm_head[0].weight = karla.get_input_embeddings().weight
            for module in (karla.backbone, *karla._lm_head):
                module.requires_grad_(False).eval()
        engram = model.karla_model.layer_engram
        if engram is not None:
            if any("layer_engram." in name for name in info["missing_keys"]):
                raise ValueError(
                    f"{pretrained_model_name_or_path} has no trained rows as engram_layer_ids asks for; load it without, or "
                    "make a new Karla with them."
                )
            torch.nn.Embedding._apply(engram.rows, torch.Tensor.cpu)  # device_map may have put the rows elsewhere
        find = functools.partial(_find, str(pretrained_model_name_or_path), hub)
        loaded = load_engram(find, config.text_config.hidden_size, config.text_config.vocab_size)
        if loaded is not None:
            model.set_engram(*loaded)
        if packed != config.ctm_packed:
            set_packed(model.karla_model.ctm, packed)
            model.config.ctm_packed = packed
        return (model, info) if loading_info else model

    def load_named_backbone(self, **kwargs) -> None:
        """Load and attach the backbone that the configuration names. Arguments and errors as in `load_backbone`."""
        config = self.config
        if "quantization_config" not in kwargs and config.backbone_quantization is not None:
            kwargs["quantization"] = config.backbone_quantization
        name, revision = config.base_model_name_or_path, config.base_model_revision
        backbone = load_backbone(name, revision=revision, **kwargs)
        for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
            expected, found = getattr(config.text_config, key), getattr(backbone.config, key)
            if found != expected:
                raise ValueError(
                    f"The backbone {name!r} has {key} {found}, but memory and head were made on one with {expected}; use "
                    "the backbone that they were made on."
                )
        self.attach_backbone(backbone)
        source = resolve_backbone(name, revision=revision).source
        if source != config.base_model_source:
            logger.warning(
                f"Memory and head were made on {config.base_model_source or 'the official weights'} of {name}, but "
                f"{source or 'the official weights'} were loaded; logits differ slightly."
            )

    def save_pretrained(self, save_directory, *, include_backbone=None, state_dict=None, push_to_hub=False, **kwargs):
        """Save memory and head, and the backbone only if asked.

        Everything is written beside the target first and moved there file by file, so a full disk leaves what was there.
        Of a model that is distributed, process 0 writes; if its memory is sharded, all processes call this.

        Args:
            save_directory: the folder.
            include_backbone: whether to save the backbone's weights too; None keeps what the model was loaded with.
            state_dict: weights to save instead of the model's; those of the backbone are dropped unless included.
            push_to_hub: whether to push the model afterwards; see `push_to_hub`, whose arguments go here too.
            kwargs: as in transformers.

        Raises:
            ValueError: if something would be lost: adapters of peft, weights of the backbone that are no longer those of
                the model that it is named after, or exact weights of a quantised or unnamed one.
            OSError: if the folder cannot be written.
        """
        include = self.config.backbone_included if include_backbone is None else include_backbone
        if include:
            self._check_exact_backbone()
        if not include and self.config.base_model_name_or_path is None:
            raise ValueError(
                "The backbone has no name to load it by, so a checkpoint without it could not be loaded; use "
                "include_backbone=True."
            )
        self._check_nothing_is_lost(include)
        if self.engram.ranks.rank > 0:
            self.save_memory(save_directory)
            return
        push = {key: kwargs.pop(key) for key in _PUSH_ARGUMENTS if key in kwargs}
        target = Path(save_directory)
        self._save_weights(target, include, self._own_state(state_dict, include), **kwargs)
        if kwargs.get("is_main_process", True):
            self.save_memory(target)
        if push_to_hub and kwargs.get("is_main_process", True):
            repo_id = push.pop("repo_id", target.resolve().name)
            self.push_to_hub(repo_id, include_backbone=include, **push)

    def _check_exact_backbone(self) -> None:
        if not all(parameter.is_floating_point() for parameter in self.karla_model.backbone.parameters()):
            raise ValueError(
                "include_backbone=True, but the backbone is quantised and its packed weights do not reload exactly; save "
                "without it, or load the model with backbone_quantization=None."
            )

    def _save_weights(self, target: Path, include: bool, state_dict, changes: dict | None = None, **kwargs) -> None:
        """Write weights, configuration and code whole; `changes` are those of the configuration in the file."""
        changed = self._check_nothing_is_lost(include)
        target.mkdir(parents=True, exist_ok=True)
        before = self.config.backbone_included, self.config.backbone_changed
        self.config.backbone_included, self.config.backbone_changed = include, changed
        try:
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as staging:
                super().save_pretrained(staging, state_dict=state_dict, **kwargs)
                if (path := Path(staging, "config.json")).is_file():
                    _finish_config(path, changes or {})
                for path in Path(staging).iterdir():
                    os.replace(path, target / path.name)
        except SafetensorError as error:
            raise OSError(f"{target} cannot be written ({error}); what was there before is unchanged.") from error
        finally:
            self.config.backbone_included, self.config.backbone_changed = before

    def _check_nothing_is_lost(self, include_backbone: bool) -> bool:
        """Returns whether the backbone's weights are others than those of the model that it is named after."""
        adapted = adapted_layers(self)
        if adapted:
            raise ValueError(
                f"{len(adapted)} layers ({adapted[0]} first) carry adapters of peft, which a Karla's own checkpoint does not "
                "hold; save them with the PeftModel's save_pretrained, or merge them first with merge_and_unload()."
            )
        names, config = self.karla_model.changed_weights(), self.config
        changed = config.base_model_name_or_path is not None and (config.backbone_changed or bool(names))
        if changed and not include_backbone:
            example = f" ({names[0]} is another)" if names else ""
            raise ValueError(
                f"The backbone's weights are no longer those of {config.base_model_name_or_path!r}{example}, as after merging "
                "an adapter, so a checkpoint without them would lose the change; use include_backbone=True."
            )
        return changed

    def save_memory(self, save_directory) -> None:
        """Save what has changed of the packs alone, in the folder `engram` of a checkpoint.

        Of a memory that is distributed, process 0 writes; if it is sharded, all processes call this, and all of it is
        written.

        Raises:
            OSError: if it cannot be written, or another process writes there or has done so since the memory was loaded.
        """
        self._describe_backbone()
        engram = collect(self.engram)
        if engram is not None:
            save_engram(engram, save_directory, self.tokenizer_sha256)

    def _describe_backbone(self) -> None:
        """Let the memory know what it is written with, for its manifest."""
        config = self.config
        self.engram.made_with = {
            "backbone": config.base_model_name_or_path,
            "revision": config.base_model_revision,
            "source": config.base_model_source,
            "seed": config.engram_seed,
        }

    def _own_state(self, state_dict: dict[str, torch.Tensor] | None, include_backbone: bool):
        if include_backbone:
            return state_dict
        prefixes = self.own_prefixes
        if state_dict is not None:
            return {name: tensor for name, tensor in state_dict.items() if name.startswith(prefixes)}
        own: dict[str, torch.Tensor] = {}
        for prefix in prefixes:  # not self.state_dict(): bitsandbytes would unpack and round a live backbone
            own |= self.get_submodule(prefix[:-1]).state_dict(prefix=prefix)
        return own


def _finish_config(path: Path, changes: dict) -> None:
    """Change a configuration's file, take out where its parts were loaded from, and let it name the code beside it."""
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    for part in (config, config.get("text_config") or {}):
        part.pop("_name_or_path", None)
    code = config.get("auto_map", {})
    for key, reference in code.items():
        name = reference.rpartition("--")[2]
        if (path.parent / f"{name.partition('.')[0]}.py").is_file():
            code[key] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _find(checkpoint: str, hub: dict, name: str) -> str | None:
    return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub)
