"""Small C kernels for the ternary linears of decoding and for the memory, built once with the local compiler.

They are registered as `torch.ops.karla_hf.bitlinear` and, since a lookup costs less than the call of an operator, as
`torch.ops.karla_hf.address`, which tells where a C function lies; the modeling files look for them there. Without a
compiler, or off the CPU, they use torch and numpy alone, with the same results.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from karla_hf.backbones import backbone_cache_dir


logger = logging.getLogger(__name__)
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC")
_library = torch.library.Library("karla_hf", "DEF")


def build(name: str, folder: Path | None = None) -> Path | None:
    """Compile a kernel if it is not there yet.

    Args:
        name: "bitlinear" or "engram".
        folder: where built kernels are kept; None takes karla-hf's cache.

    Returns:
        The shared library, or None where there is no C compiler or it fails; the reason is logged.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.info("No C compiler found, so %s runs in torch alone; set CC to use one.", name)
        return None
    source = files("karla_hf") / "data" / f"{name}.c"
    folder = folder or backbone_cache_dir().parent / "kernels"
    target = folder / f"{name}-{_fingerprint(source.read_bytes(), compiler)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as staging:
        path, built = Path(staging) / f"{name}.c", Path(staging) / f"{name}.so"
        path.write_bytes(source.read_bytes())
        done = subprocess.run(
            [compiler, *FLAGS, str(path), "-o", str(built), "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            logger.info("%s cannot build the kernel %s, so torch runs alone: %s", compiler, name, done.stderr)
            return None
        os.replace(built, target)
    return target


def register() -> None:
    """Build the kernels and register those that can be built."""
    _register_bitlinear(build("bitlinear"))
    _register_engram(build("engram"))


def _register_engram(path: Path | None) -> None:
    if path is None:
        return
    library = ctypes.CDLL(str(path))

    def address(name: str) -> int:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0

    _library.define("address(str name) -> int")
    _library.impl("address", address, "CompositeExplicitAutograd")


def _register_bitlinear(path: Path | None) -> None:
    if path is None:
        return
    function = ctypes.CDLL(str(path)).karla_bitlinear
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    real, small = ctypes.c_double, ctypes.c_float
    function.argtypes = [pointer, pointer, pointer, real, small, size, size, size, pointer]
    function.restype = None

    def bitlinear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, eps: float, floor: float) -> torch.Tensor:
        x = x.contiguous()
        width, out_features = x.shape[-1], codes.shape[0]
        y = x.new_empty(*x.shape[:-1], out_features)
        rows = x.numel() // width
        function(x.data_ptr(), codes.data_ptr(), scale.data_ptr(), eps, floor, rows, width, out_features, y.data_ptr())
        return y

    _library.define("bitlinear(Tensor x, Tensor codes, Tensor scale, float eps, float floor) -> Tensor")
    _library.impl("bitlinear", bitlinear, "CPU")
    torch.library.register_fake(
        "karla_hf::bitlinear", lambda x, codes, scale, eps, floor: x.new_empty(*x.shape[:-1], codes.shape[0])
    )


def _fingerprint(source: bytes, compiler: str) -> str:
    """Names a build: source, flags, compiler and processor."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), cpu)
    parts = (source, " ".join(FLAGS).encode(), compiler.encode(), platform.machine().encode(), cpu.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
