"""Where compiled functions come from: the C kernels that the `karla_hf` package builds, if it is installed and could."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint64}


@functools.cache
def c_function(name: str, arguments: str) -> Callable[..., None] | None:
    """A C function that returns nothing, or None where there is no kernel.

    Args:
        name: of the function.
        arguments: a letter for each: p for a pointer, i for an int64, u for a uint64.
    """
    if not hasattr(torch.ops.karla_hf, "address"):
        return None
    return ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in arguments))(torch.ops.karla_hf.address(name))


@functools.cache
def c_integers(*values: int) -> ctypes.Array:
    """The values as an array of int64 that a C function can read."""
    return (ctypes.c_int64 * len(values))(*values)
