"""Six documents of six kinds, one after another: the forgetting matrix of a HOPE that learns, and of two others.

Needs the HOPE that `karla train recipes/hope-minilm/python-docs.yaml` makes.
"""

from pathlib import Path

from karla_hf.bench import load_bench
from karla_hf.continual import first_tokens
from karla_hf.documents import unrelated_text
from karla_hf.figures import draw_forgetting
from karla_hf.hope_checkpoints import load_hope
from karla_hf.hope_continual import compare_hope_streams


FOLDER = Path("outputs/hope-python-docs")
TOKENS = 320


def run():
    """Perplexities of all documents read so far after each of them."""
    if not FOLDER.is_dir():
        raise FileNotFoundError(
            f"There is no trained HOPE in {FOLDER}; make it with `karla train recipes/hope-minilm/python-docs.yaml`."
        )
    model, tokenizer = load_hope(FOLDER)
    continual = load_bench("continual")
    cut = {title: first_tokens(text, tokenizer, TOKENS) for title, text in continual.documents().items()}
    others = [first_tokens(text, tokenizer, TOKENS) for text in continual.development()]
    return compare_hope_streams(model, tokenizer, cut, first_tokens(unrelated_text(), tokenizer, TOKENS), others)


def draw(result, path):
    """Heat maps, one for each method."""
    draw_forgetting(result["matrices"], result["titles"], path)
