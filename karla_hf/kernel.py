"""Small C kernels for the ternary linears and for the memory, built once with the local compiler.

`torch.ops.karla_hf.bitlinear` is the ternary linear as an operator, for graphs: with a gradient for its input, and in
torch operations where there is no kernel. A call of an operator costs more than a small kernel, so there is also
`torch.ops.karla_hf.address`, which tells where a C function lies; the modeling files look for both there. Without a
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
from karla_hf.modeling.fast_bitlinear_karla import DTYPES, FastBitLinear
from karla_hf.modeling.straight_through_karla import packed_input_gradient, packed_linear


logger = logging.getLogger(__name__)
FLAGS = ("-O3", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC")
# A library's sources, and its own flags. The ternary linears choose their instructions at run time, and no product may
# be fused with a sum: the torch path rounds both.
LIBRARIES = {
    "bitlinear": (("bitlinear.c", "bitlinear_x86.c", "ticks.c", "neurons.c"), ("-ffp-contract=off",)),
    "engram": (("engram.c",), ("-march=native",)),
}
HEADERS = ("bitlinear.h", "ticks.h")
SCHEMA = "bitlinear(Tensor x, Tensor packed, Tensor scale, float? eps) -> Tensor"
_library = torch.library.Library("karla_hf", "DEF")
_loaded: list[ctypes.CDLL] = []


def build(name: str, folder: Path | None = None) -> Path:
    """Compile a library if it is not there yet.

    Args:
        name: "bitlinear" or "engram".
        folder: where built kernels are kept; None takes karla-hf's cache.

    Returns:
        The shared library.

    Raises:
        RuntimeError: where there is no C compiler or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("no C compiler found; set CC to use one")
    names, flags = LIBRARIES[name]
    data = files("karla_hf") / "data"
    sources = {source: (data / source).read_bytes() for source in (*names, *HEADERS)}
    folder = folder or backbone_cache_dir().parent / "kernels"
    command = [compiler, *FLAGS, *flags]
    target = folder / f"{name}-{_fingerprint(sources, command)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as staging:
        built = Path(staging) / target.name
        for source, content in sources.items():
            (Path(staging) / source).write_bytes(content)
        command += [*(str(Path(staging) / source) for source in names), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} cannot build {name}: {done.stderr}")
        os.replace(built, target)
    return target


def register() -> None:
    """Build and load the kernels, register the operators, and log one line if torch has to run alone."""
    failures = []
    for name in LIBRARIES:
        try:
            _loaded.append(ctypes.CDLL(str(build(name))))
        except (RuntimeError, OSError) as error:
            failures.append(str(error))
    if failures:
        logger.info("Some C kernels are missing, so torch does their work: %s", "; ".join(dict.fromkeys(failures)))
    _define()


def _define() -> None:
    _library.define("address(str name) -> int")
    _library.impl("address", address, "CompositeExplicitAutograd")
    _library.define(SCHEMA)
    _library.impl("bitlinear", packed_linear, "CompositeExplicitAutograd")
    _library.impl("bitlinear", _bitlinear_on_cpu, "CPU")
    torch.library.register_fake("karla_hf::bitlinear", _fake_bitlinear, lib=_library)
    torch.library.register_autograd("karla_hf::bitlinear", _backward, setup_context=_keep_for_backward, lib=_library)


def address(name: str) -> int:
    """Where a C function lies; 0 if no kernel has it."""
    for library in _loaded:
        if hasattr(library, name):
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    return 0


def _bitlinear_on_cpu(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, eps: float | None = None
) -> torch.Tensor:
    if x.dtype in DTYPES and FastBitLinear.can_run(packed, scale):
        fast = FastBitLinear(packed, scale, eps)
        if x.numel() <= fast.max_elements:
            return fast(x)
    return packed_linear(x, packed, scale, eps)


def _fake_bitlinear(x, packed, scale, eps):
    return x.new_empty((*x.shape[:-1], 4 * packed.shape[0]))


def _keep_for_backward(ctx, inputs, output):
    x, packed, scale, ctx.eps = inputs
    ctx.save_for_backward(x, packed, scale)


def _backward(ctx, grad_y):
    x, packed, scale = ctx.saved_tensors
    return packed_input_gradient(grad_y, x, packed, scale, ctx.eps), None, None, None


def _fingerprint(sources: dict[str, bytes], command: list[str]) -> str:
    """Names a build: sources, command and processor."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), cpu)
    parts = (*sources.values(), " ".join(command).encode(), platform.machine().encode(), cpu.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
