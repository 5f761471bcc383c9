"""Samples of a causal language model that depend on their own seed only, not on what else is in the batch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from karla_hf.pope_problems import Prompt


VALUES_PER_TENSOR = 4096  # of each tensor in a fingerprint


class Sampler(Protocol):
    """What a pass needs of a model; `ModelSampler` is one, and a client of a server can be another."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON data, model and settings included, on which the samples depend."""

    @property
    def batch_size(self) -> int:
        """Sequences that are worth generating at once."""

    def check(self, prompts: Sequence[Prompt], names: Sequence[str]) -> None:
        """Raise ValueError if a prompt is too long, calling it by its name."""

    def __call__(self, prompts: Sequence[Prompt], num_samples: int, keys: Sequence[str]) -> list[list[str]]:
        """Give `num_samples` completions of each prompt; the same key gives the same completions."""


class ModelSampler:
    """Samples completions with `model.generate`, in batches, from any causal language model.

    Sample j of a key follows its own random numbers u_t in [0, 1): token t is the first whose cumulative probability
    exceeds u_t. So what is in a batch, and in which order, changes nothing but rounding. A prompt is read once for all
    its samples.

    Args:
        model: a causal language model, a Karla with its ticks and memory too. Its mode and settings stay as they are.
        tokenizer: its tokenizer; it needs a chat template if prompts are messages.
        max_new_tokens: longest completion.
        temperature: above 0.
        top_p: share of the probability to sample from, above 0 and up to 1.
        top_k: number of tokens to sample from; 0 for all.
        seed: other seeds give other samples.
        batch_size: sequences generated at once.
        name: what to call the model; None takes the name it was loaded by.
        revision: its revision; None takes the commit it was loaded from.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        batch_size: int = 64,
        name: str | None = None,
        revision: str | None = None,
    ):
        checks = (("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
                  ("temperature", temperature, temperature > 0, "a number above 0"),
                  ("top_p", top_p, 0 < top_p <= 1, "a share above 0, up to 1"),
                  ("top_k", top_k, top_k >= 0, "0 for all tokens, or more"),
                  ("batch_size", batch_size, batch_size >= 1, "1 or more"))  # fmt: skip
        for option, value, right, allowed in checks:
            if not right:
                raise ValueError(f"`{option}` is {value}; give {allowed}.")
        self.model, self.tokenizer, self._batch_size = model, tokenizer, batch_size
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                                         "top_k": top_k, "seed": seed}  # fmt: skip
        self.name = model.config.name_or_path if name is None else name
        self.revision = getattr(model.config, "_commit_hash", None) if revision is None else revision

    @property
    def batch_size(self) -> int:
        """Sequences generated at once."""
        return self._batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """Model, as it is now, and settings."""
        fingerprint = model_fingerprint(self.model)
        return {"model": self.name, "revision": self.revision, "fingerprint": fingerprint, **self.settings}

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, as `trl.GRPOTrainer` makes them."""
        if isinstance(prompt, str):
            return self.tokenizer(text=prompt)["input_ids"]
        if self.tokenizer.chat_template is None:
            raise ValueError(f"The tokenizer of {self.name} has no chat template; give prompts as plain texts.")
        out: Any = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return out["input_ids"]

    def check(self, prompts: Sequence[Prompt], names: Sequence[str]) -> None:
        """Raise ValueError if a prompt is empty, or too long for the model, calling it by its name."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new = self.settings["max_new_tokens"]
        for prompt, name in zip(prompts, names, strict=True):
            length = len(self.encode(prompt))
            if not length:
                raise ValueError(f"The prompt of {name} has no tokens; write words there.")
            if limit is not None and length + new > limit:
                raise ValueError(
                    f"The prompt of {name} has {length:,} tokens, which with {new:,} new ones is more than the {limit:,} "
                    "positions of the model; give shorter prefixes, fewer new tokens, or leave the problem out."
                )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], num_samples: int, keys: Sequence[str]) -> list[list[str]]:
        """Sample completions.

        Args:
            prompts: texts or chat messages.
            num_samples: completions per prompt.
            keys: a name for each prompt's random numbers.

        Returns:
            For each prompt its completions, without special tokens.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths side by side
        done: dict[int, list[str]] = {i: [] for i in order}
        at_once, per_prompt = max(1, self.batch_size // num_samples), min(num_samples, self.batch_size)
        was_training, settings = self.model.training, self.model.generation_config
        self.model.eval()
        try:
            self.model.generation_config = GenerationConfig()  # generate() would mix the checkpoint's into its own
            for at in range(0, len(order), at_once):
                batch = order[at : at + at_once]
                for first in range(0, num_samples, per_prompt):
                    samples = range(first, min(first + per_prompt, num_samples))
                    uniforms = torch.cat([self._uniforms(keys[i], samples) for i in batch])
                    texts = self._generate([ids[i] for i in batch], uniforms, settings)
                    for place, i in enumerate(batch):
                        done[i] += texts[place * len(samples) : (place + 1) * len(samples)]
        finally:
            self.model.generation_config = settings
            self.model.train(was_training)
        return [done[i] for i in range(len(ids))]

    def _uniforms(self, key: str, samples: range) -> torch.Tensor:
        """Random numbers [len(samples), max_new_tokens] float64 in [0, 1), on the CPU so that they are the same everywhere."""
        rows = []
        for sample in samples:
            seed = hashlib.sha256(f"{self.settings['seed']}/{sample}/{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
            rows.append(torch.rand(self.settings["max_new_tokens"], generator=generator, dtype=torch.float64))
        return torch.stack(rows)

    def _generate(self, prompts: list[list[int]], uniforms: torch.Tensor, settings: GenerationConfig) -> list[str]:
        repeats, width = len(uniforms) // len(prompts), max(map(len, prompts))
        ends = _end_tokens(settings, self.tokenizer)
        pad = next((i for i in (self.tokenizer.pad_token_id, *ends) if i is not None), 0)
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
        options = {"do_sample": False, "pad_token_id": pad, "eos_token_id": ends or None}
        cache = None
        if repeats > 1 and min(map(len, prompts)) > 1:  # read all but the last token once, for all samples
            read = GenerationConfig(**options, max_new_tokens=1, return_dict_in_generate=True)
            cache = generate(ids[:, :-1], attention_mask=mask[:, :-1], generation_config=read).past_key_values
            cache.batch_repeat_interleave(repeats)
        out = generate(
            ids.repeat_interleave(repeats, 0),
            attention_mask=mask.repeat_interleave(repeats, 0),
            past_key_values=cache,
            generation_config=GenerationConfig(**options, max_new_tokens=self.settings["max_new_tokens"]),
            logits_processor=self._processors(uniforms.to(device), width),
        )
        completions = [_until(row, ends) for row in out[:, width:].tolist()]
        return self.tokenizer.batch_decode(completions, skip_special_tokens=True)

    def _processors(self, uniforms: torch.Tensor, start: int) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self.settings["temperature"] != 1:
            processors.append(TemperatureLogitsWarper(float(self.settings["temperature"])))
        if self.settings["top_k"]:
            processors.append(TopKLogitsWarper(self.settings["top_k"]))
        if self.settings["top_p"] < 1:
            processors.append(TopPLogitsWarper(self.settings["top_p"]))
        processors.append(_InverseCdf(uniforms, start))
        return processors


class _InverseCdf(LogitsProcessor):
    """Leaves the one token that the row's next random number chooses."""

    def __init__(self, uniforms: torch.Tensor, start: int):
        self.uniforms, self.start = uniforms, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.float().softmax(-1).double().cumsum(-1)
        wanted = self.uniforms[:, input_ids.shape[1] - self.start, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, wanted, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash by which a model with other weights, options or memory is told apart from this one.

    Covers the configuration, up to 4,096 values of every parameter, evenly spread, and what the memory of a
    Karla has read.

    Args:
        model: any model. Not modified.

    Returns:
        16 hexadecimal digits.
    """
    state = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("transformers_version",)}
    state.update(repr(sorted((key, str(value)) for key, value in config.items() if not key.startswith("_"))).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: -(-values.numel() // VALUES_PER_TENSOR) or 1].contiguous().cpu()
        state.update(f"{name} {some.dtype} {tuple(parameter.shape)}".encode())
        state.update(some.view(torch.uint8).numpy().tobytes())
    engram = getattr(model, "engram", None)
    if engram is not None:
        state.update(repr([(name, pack.num_owned, pack.tokens) for name, pack in engram.packs.items()]).encode())
        state.update(str(engram.enabled).encode())
    return state.hexdigest()[:16]


def _end_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion, as `trl.GRPOTrainer` takes them: the model's and the tokenizer's."""
    own = settings.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    end = tokenizer.eos_token_id
    return ends if end is None or end in ends else [end, *ends]


def _until(row: list[int], ends: list[int]) -> list[int]:
    """The tokens before the first that ends the completion."""
    return row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
