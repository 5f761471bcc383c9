"""Damaged facts, rows, recipes, indices of weights and histories."""

import json

import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json, damaged_text, values
from sandbox import cases

from karla_hf.arguments import parse_recipe
from karla_hf.corpora import _read_rows
from karla_hf.facts import read_facts
from karla_hf.line_editor import _read_history
from karla_hf.modeling.weights_karla import check_weights


FACTS = [
    {"prompt": "The mill of Brivo was founded on", "answer": "3 May 1811.", "form": "date"},
    {"prompt": "Ω\u2028x ", "answer": "Kelo"},
]
ROWS = [{"text": "The mill."}, {"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "x"}]}]
INDEX = {
    "metadata": {"total_size": 9},
    "weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}
RECIPE = {
    "model_name_or_path": "someone/model",
    "dataset_name": "python-reference",
    "bf16": False,
    "learning_rate": 1e-3,
    "max_steps": 5,
    "backbone_quantization": "nf4",
    "ctm_num_ticks": 4,
    "output_dir": "out",
    "held_out_share": 0.1,
}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
YAML = [
    BOMB,
    BOMB + "dataset_files: *a11\n",
    BOMB.replace("\na", "\nx") + "backbone_quantization: {x: *a11}\n",
    "dataset_files: &a [*a]\n",
    "model_name_or_path: !!python/object/apply:os.system ['true']\n",
    "? [a, b]\n: c\n",
    "[" * 5000,
    "a: " * 3000,
    "- " * 5000 + "x",
    "{" * 4000 + "}" * 4000,
    "%YAML 9.9\n---\na: b\n",
    "a: b\n---\nc: d\n",
    "max_steps: 0x" + "f" * 5000,
    "max_steps: 1" + "0" * 5000,
    "learning_rate: .nan\n",
    "max_steps: 190:20:30\n",
    "date: 2001-99-99\n",
    "<<: [1, 2]\n",
    "<<: {model_name_or_path: x}\n",
    "\tmax_steps: 1\n",
    "max_steps: 5\nmax_steps: 6\n",
    "x: !!binary not base64\n",
    "x: !!timestamp 2001-13-45 99:99:99\n",
    "x: !!set {a, b}\nmax_steps: !!omap [a: 1]\n",
]


def lines_of(data, rows: list[dict]) -> bytes:
    """JSON Lines of which one is damaged."""
    lines = [json.dumps(row).encode() for row in rows]
    lines[data.draw(st.integers(0, len(lines) - 1))] = data.draw(damaged_text(data.draw(st.sampled_from(rows))))
    content = data.draw(st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"])).join(lines)
    return content if data.draw(st.integers(0, 4)) else data.draw(damaged_bytes(content))


def test_file_of_every_kind(sandbox):
    sandbox.folder.mkdir(exist_ok=True)
    path = sandbox.folder / "file"

    @cases(300)
    @given(data=st.data())
    def facts(data):
        path.write_bytes(lines_of(data, FACTS))
        sandbox.run(lambda: read_facts(path))

    @cases(200)
    @given(data=st.data())
    def rows(data):
        path.with_suffix(".jsonl").write_bytes(lines_of(data, ROWS))
        sandbox.run(lambda: _read_rows(path.with_suffix(".jsonl")))

    @cases(100)
    @given(data=st.data())
    def history(data):
        path.write_bytes(lines_of(data, [{"a": 1}, "/read x"]))
        sandbox.run(lambda: _read_history(path))

    facts()
    rows()
    history()


@cases(200)
@given(data=st.data())
def test_index_of_weights(data, sandbox):
    sandbox.folder.mkdir(exist_ok=True)
    for name in INDEX["weight_map"].values():
        (sandbox.folder / name).write_bytes(b"")
    path = sandbox.folder / "model.safetensors.index.json"
    path.write_bytes(data.draw(damaged_text(INDEX)))
    if sandbox.run(lambda: check_weights(sandbox.folder)) is None:
        named = json.loads(path.read_bytes())["weight_map"].values()
        assert all((sandbox.folder / name).parent == sandbox.folder for name in named)


@cases(250)
@given(data=st.data())
def test_recipe(data, sandbox):
    sandbox.folder.mkdir(exist_ok=True)
    path = sandbox.folder / "recipe.yaml"
    kind = data.draw(st.integers(0, 5))
    if kind < 3:
        text = yaml.safe_dump(data.draw(damaged_json(RECIPE)))
    elif kind == 3:
        text = yaml.safe_dump({**RECIPE, data.draw(st.sampled_from(list(RECIPE))): data.draw(values)})
    elif kind == 4:
        text = data.draw(st.sampled_from(YAML)) + yaml.safe_dump(RECIPE) * data.draw(st.integers(0, 1))
    else:
        text = data.draw(damaged_bytes(yaml.safe_dump(RECIPE).encode())).decode("latin-1")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    sandbox.run(lambda: parse_recipe(path))
