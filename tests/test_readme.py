"""The README's code runs as it stands, and its map names files that exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import karla_hf


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in SHELL for line in block.splitlines() if line.startswith("karla ")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_the_python_blocks_run_one_after_the_other(workplace):
    assert len(PYTHON) == 2
    names: dict = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), names)
    assert "Orla Venn" in names["tokenizer"].decode(names["answer"][0])


def test_the_commands_run_one_after_the_other(workplace):
    assert len(COMMANDS) == 5
    karla = Path(sys.executable).with_name("karla")
    for command in COMMANDS:
        done = subprocess.run([karla, *shlex.split(command)[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_file_and_recipe_named_exists():
    paths = re.findall(r"`((?:modeling|karla_hf|recipes|tests)/[\w./-]*)`", README)
    paths += re.findall(r"\]\(([\w./-]+\.md)\)", README)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", karla_hf.__all__)
def test_every_public_name_is_documented(name):
    prose = README + (ROOT / "modeling" / "README.md").read_text(encoding="utf-8")
    assert name in prose
