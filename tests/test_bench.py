import json
import math

import pytest

from karla_hf import bench
from karla_hf.figures import draw_baselines, draw_forgetting


QUALITY = """
def run():
    rows = {"a": {"recall": 3, "perplexity": 1.5}, "b": {"recall": 1200, "perplexity": float("nan")}}
    return {"rows": rows, "more": 1}

def draw(result, path):
    path.write_text(str(result["more"]))
"""
TIMING = """
from karla_hf.bench import Result, Row

def rows():
    yield Row("nothing", 1, "calls", lambda: None, "nothing too", lambda: None)
    yield Result("kept", 19, "facts", "before", 20)
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "BENCH_FOLDER", tmp_path)
    (tmp_path / "bench_quality.py").write_text(QUALITY)
    (tmp_path / "bench_timing.py").write_text(TIMING)
    return tmp_path


def test_a_bench_of_qualities_is_shown_written_and_drawn(folder, capsys):
    (result,) = bench.run_bench(["quality"], json=folder / "out.json")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("bench quality", "recall", "1,200", "1.50"))
    written = json.loads((folder / "out.json").read_text())
    assert written["rows"] == {"a": {"recall": 3, "perplexity": 1.5}, "b": {"recall": 1200, "perplexity": None}}
    assert written["more"] == 1
    assert written["bench"] == "quality"
    assert "versions" in written
    assert math.isnan(result["rows"]["b"]["perplexity"])
    assert (folder / "out-quality.png").read_text() == "1"


def test_both_kinds_of_benches_run_in_one_call(folder, capsys):
    results = bench.run_bench(["all"], rounds=1)
    assert [result["bench"] for result in results] == ["quality", "timing"]
    assert results[1]["rows"]["nothing"]["peer"] == "nothing too"
    kept = {"value": 19, "unit": "facts", "peer": "before", "peer_value": 20, "ratio": 0.95}
    assert results[1]["rows"]["kept"] == kept
    assert not list(folder.glob("*.png")), "a figure without --json"


def test_every_bench_defines_rows_or_run():
    names = bench.bench_names()
    assert {"decode", "read"} <= set(names)
    for name in names:
        module = bench.load_bench(name)
        assert hasattr(module, "rows") != hasattr(module, "run"), name


def test_figures_of_qualities_are_drawn(tmp_path):
    row = {"recall": 3, "re-read": 1.2, "unrelated": 30.0, "seconds": 4.0}
    draw_baselines({"Karla, one reading": row, "kNN-LM": row}, 40, tmp_path / "a.png")
    matrices = {"bare backbone": [[9.0, 9.0, 9.0]], "Karla": [[1.0, math.nan, 9.0], [1.0, 1.0, 9.0]]}
    draw_forgetting(matrices, ["x", "y", "unrelated"], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
