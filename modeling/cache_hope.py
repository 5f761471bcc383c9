"""What HOPE remembers between two calls: fast weights, their snapshots, and the last tokens. Its size never grows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, CacheLayerMixin

from .delta_hope import FastWeights


class HopeCacheLayer(CacheLayerMixin):
    """State of one layer.

    Attributes:
        fast: fast weights, each [B H, R, K] float32, or None before the first call.
        conv: [B, conv_size - 1, 3 D] last inputs of the convolution, or None.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.fast: FastWeights | None = None
        self.conv: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Refused: there are no keys and values of positions."""
        raise NotImplementedError(
            "A layer of HopeCache holds fast weights, not keys and values; set `fast` and `conv`."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new positions are attended to."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Not counted by layer."""
        return 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def select(self, rows: Callable[[torch.Tensor], torch.Tensor], batch: int) -> None:
        """Apply a selection of sequences."""
        if self.fast is not None:
            self.fast = FastWeights(
                *(None if s is None else rows(s.unflatten(0, (batch, -1))).flatten(0, 1) for s in self.fast)
            )
        if self.conv is not None:
            self.conv = rows(self.conv)


class HopeCache(Cache):
    """State of a HOPE model after some tokens.

    Args:
        num_layers: blocks of the model.

    Attributes:
        seen: columns of all calls, padding included.
        positions: [B] int64 on the CPU, real tokens of each sequence; None before the first call.
        pending: [B, C] int64 token ids of the chunk that is not complete yet.
        context: [B, C, D] the encoder's states of the last completed chunk, or None if there is no lagged context.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[HopeCacheLayer() for _ in range(num_layers)])
        self.seen = 0
        self.positions: torch.Tensor | None = None
        self.pending: torch.Tensor | None = None
        self.context: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state, by name."""
        found = {"positions": self.positions, "pending": self.pending, "context": self.context}
        for number, layer in enumerate(self.layers):
            found[f"layers.{number}.conv"] = layer.conv
            for name, tensor in layer.fast._asdict().items() if layer.fast is not None else ():
                found[f"layers.{number}.{name}"] = tensor
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(len(self.layers))

    def detach(self) -> None:
        """Cut the state off from the graph that made it."""
        for layer in self.layers:
            if layer.fast is not None:
                layer.fast = FastWeights(*(None if state is None else state.detach() for state in layer.fast))
                layer.conv = layer.conv.detach()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what has been written into fast weights cannot be taken back."""
        raise NotImplementedError(
            "A HopeCache cannot be cropped, because fast weights do not keep what they were; copy the cache beforehand "
            "(`copy.deepcopy(cache)`)."
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the sequences of `beam_idx`."""
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.positions is None:
            return
        for layer in self.layers:
            layer.select(rows, len(self.positions))
        for name in ("positions", "pending", "context"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else rows(tensor))


def save_cache(cache: HopeCache, path: str | Path, owner: dict[str, str]) -> None:
    """Write a state into a safetensors file, with what it belongs to. Written beside the target and moved there.

    Raises:
        ValueError: if the cache has seen nothing.
    """
    if cache.positions is None:
        raise ValueError("The cache has seen no token, so there is no session to save; run the model with it first.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in cache.tensors().items()}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".saving-{os.getpid()}-{target.name}")
    try:
        save_file(tensors, staged, metadata={"format": "pt", "seen": str(cache.seen), **owner})
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def load_cache(path: str | Path, like: HopeCache, owner: dict[str, str]) -> HopeCache:
    """Read a state that `save_cache` wrote.

    Args:
        path: the file.
        like: a state of one sequence of the same model; names, shapes and dtypes must be as in it. Not modified.
        owner: what the file must belong to.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
            seen = int(metadata["seen"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise OSError(f"The session {path} cannot be read ({error}); give a file that save_session wrote.") from error
    if any(metadata.get(name) != value for name, value in owner.items()):
        raise ValueError(f"The session {path} is of a model with other weights; load it with the model that saved it.")
    expected = {name: tensor.shape for name, tensor in like.tensors().items()}
    batch = len(tensors.get("positions", ()))
    for name in sorted(set(expected) | set(tensors)):
        found = tuple(tensors[name].shape) if name in tensors else None
        wanted = (expected[name][0] * batch, *expected[name][1:]) if name in expected else None
        if found != wanted:
            raise ValueError(
                f"The session {path} has {name} {found}, but this model's is {wanted}; it is of another model."
            )
    cache = HopeCache(len(like.layers))
    cache.seen, cache.positions = seen, tensors["positions"]
    own = like.tensors()
    placed = {name: tensor.to(own[name]) for name, tensor in tensors.items()}
    cache.pending, cache.context = placed.get("pending"), placed.get("context")
    for number, layer in enumerate(cache.layers):
        layer.conv = placed[f"layers.{number}.conv"]
        layer.fast = FastWeights(placed[f"layers.{number}.running"], placed.get(f"layers.{number}.snapshot"))
    return cache
