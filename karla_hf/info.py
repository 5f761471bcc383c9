"""What a Karla consists of, level by level, in parameters and measured bytes."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from karla_hf.modeling.backbone_karla import resolve_backbone
from karla_hf.modeling.bitlinear_karla import BitLinear
from karla_hf.modeling.engram_karla import Engram
from karla_hf.modeling.manifest_karla import FOLDER, MANIFEST, files_of_pack, parse_manifest
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.saving_karla import damaged_files


# The promise for Qwen2.5-1.5B in nf4, in bytes of RAM; L1 is what remains of the total.
BUDGET = {"L0": 2_000_000_000, "L2": 50_000_000, "total": 2_500_000_000}


@dataclass(frozen=True)
class Level:
    """One level of a Karla.

    Attributes:
        name: "L0", "L1", "L2" or "total".
        what: "backbone", "memory", "trained rows", "head", or nothing.
        parameters: numbers it holds; of a quantised or packed layer, those it stands for.
        trainable: how many of them a trainer changes.
        bytes_on_disk: size of its files; None if they are not on this machine.
        bytes_in_ram: size of its tensors. The memory's tables are counted whole, although the operating system gives them
            pages only where rows are written.
        update_period: how often it changes.
        budget: most bytes in RAM promised for Qwen2.5-1.5B, or None.
    """

    name: str
    what: str
    parameters: int
    trainable: int
    bytes_on_disk: int | None
    bytes_in_ram: int
    update_period: str
    budget: int | None


@dataclass(frozen=True)
class Pack:
    """One pack of the memory.

    Attributes:
        name: its name.
        rows: rows that have a name.
        load: the same as a share of the rows of its slowest level.
        bytes_on_disk: size of its files; None if it has not been saved.
        tokens: tokens read.
        sources: titles of what was read.
        damaged: its files that could not be loaded, and why.
    """

    name: str
    rows: int
    load: float
    bytes_on_disk: int | None
    tokens: int
    sources: list[str]
    damaged: dict[str, str]


def describe_levels(model: KarlaForCausalLM, directory: str | Path) -> list[Level]:
    """Measure the levels of a loaded Karla.

    Args:
        model: the model. Not modified.
        directory: the folder it was loaded from.

    Returns:
        L0, L1 (and the trained rows, if there are any), L2 and their total.

    Raises:
        OSError: if a file of the checkpoint cannot be read.
    """
    head = model.model.ctm
    frozen = list(_unique(module for part in _frozen(model) for module in part.modules()))
    engram = model.engram
    tables = [table for pack in engram.packs.values() for table in pack.tables]
    values = sum(table.rows.size for table in tables)
    memory = sum(array.nbytes for table in tables for array in (table.names, table.rows, table.dirty))
    memory += _num_bytes(part for part in engram.constants if isinstance(part, torch.Tensor))
    disk = _checkpoint_bytes(Path(directory), model.own_prefixes)
    backbone_disk = disk["rest"] if model.config.backbone_included else _backbone_bytes(model.config)
    levels = [
        Level("L0", "backbone", _num_parameters(frozen), _num_trainable(frozen), backbone_disk,
              _num_bytes(_tensors(frozen)), "never", BUDGET["L0"]),
        Level("L1", "memory", values, 0, disk["memory"],
              memory, memory_period(engram), None),
        Level("L2", "head", _num_parameters(head.modules()),
              _num_trainable(head.modules()), disk["head"], _num_bytes(_tensors(head.modules())),
              "every training step", BUDGET["L2"]),
    ]  # fmt: skip
    if model.model.layer_engram is not None:
        rows = list(model.model.layer_engram.modules())
        levels.insert(2, Level("L1", "trained rows", _num_parameters(rows), _num_trainable(rows), disk["rows"],
                               _num_bytes(_tensors(rows)), "every training step", None))  # fmt: skip
    return [*levels, _total(levels)]


def describe_packs(engram: Engram, directory: str | Path) -> list[Pack]:
    """List the packs of a memory.

    Args:
        engram: the memory. Not modified.
        directory: the folder it was loaded from.
    """
    path = Path(directory, FOLDER, MANIFEST)
    entries = parse_manifest(path, path.read_bytes())["packs"] if path.is_file() else []
    sizes = {entry["name"]: sum({file.file: file.size for file in files_of_pack(entry)}.values()) for entry in entries}
    return [
        Pack(
            name=name,
            rows=pack.num_owned,
            load=pack.load,
            bytes_on_disk=sizes.get(name),
            tokens=pack.tokens,
            sources=list(pack.sources),
            damaged={file: engram.damaged[file] for file in damaged_files(engram, pack)},
        )
        for name, pack in engram.packs.items()
    ]


def memory_period(engram: Engram) -> str:
    """When the memory's levels change: "every 64, 512 and 4096 tokens read"."""
    *others, last = [str(period * engram.layout.chunk_size) for period in engram.layout.update_periods]
    return f"every {', '.join(others)} and {last} tokens read" if others else f"every {last} tokens read"


def _frozen(model: KarlaForCausalLM) -> list[nn.Module]:
    """The parts of L0: backbone and output layer."""
    return [part for part in (model.model.backbone, model.lm_head) if part is not None]


def _total(levels: list[Level]) -> Level:
    disks = [level.bytes_on_disk for level in levels]
    known = [size for size in disks if size is not None]
    return Level(
        name="total",
        what="",
        parameters=sum(level.parameters for level in levels),
        trainable=sum(level.trainable for level in levels),
        bytes_on_disk=sum(known) if len(known) == len(disks) else None,
        bytes_in_ram=sum(level.bytes_in_ram for level in levels),
        update_period="",
        budget=BUDGET["total"],
    )


def _unique(items: Iterable) -> Iterator:
    seen: set[int] = set()
    for item in items:
        if id(item) not in seen:
            seen.add(id(item))
            yield item


def _own_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    return _unique(parameter for module in modules for parameter in module.parameters(recurse=False))


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    modules = list(modules)
    packed = (m.in_features * m.out_features for m in modules if isinstance(m, BitLinear) and m.is_packed)
    return sum(packed) + sum(_logical_size(parameter) for parameter in _own_parameters(modules))


def _logical_size(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for: bitsandbytes keeps two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _num_trainable(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for parameter in _own_parameters(modules) if parameter.requires_grad)


def _tensors(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside a quantised parameter."""
    modules = list(modules)
    for parameter in _own_parameters(modules):
        yield parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (part for part in state.as_dict(packed=True).values() if isinstance(part, torch.Tensor))
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            yield scales
    yield from _unique(buffer for module in modules for buffer in module.buffers(recurse=False))


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _checkpoint_bytes(directory: Path, prefixes: tuple[str, ...]) -> dict[str, int]:
    """Bytes of the head's tensors, of trained rows, of the other tensors, and of the memory's files in a checkpoint."""
    sizes = {"head": 0, "rows": 0, "rest": 0, "memory": 0}
    parts = dict(zip(prefixes, ("head", "rows"), strict=False))
    for path in directory.glob("*.safetensors"):
        for name, entry in _header(path).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                part = next((part for prefix, part in parts.items() if name.startswith(prefix)), "rest")
                sizes[part] += end - start
    sizes["memory"] = sum(path.stat().st_size for path in (directory / FOLDER).glob("*") if path.is_file())
    return sizes


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, which is read only if it is as long as it says."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}); restore it from a good copy.") from error
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _backbone_bytes(config: Any) -> int | None:
    """Bytes of the weight files that the backbone is loaded from."""
    place = resolve_backbone(config.base_model_name_or_path, revision=config.base_model_revision).path_or_name
    folder = Path(place)
    if not folder.is_dir():
        options = {"revision": config.base_model_revision, "local_files_only": True}
        found = cached_file(place, "config.json", _raise_exceptions_for_missing_entries=False, **options)
        if found is None:
            return None
        folder = Path(found).parent
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(path.stat().st_size for path in files)
