"""The constants file of a memory: what its names depend on, and what tokens look like."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .files_karla import DamagedError
from .hashing_karla import NameConstants, NgramFamily
from .words_karla import Lexicon


_COLUMNS = {"multipliers": "<i8", "token_map": "<i8", "boundaries": "u1", "pad_id": "<i8", "orders": "<i8", "weights": "<f8",
            "sentences": "u1"}  # fmt: skip
_TEXTS = {"token_texts": "u1", "token_text_ends": "<i8", "reply_marker": "<i8"}
MOST_FAMILIES = 64
MOST_ORDER = 1024


def read_constants(
    tensors: Mapping[str, np.ndarray], hidden_size: int, width: int
) -> tuple[NameConstants, list[NgramFamily], Lexicon | None]:
    """Check the arrays of a constants file, since C reads them without looking, and take copies.

    Args:
        tensors: arrays by name.
        hidden_size: D.
        width: coordinates of a row.

    Raises:
        DamagedError: if an array is missing, of another kind, or does not fit the others.
    """
    texts = _TEXTS if "token_texts" in tensors else {}
    t = {name: _column(tensors, name, dtype) for name, dtype in {**_COLUMNS, **texts}.items()}
    vocabulary, families = len(t["token_map"]), len(t["orders"])
    if not 1 <= families <= MOST_FAMILIES or width > hidden_size:
        raise DamagedError(f"it has {families} families with rows of {width} for {hidden_size} coordinates")
    if len(t["weights"]) != families or len(t["sentences"]) != families or len(t["pad_id"]) != 1:
        raise DamagedError("its families do not have one order, weight and kind each")
    longest = min(len(t["multipliers"]), MOST_ORDER)
    if t["orders"].min() < 1 or t["orders"].max() > longest:
        raise DamagedError(f"it has orders {t['orders'].tolist()} and {len(t['multipliers'])} multipliers")
    if not (np.isfinite(t["weights"]).all() and (t["weights"] > 0).all()):
        raise DamagedError(f"it has weights {t['weights'].tolist()}")
    if len(t["boundaries"]) != vocabulary or not vocabulary or t["token_map"].min() < 0:
        raise DamagedError("its token map and its boundaries do not fit each other")
    lexicon = None
    if texts:
        ends = t["token_text_ends"]
        if len(ends) != vocabulary or ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > len(t["token_texts"]):
            raise DamagedError("the texts of its tokens do not fit their ends")
        lexicon = Lexicon.from_arrays(t)
    arrays = {name: torch.from_numpy(t[name].copy()) for name in ("multipliers", "token_map", "boundaries")}
    columns = (t[name].tolist() for name in ("orders", "weights", "sentences"))
    named = [NgramFamily(order, weight, bool(flag)) for order, weight, flag in zip(*columns, strict=True)]
    return NameConstants(**arrays, pad_id=int(t["pad_id"][0])), named, lexicon


def _column(tensors: Mapping[str, np.ndarray], name: str, dtype: str) -> np.ndarray:
    if name not in tensors:
        raise DamagedError(f"it has no {name}")
    if tensors[name].ndim != 1 or tensors[name].dtype != np.dtype(dtype):
        raise DamagedError(f"its {name} is {tensors[name].dtype} with {tensors[name].ndim} axes")
    return tensors[name]
