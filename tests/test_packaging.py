"""What is installed and what the Hub's remote-code loader gets: the wheel, the editable install, the rules of modeling/."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import karla_hf


ROOT = Path(__file__).parent.parent
MODELING = sorted((ROOT / "modeling").glob("*.py"))
PACKAGE = sorted(
    p for p in (ROOT / "karla_hf").rglob("*.py") if "modeling" not in p.relative_to(ROOT / "karla_hf").parts
)
HUB_DEPENDENCIES = {
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "huggingface_hub",
}  # the last two come with transformers

each_modeling_file = pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)


def run_python(code: str, *arguments: str) -> str:
    """Run code with this interpreter from / (so that no source tree is on the path) and return what it prints."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    finished = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def imports_in(path: Path, *, inside_functions: bool = True) -> list[ast.Import | ast.ImportFrom]:
    """List the import statements of a file, those inside functions too unless told otherwise."""
    found: list[ast.Import | ast.ImportFrom] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), filename=path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting.extend(ast.iter_child_nodes(node))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: a build in the source tree would reuse whatever an earlier one left in build/."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, source)
    for name in ("karla_hf", "modeling"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (built,) = dist.glob("karla_hf-*.whl")
    return built


def test_wheel_holds_every_source_file_once(wheel):
    expected = [f"karla_hf/modeling/{path.name}" for path in MODELING]
    expected += [path.relative_to(ROOT).as_posix() for path in PACKAGE]
    expected += [path.relative_to(ROOT).as_posix() for path in (ROOT / "karla_hf" / "data").iterdir()]
    expected += ["karla_hf/py.typed", "karla_hf/model_card.md"]
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected)


def test_wheel_holds_the_template_of_the_card(wheel):
    assert zipfile.ZipFile(wheel).read("karla_hf/model_card.md") == (ROOT / "model_card.md").read_bytes()


def test_wheel_metadata_names_version_licence_and_command(wheel):
    files = zipfile.ZipFile(wheel)
    info = f"karla_hf-{karla_hf.__version__}.dist-info"
    metadata = files.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {karla_hf.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "karla = karla_hf.cli:main" in files.read(f"{info}/entry_points.txt").decode()
    assert files.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_installed_wheel_imports_away_from_the_source_tree(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    code = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
import karla_hf
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), module.__file__
print(karla_hf.__version__)
"""
    names = [f"karla_hf.modeling.{path.stem}" for path in MODELING if path.stem != "__init__"]
    assert run_python(code, str(tmp_path), "karla_hf", "karla_hf.modeling", *names) == karla_hf.__version__


def test_editable_install_imports_from_another_directory():
    code = "import karla_hf, karla_hf.modeling as m, os; print(os.path.realpath(karla_hf.__file__), os.path.realpath(m.__file__))"
    expected = [ROOT / "karla_hf" / "__init__.py", ROOT / "modeling" / "__init__.py"]
    assert run_python(code).split() == [str(path) for path in expected], "run `make setup`, or `pip install -e .`"


def test_symlink_shows_the_top_level_folder():
    assert os.readlink(ROOT / "karla_hf" / "modeling") == "../modeling"


@each_modeling_file
def test_hub_loader_finds_every_relative_import(path):
    """The loader looks for `from .name import` with a regular expression; it must see exactly what Python sees."""
    siblings = {sibling.stem for sibling in MODELING}
    needed = set()
    for node in imports_in(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            statement = ast.unparse(node)
            assert (node.level, node.module in siblings) == (1, True), (
                f"{statement!r}: write `from .name import thing`"
            )
            needed.add(node.module)
    assert set(get_relative_imports(path)) == needed


@each_modeling_file
def test_no_text_line_looks_like_a_relative_import(path):
    statements = {node.lineno for node in imports_in(path) if isinstance(node, ast.ImportFrom)}
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    found = [(number, line) for number, line in lines if re.match(r"\s*(from|import)\s+\.", line)]
    assert [line for number, line in found if number not in statements] == []


@each_modeling_file
def test_hub_files_ask_only_for_hub_dependencies(path):
    """The loader demands each import, in functions too, that is not in `try` or under `if is_..._available()`."""
    demanded = set(get_imports(path)) - set(sys.stdlib_module_names)
    assert demanded <= HUB_DEPENDENCIES | {"tokenizers"}, "not installed by transformers"


@each_modeling_file
def test_optional_dependencies_are_imported_inside_functions(path):
    absolute = []
    for node in imports_in(path, inside_functions=False):
        if isinstance(node, ast.Import):
            absolute += [alias.name for alias in node.names]
        elif not node.level:
            absolute.append(node.module or "")
    assert {name.partition(".")[0] for name in absolute} - set(sys.stdlib_module_names) <= HUB_DEPENDENCIES


def test_reference_code_is_imported_by_tests_only():
    shipped = [path for path in MODELING + PACKAGE if not path.name.startswith("reference_")]
    statements = [(path.name, ast.unparse(node)) for path in shipped for node in imports_in(path)]
    assert [pair for pair in statements if "reference_" in pair[1]] == []


@pytest.mark.parametrize("path", MODELING + PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_stay_within_their_budget_of_lines(path):
    budget = 450 if path.name.startswith("modeling_") else 300
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= budget, f"{path.name} has {lines} lines, {budget} are allowed: split it by purpose"
