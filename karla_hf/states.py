"""Backbone states of a data set, computed once and kept in memory-mapped files to train from.

A folder holds `states.json`, which says what the states are of, and shards `states-00000.safetensors` … with one tensor
`states` [tokens, L, D] each. Rows follow each other in the order of the data set and lie in one shard each, so a run that
was killed goes on with the first shard that is missing.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.report import format_bytes, new_console


MANIFEST = "states.json"
SHARD_BYTES = 128 * 2**20  # what is lost at most when a run is killed
BATCH_TOKENS = {"cpu": 1024}  # of one call of the backbone; 16,384 on any other device
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StatesKey:
    """What states depend on. Stored states are used for a run whose key is the same.

    Attributes:
        backbone: name or folder of the backbone, and a sample of its weights.
        revision: its revision on the Hub.
        source: where its weights came from, if not the official ones.
        precision: quantisation and dtypes that it runs in.
        tokenizer: hash of the tokenizer.
        layers: backbone layers.
        dtype: dtype of the stored states.
        data: hash of all token ids, row by row.
    """

    backbone: str
    revision: str | None
    source: str | None
    precision: str
    tokenizer: str | None
    layers: list[int]
    dtype: str
    data: str

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Names of what a stored key has otherwise."""
        return [name for name, value in asdict(self).items() if stored.get(name) != value]


class StoredStates:
    """States of the rows of a data set, mapped from files.

    Args:
        folder: what `store_states` filled.
        lengths: tokens of every row.
        width: values per token, L * D.
        size: bytes per value.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], width: int, size: int):
        self.folder, self.lengths = folder, list(lengths)
        self.starts = [0, *accumulate(self.lengths)]
        self.firsts = _plan(self.lengths, max(1, SHARD_BYTES // (width * size)))
        self.bytes = self.starts[-1] * width * size
        self._open: dict[int, Any] = {}

    def shard_rows(self, shard: int) -> range:
        """Rows of a shard."""
        ends = [*self.firsts[1:], len(self.lengths)]
        return range(self.firsts[shard], ends[shard])

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"states-{shard:05}.safetensors"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> torch.Tensor:
        """States [tokens, L, D] of a row, read from its file.

        Raises:
            OSError: if the file is missing or damaged.
        """
        shard = bisect.bisect_right(self.firsts, row) - 1
        start = self.starts[row] - self.starts[self.firsts[shard]]
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.path(shard), framework="pt").get_slice("states")
            return self._open[shard][start : start + self.lengths[row]]
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{self.path(shard)} cannot be read ({error}); delete it, and the next run computes it anew."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def store_states(
    model: KarlaForCausalLM,
    rows: Sequence[list[int]],
    folder: Path,
    *,
    dtype: str = "bfloat16",
    precision: str = "",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> StoredStates:
    """Compute the backbone states of rows of token ids and store them, unless they are stored already.

    Args:
        model: a Karla whose backbone is frozen. Not modified.
        rows: token ids of every row, each run by itself.
        folder: where to. States of something else that lie there are replaced, with a sentence.
        dtype: "bfloat16", "float16" or "float32", of what is stored.
        precision: name of what `autocast` does.
        autocast: makes a context to run the backbone in, as training would.
        rank: number of this process, which computes every `world`-th shard.
        world: number of processes, which all call this.
        wait: waits until all processes have called it.

    Returns:
        The states.

    Raises:
        ValueError: for an unknown dtype, or a backbone that trains.
        OSError: if the disk has no room for them, or the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype of cached states is {dtype!r}; give one of {', '.join(DTYPES)}.")
    model.model.check_frozen()
    width = len(model.model.state_layers) * model.config.text_config.hidden_size
    stored = StoredStates(folder, [len(row) for row in rows], width, DTYPES[dtype].itemsize)
    if rank == 0:
        _claim(folder, states_key(model, rows, dtype, precision), stored)
    wait()
    todo = [shard for shard in range(rank, len(stored.firsts), world) if not stored.path(shard).is_file()]
    was_training = model.training
    model.eval()
    for shard in logging.tqdm(todo, desc=f"backbone states, {folder.name}", disable=None if todo else True):
        with autocast():
            states = _compute(model, [rows[i] for i in stored.shard_rows(shard)], DTYPES[dtype])
        draft = stored.path(shard).with_suffix(f".{os.getpid()}")
        save_file({"states": states}, draft)
        draft.replace(stored.path(shard))
    model.train(was_training)
    wait()
    return stored


def states_key(model: KarlaForCausalLM, rows: Sequence[list[int]], dtype: str, precision: str = "") -> StatesKey:
    """What the states of rows depend on; see `store_states` for the arguments."""
    config, data = model.config, hashlib.sha256()
    for row in rows:
        data.update(torch.tensor([len(row), *row]).numpy().tobytes())
    return StatesKey(
        backbone=f"{config.base_model_name_or_path} {_fingerprint(model)}",
        revision=config.base_model_revision,
        source=config.base_model_source,
        precision=f"{config.backbone_quantization}, {model.get_input_embeddings().weight.dtype}, {precision}",
        tokenizer=model.tokenizer_sha256,
        layers=model.model.state_layers,
        dtype=dtype,
        data=data.hexdigest(),
    )


def _fingerprint(model: KarlaForCausalLM) -> str:
    """Tells a backbone's weights from others under the same name, by the beginning of every one."""
    sample = hashlib.sha256()
    for weight in model.model.backbone.parameters():
        sample.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return sample.hexdigest()[:16]


def _plan(lengths: Sequence[int], most: int) -> list[int]:
    """First row of every shard; a shard holds at most so many tokens, or one row."""
    firsts, tokens = [0], 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > most:
            firsts.append(row)
            tokens = 0
        tokens += length
    return firsts


def _claim(folder: Path, key: StatesKey, stored: StoredStates) -> None:
    """Make the folder that of `key`, with nothing of another one in it, and say how much it takes."""
    manifest, console = folder / MANIFEST, new_console()
    before = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None
    if before is not None and (others := key.differences(before)):
        console.print(
            f"The states in {folder} are of another run ({', '.join(others)} differ); they are computed anew."
        )
        manifest.unlink()
        before = None
    for path in folder.glob("states-*"):
        if before is None or path.suffix != ".safetensors":  # of something else, or half written when a run was killed
            path.unlink()
    there = sum(path.stat().st_size for path in folder.glob("states-*.safetensors"))
    missing = sum(not stored.path(shard).is_file() for shard in range(len(stored.firsts)))
    console.print(
        f"Backbone states of {stored.starts[-1]:,} tokens: {format_bytes(stored.bytes)} in {folder}"
        + (f", {missing} of {len(stored.firsts)} files to compute." if missing else ", all there.")
    )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if stored.bytes - there > free:
        raise OSError(
            f"The backbone states need {format_bytes(stored.bytes - there)} more in {folder}, where {format_bytes(free)} "
            "are free; give another `cache_dir`, fewer `ctm_source_layers` or fewer texts."
        )
    draft = manifest.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(key), indent=1) + "\n", encoding="utf-8")
    draft.replace(manifest)


def _compute(model: KarlaForCausalLM, rows: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """States [tokens, L, D] of rows, in their order; rows of alike length run together."""
    device = model.get_input_embeddings().weight.device
    limit = BATCH_TOKENS.get(device.type, 16384)
    starts = [0, *accumulate(map(len, rows))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    states = torch.empty(starts[-1], len(model.model.state_layers), model.config.text_config.hidden_size, dtype=dtype)
    while order:
        longest = len(rows[order[0]])
        count = max(1, limit // max(longest, 1))
        batch, order = order[:count], order[count:]
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for at, i in enumerate(batch):
            ids[at, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.int64)
            mask[at, : len(rows[i])] = 1
        out = model.model.backbone_states(ids.to(device), mask.to(device)).to(dtype).cpu()
        for at, i in enumerate(batch):
            states[starts[i] : starts[i] + len(rows[i])] = out[at, : len(rows[i])]
    return states
