"""A tiny Llama, a tokenizer whose words are its token ids, and a Karla on top of both."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from karla_hf import KarlaConfig, KarlaForCausalLM
from karla_hf.modeling import hashing_karla, table_karla, writing_karla
from karla_hf.modeling.engram_karla import Engram, new_engram
from karla_hf.modeling.hashing_karla import name_positions
from karla_hf.modeling.sentences_karla import BEGINS, BREAKS, ENDS, NO_TOKEN


VOCAB_SIZE = 300
SMALL = {
    "engram_rows_per_head": 500,
    "engram_cues": False,  # words of this vocabulary are no words of a language; `test_cues` has some that are
    "ctm_hidden_size": 64,
    "ctm_num_heads": 4,
    "ctm_num_neurons": 32,
    "ctm_num_pairs": 32,
    "ctm_num_self_pairs": 4,
    "ctm_stream_size": 64,
    "ctm_window": 8,
    "ctm_num_ticks": 3,
}


@pytest.fixture(scope="session")
def tokenizer():
    """Token 5 is written `w5` and token 205, which the memory takes for the same word, `W5`."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, 200)), *(f"W{i - 200}" for i in range(200, VOCAB_SIZE))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def words(tokenizer):
    """Function that writes token ids as a text that the tokenizer turns back into them."""

    def write(ids) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids]))

    return write


@pytest.fixture
def make_backbone():
    """Function that builds a random Llama whose predictions differ clearly from position to position."""

    def make(**options) -> LlamaForCausalLM:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": VOCAB_SIZE}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        defaults = {**sizes, **heads, **special, "tie_word_embeddings": True, "initializer_range": 0.1}
        return LlamaForCausalLM(LlamaConfig(**{**defaults, **options})).eval()

    return make


@pytest.fixture
def backbone_folder(make_backbone, tokenizer, tmp_path):
    """A saved backbone with its tokenizer."""
    folder = tmp_path / "backbone"
    make_backbone(intermediate_size=128).save_pretrained(folder)  # 4-bit blocks are 64 wide
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_karla(make_backbone, tokenizer):
    """Function that builds a Karla on a backbone (a random Llama unless given).

    A new head is silent; `speaks` gives the projections through which it speaks random weights.
    """

    def make(backbone=None, *, speaks=True, **options) -> KarlaForCausalLM:
        karla = KarlaForCausalLM.from_backbone(backbone or make_backbone(), tokenizer, **{**SMALL, **options})
        if speaks:
            for layer in karla.model.ctm.zero_initialised:
                nn.init.normal_(layer.weight, std=0.1)
        return karla

    return make


@pytest.fixture
def remember(tokenizer, words):
    """Function that makes a Karla read token ids [B, T], each row a text."""

    def read(karla, ids, pack="default"):
        return karla.read([words(row) for row in ids], tokenizer, pack=pack, progress=False)

    return read


@pytest.fixture
def random_ids():
    """Function that draws token ids [B, T] without the special ones."""

    def draw(batch, length) -> torch.Tensor:
        return torch.randint(2, VOCAB_SIZE, (batch, length))

    return draw


def boundaries() -> torch.Tensor:
    """Of fifty tokens, 48 ends a sentence where one of 20 to 39 follows, and 49 ends it in any case."""
    flags = torch.zeros(50, dtype=torch.uint8)
    flags[20:40], flags[48], flags[49] = BEGINS, ENDS, BREAKS | BEGINS
    return flags


@pytest.fixture(params=["C", "numpy"])
def kernels(request, monkeypatch):
    """Run a test with the C kernels of the memory, and without."""
    if request.param == "numpy":
        for module in (hashing_karla, table_karla, writing_karla):
            monkeypatch.setattr(module, "c_function", lambda name, arguments: None)
    elif not hasattr(torch.ops.karla_hf, "address"):
        pytest.skip("needs a C compiler")


@pytest.fixture(scope="session")
def make_engram():
    """Function that builds an empty memory for hidden states of 24 coordinates and 50 tokens, of `words` words."""

    def make(
        rows=1000, heads=3, head_dim=8, orders=(2, 3), weights=(0.4, 0.6), words=50, kind="ngram", **options
    ) -> Engram:
        config = KarlaConfig(
            text_config=LlamaConfig(hidden_size=24, num_attention_heads=1, vocab_size=50),
            engram_families=[{"kind": kind, "order": n, "weight": w} for n, w in zip(orders, weights, strict=True)],
            engram_num_heads=heads,
            engram_head_dim=head_dim,
            engram_rows_per_head=rows,
            **{f"engram_{name}": value for name, value in options.items()},
        )
        return new_engram(config, torch.arange(50) % words, boundaries(), pad_id=0)

    return make


@pytest.fixture(scope="session")
def name_text():
    """Function that names every position of one text of token ids: [T, F]."""

    def name(engram, ids) -> torch.Tensor:
        history = nn.functional.pad(torch.as_tensor(ids)[None], (engram.history, 0), value=NO_TOKEN)
        return name_positions(history, engram.families, engram.constants)[0]

    return name


@pytest.fixture
def karla(make_karla, remember, random_ids):
    """A Karla that speaks and has read; `karla.texts` [3, 40] is what it read."""
    model = make_karla()
    model.texts = random_ids(3, 40)
    remember(model, model.texts)
    return model


@pytest.fixture
def named(backbone_folder, make_karla, remember):
    """A Karla on a backbone that it knows by name; it speaks and has read."""
    karla = make_karla(str(backbone_folder))
    ids = torch.arange(2, 40)[None]
    remember(karla, ids)
    remember(karla, ids.flip(1), pack="second")
    return karla


@pytest.fixture
def saved(named, tokenizer, tmp_path):
    """The folder of a checkpoint of `named`."""
    folder = tmp_path / "karla"
    named.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
