"""Memory and head of a Karla alone, without the backbone that they were made on."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from karla_hf.checkpoints import load_config, load_memory
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.public_karla import weight_files


def load_without_backbone(directory: str | Path) -> KarlaForCausalLM:
    """Load memory and head of a Karla alone: what can be saved again, but not run.

    Raises:
        OSError: if this is no Karla, or a file is missing or damaged.
        ValueError: if the memory does not fit the configuration.
    """
    model = KarlaForCausalLM(load_config(directory), init_backbone=False)
    own = dict(_weights(Path(directory), model.own_prefixes))
    missing = [name for name in model.load_state_dict(own, strict=False, assign=True).missing_keys if name not in own]
    if missing:
        raise OSError(f"{directory} lacks {len(missing)} weights, such as {missing[0]}; restore it from a good copy.")
    model.set_engram(*load_memory(directory))
    if Path(directory, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(directory))
    return model


def _weights(directory: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint that begin with one of the prefixes."""
    for file in sorted(weight_files(directory)):
        if not file.endswith(".safetensors"):
            continue
        try:
            with safe_open(directory / file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    if name.startswith(prefixes):
                        yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{directory / file} is damaged ({error}); restore it from a good copy.") from error
