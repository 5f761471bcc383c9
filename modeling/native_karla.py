"""Where compiled functions come from: the C kernels that the `karla_hf` package builds, if it is installed and could."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint64, "d": ctypes.c_double}


@functools.cache
def c_function(name: str, arguments: str, result: str | None = None) -> Callable | None:
    """A C function, or None where there is no kernel.

    Args:
        name: of the function.
        arguments: a letter for each: p for a pointer, i for an int64, u for a uint64, d for a double.
        result: the letter of what it returns; None if it returns nothing.
    """
    address = torch.ops.karla_hf.address(name) if hasattr(torch.ops.karla_hf, "address") else 0
    if not address:
        return None
    types = (_TYPES[letter] for letter in arguments)
    return ctypes.CFUNCTYPE(None if result is None else _TYPES[result], *types)(address)


@functools.cache
def c_integers(*values: int) -> ctypes.Array:
    """The values as an array of int64 that a C function can read."""
    return (ctypes.c_int64 * len(values))(*values)
