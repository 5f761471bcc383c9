"""A small HOPE model over a random encoder: what its tests share."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from karla_hf import HopeConfig, HopeForCausalLM


CHUNK = 8
VOCAB_SIZE = 50
ENCODER = {
    "model_type": "bert",
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.3,
}
SIZES = {
    "encoder_config": ENCODER,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "chunk_size": CHUNK,
    "snapshot_periods": [8, 16],
    "level_sizes": [24, 16],
    "level_periods": [1, 4],
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make_hope(dtype=torch.float64, **options) -> HopeForCausalLM:
    """A random model whose encoder's context counts, and whose predictions differ clearly between positions."""
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(**{**SIZES, **options}))
    if model.config.encoder_context != "none":
        torch.nn.init.normal_(model.model.slow.gate)
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 45, seed: int = 1) -> torch.Tensor:
    """Random token ids [B, T] without padding or start tokens."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, ids, cuts, mask=None):
    """Logits and final cache of a sequence that is given in pieces."""
    cache, logits = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {letter: number for number, letter in enumerate("_^$ abcdefghijklmnopqrstuvwxyz0123456789.,;:-")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="_")
