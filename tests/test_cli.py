import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import OPTIONS, files_in, make_backbone, make_tokenizer, save_backbone, save_karla
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import karla_hf
from karla_hf import cli
from karla_hf.checkpoints import load_checkpoint, save_tokenizer
from karla_hf.facts import make_facts, write_facts


FACTS = make_facts(6)
SETTINGS = [part for key, value in OPTIONS.items() for part in ("--set", f"{key}={value}")]


def run(*arguments: object, **options):
    """Run `karla` in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


def succeed(*arguments: object, **options) -> str:
    """Run `karla`, see that it succeeds, and return what it prints."""
    result = run(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    """Run `karla`, see that it fails with exactly one sentence, and return the sentence."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert result.stderr.endswith(f"{line}\n")
    sentence = line.partition("Error: ")[2]
    assert sentence.endswith((".", "?"))
    assert "Traceback" not in result.stderr
    return sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Backbone, a Karla that has read nothing, one that has read, and texts; not to be changed."""
    root = tmp_path_factory.mktemp("cli")
    save_karla(root / "fresh", save_backbone(root / "backbone"))
    write_facts(FACTS, root / "facts.jsonl")
    (root / "facts.txt").write_text("\n\n".join(fact.text for fact in FACTS), encoding="utf-8")
    (root / "story.txt").write_text("The ferry leaves Brivo at seven. " * 9, encoding="utf-8")
    shutil.copytree(root / "fresh", root / "read")
    succeed("read", root / "read", root / "facts.txt", "--pack", "facts", "--lines")
    return root


@pytest.fixture
def karla(folder, tmp_path) -> Path:
    """A copy of the Karla that has read."""
    return Path(shutil.copytree(folder / "read", tmp_path / "karla"))


@contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_command_explains_itself():
    shown = succeed("--help")
    for words in (
        ["new"], ["info"], ["chat"], ["ui"], ["serve"], ["read"], ["forget"], ["packs"], ["eval"], ["eval", "recall"], ["eval", "perplexity"],
        ["eval", "reasoning"], ["bench"], ["demo"], ["train"], ["pack"], ["pack", "list"], ["pack", "export"], ["pack", "import"],
        ["pack", "merge"], ["pack", "remove"], ["pack", "verify"], ["pack", "push"], ["pack", "pull"], ["push"], ["pull"],
        ["card"], ["pope"], ["pope", "difficulty"], ["pope", "prefix"], ["pope", "build"], ["pope", "eval"],
    ):  # fmt: skip
        assert f" {words[0]} " in shown
        text = succeed(*words, "--help")
        assert f"Usage: karla {' '.join(words)} [OPTIONS]" in text
    assert run().stdout.strip() == shown.strip()
    assert succeed("--version") == f"karla-hf {karla_hf.__version__}\n"


def test_every_command_that_measures_writes_json():
    for words in (
        ["info"],
        ["read"],
        ["packs"],
        ["pack", "list"],
        ["pack", "verify"],
        ["eval", "recall"],
        ["eval", "perplexity"],
        ["eval", "reasoning"],
        ["bench"],
        ["demo"],
        ["train"],
        ["pope", "difficulty"],
        ["pope", "prefix"],
        ["pope", "build"],
        ["pope", "eval"],
    ):
        assert " --json " in succeed(*words, "--help")


def test_the_command_line_itself_needs_no_torch():
    """Without the package's own __init__, which imports the models for everyone who writes `import karla_hf`."""
    code = """
import sys, types
package = types.ModuleType("karla_hf")
package.__path__ = [sys.argv.pop(1)]
sys.modules["karla_hf"] = package
from karla_hf.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "transformers", "trl"} & set(sys.modules)
"""
    place = str(Path(karla_hf.__file__).parent)
    finished = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert "Usage: karla [OPTIONS] COMMAND" in finished.stdout


def test_the_installed_command_runs(folder):
    command = Path(sys.executable).parent / "karla"
    finished = subprocess.run([command, "packs", folder / "none"], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout) == (1, "")
    wanted = f"Error: {folder / 'none'} is no folder; give a folder that `karla new` or `save_pretrained` made.\n"
    assert finished.stderr.endswith(wanted)


def test_new_makes_a_karla_that_a_relative_backbone_path_does_not_tie_to_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    shown = succeed("new", "backbone", tmp_path / "a" / "karla", *SETTINGS)
    assert "backbone stays frozen" in shown
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_checkpoint("a/karla")
    assert model.config.base_model_name_or_path == str(folder / "backbone")
    assert model.config.ctm_num_ticks == OPTIONS["ctm_num_ticks"]
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["karla"]


def test_new_fills_an_empty_folder_and_replaces_a_karla_only_by_force(folder, karla, tmp_path):
    (tmp_path / "empty").mkdir()
    succeed("new", folder / "backbone", tmp_path / "empty", *SETTINGS)
    before = files_in(karla)
    assert "already holds a Karla" in refuse("new", folder / "backbone", karla, *SETTINGS)
    assert files_in(karla) == before
    succeed("new", folder / "backbone", karla, *SETTINGS[:-2], "--set", "ctm_num_ticks=5", "--force")
    model, _ = load_checkpoint(karla)
    assert (model.config.ctm_num_ticks, model.packs()) == (5, {})
    assert sorted(files_in(karla)) == sorted(files_in(tmp_path / "empty"))
    assert {path.name for path in tmp_path.iterdir()} == {"karla", "empty"}


def test_new_quantises_the_backbone(tmp_path):
    save_backbone(tmp_path / "backbone", intermediate_size=128)
    succeed("new", tmp_path / "backbone", tmp_path / "karla", *SETTINGS, "--quantization", "int8")
    config = json.loads((tmp_path / "karla" / "config.json").read_text())
    assert config["backbone_quantization"] == "int8"
    assert " on " in succeed("info", tmp_path / "karla")


def test_settings_are_read_as_yaml(folder, tmp_path):
    families = "[{kind: ngram, order: 3, weight: 1.0}]"
    given = ["--set", f"engram_families={families}", "--set", "certainty_threshold=1", "--set", "tick_loss=two_tick"]
    succeed("new", folder / "backbone", tmp_path / "karla", *SETTINGS, *given)
    config = load_checkpoint(tmp_path / "karla")[0].config
    assert config.engram_families == [{"kind": "ngram", "order": 3, "weight": 1.0}]
    assert (config.certainty_threshold, config.tick_loss) == (1, "two_tick")


def test_info_shows_levels_budget_and_packs(folder, tmp_path):
    shown = succeed("info", folder / "read", "--json", tmp_path / "info.json")
    for words in ("L0 backbone", "L1 memory", "L2 head", "never", "4096 tokens", "every training step", "total",
                  "≤ 2 GB", "≤ 50 MB", "≤ 2.5 GB", "facts"):  # fmt: skip
        assert words in shown
    data = json.loads((tmp_path / "info.json").read_text())
    assert [level["name"] for level in data["levels"]] == ["L0", "L1", "L2", "total"]
    assert data["levels"][0]["parameters"] == sum(p.numel() for p in make_backbone().parameters())
    assert data["packs"][0]["rows"] > 100


def test_read_writes_one_pack_and_nothing_else(folder, tmp_path):
    karla = shutil.copytree(folder / "fresh", tmp_path / "karla")
    before = files_in(karla)
    shown = succeed(
        "read", karla, folder / "story.txt", folder / "facts.txt", "--pack", "p", "--json", tmp_path / "r.json"
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["texts"], report["pack"], report["context"]) == (2, "p", "closed")
    assert report["surprise_after"] < report["surprise_before"]
    assert f"{report['tokens']:,}" in shown
    after = files_in(karla)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"engram/manifest.json", *(name for name in after if name.startswith("engram/p-"))}
    assert f"{report['rows_written']:,}" in succeed("packs", karla)


def test_lines_are_texts_of_their_own(folder, tmp_path):
    karla = shutil.copytree(folder / "fresh", tmp_path / "karla")
    succeed("read", karla, folder / "facts.txt", "--lines", "--context", "open", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["texts"], report["context"], report["pack"]) == (len(FACTS), "open", "default")


def test_forget_gives_back_the_checkpoint_before(folder, karla, tmp_path):
    succeed("read", karla, folder / "story.txt", "--pack", "story")
    shown = succeed("packs", karla, "--json", tmp_path / "packs.json")
    assert "facts" in shown
    assert "story" in shown
    assert "story.txt" in shown
    listed = json.loads((tmp_path / "packs.json").read_text())["packs"]
    assert [(pack["name"], pack["sources"]) for pack in listed] == [("facts", ["facts.txt"]), ("story", ["story.txt"])]
    assert succeed("pack", "list", karla) == shown
    assert "Forgot pack 'story'" in succeed("forget", karla, "story")
    assert files_in(karla) == files_in(folder / "read")
    succeed("forget", karla, "facts")
    assert files_in(karla) == files_in(folder / "fresh")
    assert "holds no packs" in succeed("packs", karla)


def test_chat_answers_what_is_piped_in(folder, karla, tmp_path):
    lines = [FACTS[0].prompt, f"/read {folder / 'story.txt'}", "/ticks 2", "Hi", "/forget default", "/quit"]
    shown = succeed("chat", karla, "--max-new-tokens", 20, input="\n".join(lines)).splitlines()
    assert FACTS[0].answer in shown[0]
    assert [line for line in shown if "3.0 ticks per token · certainty" in line]
    assert [line for line in shown if line.startswith("Read ")]
    assert [line for line in shown if "2.0 ticks per token" in line]
    assert shown[-1] == "Forgot 'default'."
    assert files_in(karla) == files_in(folder / "read")


def test_eval_recall_counts_with_and_without_memory(folder, tmp_path):
    shown = succeed("eval", "recall", folder / "read", folder / "facts.jsonl", "--json", tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert (data["facts"], data["memory_off"]["exact"], data["memory_on"]["exact"]) == (6, 0, 6)
    assert data["memory_on"]["by_form"]["code"] == {"exact": 2, "asked": 2}
    assert data["memory_on"]["generated"] == [fact.answer for fact in FACTS]
    assert shown.split()[-4:] == ["all", "6", "0", "6"]
    assert succeed("eval", "recall", folder / "read", folder / "facts.jsonl", "--limit", 1).split()[-4:] == [
        "all", "1", "0", "1"
    ]  # fmt: skip


def test_eval_perplexity_measures_with_and_without_memory(folder, tmp_path):
    files = [folder / "facts.txt", folder / "story.txt"]
    shown = succeed("eval", "perplexity", folder / "read", *files, "--json", tmp_path / "p.json")
    known, unknown = json.loads((tmp_path / "p.json").read_text())["files"]
    assert known["file"] == str(files[0])
    assert known["memory_on"] < known["memory_off"] / 2
    assert unknown["memory_on"] / unknown["memory_off"] > known["memory_on"] / known["memory_off"]
    assert f"{known['memory_on']:,.3f}" in shown
    cut = succeed("eval", "perplexity", folder / "read", files[1], "--max-tokens", 10)
    assert cut.split()[-4] == "10"


def test_train_follows_a_recipe_and_the_options_after_it(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {
        "model_name_or_path": str(folder / "fresh"),
        "dataset_files": [str(folder / "story.txt"), str(folder / "facts.txt")],
        "output_dir": str(tmp_path / "out"),
        "max_steps": 50,
        "use_cpu": True,
        "report_to": "none",
    }
    recipe.write_text(json.dumps(values), encoding="utf-8")
    succeed("train", recipe, "--max_steps", 1, "--learning_rate=1e-3", "--json", tmp_path / "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 1
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    load_checkpoint(tmp_path / "out")


def test_train_refuses_unknown_keys(tmp_path):
    (tmp_path / "recipe.yaml").write_text("modl_name: x\n", encoding="utf-8")
    assert "`modl_name` is no key of a recipe" in refuse("train", tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: x\n", encoding="utf-8")
    assert "`nonsense` is no key of a recipe" in refuse("train", tmp_path / "recipe.yaml", "--nonsense", "3")
    assert "There is no file" in refuse("train", tmp_path / "none.yaml", "--max_steps", "1")


def test_demo_and_bench_get_their_arguments(monkeypatch, tmp_path):
    """They take minutes, so only the way to them is tested here."""
    calls = []
    monkeypatch.setattr("karla_hf.demo.run_demo", lambda *arguments, **options: calls.append((*arguments, options)))
    monkeypatch.setattr("karla_hf.bench.run_bench", lambda *arguments, **options: calls.append((*arguments, options)))
    succeed("demo", "--output", tmp_path, "--json", tmp_path / "d.json")
    succeed("demo")
    succeed("bench", "read", "decode", "--json", tmp_path / "b.json")
    assert calls == [
        (tmp_path, {"json": tmp_path / "d.json"}),
        (Path("karla-demo"), {"json": None}),
        (["read", "decode"], {"json": tmp_path / "b.json"}),
    ]


def test_an_unknown_bench_is_refused():
    assert "There is no bench nosuch" in refuse("bench", "nosuch")


NEW = {
    "unknown option": (["--set", "ctm_nothing=1"], r"Unknown model options ['ctm_nothing']; the options are ["),
    "wrong type": (["--set", "ctm_num_ticks=four"], "`ctm_num_ticks` is 'four', but it takes int; give a value of"),
    "boolean": (["--set", "ctm_window=true"], "`ctm_window` is True, but it takes int"),
    "no value": (["--set", "ctm_window"], "--set was given 'ctm_window', but it takes KEY=VALUE"),
    "no key": (["--set", "=3"], "--set was given '=3', but it takes KEY=VALUE"),
    "twice": (["--set", "ctm_window=3", "--set", "ctm_window=4"], "--set was given 'ctm_window' twice"),
    "no YAML": (["--set", "engram_families=[{"], "--set engram_families is given '[{', which is not YAML"),
    "out of range": (["--set", "ctm_num_ticks=0"], "`ctm_num_ticks` is 0; give 1 or more."),
    "too wide": (["--set", "engram_head_dim=65"], "`engram_num_heads` * `engram_head_dim` is 520"),
}


@pytest.mark.parametrize(("arguments", "problem"), NEW.values(), ids=NEW.keys())
def test_new_refuses_a_setting_in_one_sentence(folder, tmp_path, arguments, problem):
    assert problem in refuse("new", folder / "backbone", tmp_path / "karla", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_new_refuses_what_is_no_causal_lm(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, vocab_size=400)).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    assert "is BertModel, not a causal language model" in refuse("new", tmp_path / "bert", tmp_path / "karla")
    assert "neither a folder here nor a Hub name" in refuse("new", tmp_path / "none", tmp_path / "karla")
    make_backbone().save_pretrained(tmp_path / "no-tokenizer")
    assert "holds no tokenizer that can be read" in refuse("new", tmp_path / "no-tokenizer", tmp_path / "karla")
    assert not (tmp_path / "karla").exists()


def test_new_does_not_write_among_other_files(folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for arguments in ([], ["--force"]):
        assert "holds other files; give a new or an empty folder." in refuse(
            "new", folder / "backbone", tmp_path / "notes", *arguments
        )
        assert "is a file; give a new folder." in refuse(
            "new", folder / "backbone", tmp_path / "notes" / "a.txt", *arguments
        )
    assert files_in(tmp_path) == {"notes/a.txt": b"mine"}


def test_a_full_disk_leaves_what_was_there(folder, karla, tmp_path):
    before = files_in(tmp_path)
    with full_disk(2_000):
        sentences = [
            refuse("read", karla, folder / "story.txt", "--pack", "story"),
            refuse("new", folder / "backbone", tmp_path / "other", *SETTINGS),
            refuse("new", folder / "backbone", karla, *SETTINGS, "--force"),
        ]
    assert ["File too large" in sentence for sentence in sentences] == [True] * 3
    assert files_in(tmp_path) == before
    assert os.listdir(tmp_path) == ["karla"]
    with full_disk(500), pytest.raises(OSError, match=r"The tokenizer cannot be written .*File too large"):
        save_tokenizer(make_tokenizer(), tmp_path)


BAD_TEXTS = {
    "missing": (None, "There is no file"),
    "blank": (b" \n", "holds no text; give a UTF-8 file with at least one word."),
    "latin-1": ("Müsli".encode("latin-1"), "is not UTF-8 text: byte 0xfc at offset 1 (line 1)"),
    "utf-16": ("Müsli".encode("utf-16"), "is not UTF-8 text: byte 0xff at offset 0"),
    "one token": (b"x", "1 tokens"),
}


@pytest.mark.parametrize(("content", "problem"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_bad_text_is_refused_before_anything_is_read(folder, karla, tmp_path, content, problem):
    bad = tmp_path / "bad.txt"
    if content is not None:
        bad.write_bytes(content)
    before = files_in(karla)
    assert problem in refuse("read", karla, folder / "story.txt", bad)
    assert problem in refuse("eval", "perplexity", karla, folder / "story.txt", bad)
    assert files_in(karla) == before


BAD_FACTS = {
    "no answer": ('{"prompt": "The mill is"}', 'line 2 has no "answer"; add it as a text that is not blank.'),
    "blank answer": ('{"prompt": "The mill is", "answer": " "}', 'line 2: "answer" is " "; give a text'),
    "no JSON": ("The mill is old.", "line 2 is not JSON"),
}


@pytest.mark.parametrize(("line", "problem"), BAD_FACTS.values(), ids=BAD_FACTS.keys())
def test_bad_facts_are_refused_by_their_line(karla, tmp_path, line, problem):
    (tmp_path / "facts.jsonl").write_text(
        f'{{"prompt": "The mill is", "answer": " old."}}\n{line}\n', encoding="utf-8"
    )
    assert problem in refuse("eval", "recall", karla, tmp_path / "facts.jsonl")


def test_what_is_no_karla_is_refused_by_every_command(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    commands = [["info"], ["packs"], ["forget", "x"], ["read", folder / "story.txt"], ["chat"],
                ["eval", "recall", folder / "facts.jsonl"], ["eval", "perplexity", folder / "story.txt"]]  # fmt: skip
    for command in commands:
        at = 2 if command[0] == "eval" else 1
        for place, problem in (
            (tmp_path / "none", "is no folder; give a folder that `karla new`"),
            (tmp_path, "is no Karla (it has no config.json)"),
            (tmp_path / "bad", "is no JSON object"),
            (folder / "backbone", "holds a model of type 'llama', not a Karla; put a Karla on it with `karla new`."),
        ):
            assert problem in refuse(*command[:at], place, *command[at:])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_constants(karla: Path) -> None:
    (path,) = (karla / "engram").glob("constants-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_manifest(karla: Path) -> None:
    path = karla / "engram" / "manifest.json"
    path.write_text(path.read_text().replace('"hidden_size": 64', '"hidden_size": 96'))


DAMAGES = {
    "other tokenizer": (
        lambda karla: make_tokenizer(vocab_size=300).save_pretrained(karla),
        "has another vocabulary than the one that the memory was made with; put the backbone's tokenizer there again.",
    ),
    "no tokenizer": (lambda karla: (karla / "tokenizer.json").unlink(), "holds no tokenizer that can be read"),
    "truncated head": (lambda karla: truncate(karla / "model.safetensors"), "are damaged"),
    "hash constants": (change_constants, "is damaged (its content is not what was written)"),
    "other backbone": (change_manifest, "is a memory for hidden size 96, but the backbone has 64"),
    "truncated manifest": (lambda karla: truncate(karla / "engram" / "manifest.json"), "is no manifest of a memory"),
    "bad option": (
        lambda karla: (karla / "config.json").write_text(
            (karla / "config.json").read_text().replace('"ctm_num_ticks": 3', '"ctm_num_ticks": 0')
        ),
        "`ctm_num_ticks` is 0; give 1 or more.",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_and_left_alone(folder, karla, damage, problem):
    damage(karla)
    before = files_in(karla)
    for command in (["read", karla, folder / "story.txt"], ["chat", karla], ["info", karla],
                    ["eval", "recall", karla, folder / "facts.jsonl"],
                    ["eval", "perplexity", karla, folder / "story.txt"]):  # fmt: skip
        assert problem in refuse(*command)
    assert files_in(karla) == before


def test_packs_and_forget_check_the_memory_alone(karla):
    before = files_in(karla)
    for command in (["forget"], ["pack", "remove"]):
        assert refuse(*command, karla, "x") == "There is no pack 'x'; the packs are ['facts']."
    assert files_in(karla) == before
    change_constants(karla)
    assert "is damaged" in refuse("packs", karla)
    assert "is damaged" in refuse("forget", karla, "facts")
    shutil.rmtree(karla / "engram")
    assert "has no engram/manifest.json" in refuse("packs", karla)


def damage_pack(karla: Path) -> Path:
    path = next((karla / "engram").glob("facts-*"))
    truncate(path)
    return path


def test_a_damaged_pack_is_left_out_named_and_kept(folder, karla, caplog):
    path = damage_pack(karla)
    before = files_in(karla)
    assert "1" in succeed("packs", karla).split()
    (message,) = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert message.startswith(f"{path} is damaged (it has ")
    assert f"{path.name}: it has " in refuse("pack", "verify", karla)
    succeed("info", karla)
    assert "The pack 'facts' is damaged" in refuse("read", karla, folder / "story.txt", "--pack", "facts")
    assert "The pack 'facts' is damaged" in refuse("pack", "export", karla, "facts", karla / "out")
    assert files_in(karla) == before
    succeed("read", karla, folder / "story.txt", "--pack", "story")
    assert path.read_bytes() == before[f"engram/{path.name}"]
    shutil.copy(folder / "read" / "engram" / path.name, path)
    assert "what was written" in " ".join(succeed("pack", "verify", karla).split())
    succeed("forget", karla, "story")
    assert files_in(karla) == files_in(folder / "read")


def test_a_pack_travels_to_another_karla(folder, karla, tmp_path):
    succeed("pack", "export", karla, "facts", tmp_path / "out")
    assert "is not an empty folder" in refuse("pack", "export", karla, "facts", tmp_path / "out")
    fresh = Path(shutil.copytree(folder / "fresh", tmp_path / "fresh"))
    assert "Imported pack 'facts'" in succeed("pack", "import", fresh, tmp_path / "out")
    assert files_in(fresh) == files_in(folder / "read")
    assert "There is a pack 'facts' already" in refuse("pack", "import", fresh, tmp_path / "out")
    succeed("pack", "import", fresh, tmp_path / "out", "--name", "more")
    succeed("pack", "remove", fresh, "facts")
    shown = succeed("eval", "recall", fresh, folder / "facts.jsonl")
    assert shown.split()[-4:] == ["all", "6", "0", "6"]
    assert "has no manifest.json" in refuse("pack", "import", fresh, tmp_path)


def test_merged_packs_recall_what_both_did(folder, karla):
    succeed("read", karla, folder / "story.txt", "--pack", "story")
    assert "Merged 2 packs into 'all'" in succeed("pack", "merge", karla, "story", "facts", "--into", "all")
    model, _ = load_checkpoint(karla)
    assert list(model.packs()) == ["all"]
    assert model.engram.packs["all"].sources == ["facts.txt", "story.txt"]
    shown = succeed("eval", "recall", karla, folder / "facts.jsonl")
    assert shown.split()[-4:] == ["all", "6", "0", "6"]
    assert "There is no pack 'facts'" in refuse("pack", "merge", karla, "all", "facts", "--into", "x")


def test_texts_are_unlearned(folder, karla, tmp_path):
    def measure() -> float:
        succeed("eval", "perplexity", karla, folder / "facts.txt", "--json", tmp_path / "p.json")
        return json.loads((tmp_path / "p.json").read_text())["files"][0]["memory_on"]

    before = measure()
    assert "Unlearned " in succeed("forget", karla, "facts", "--text", folder / "facts.txt")
    assert measure() > 1.5 * before
    assert "There is no pack 'default'" in refuse("forget", karla, "--text", folder / "facts.txt")
    result = run("forget", karla)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Name the pack to remove" in result.stderr


def test_one_process_writes_at_a_time_and_any_number_read(folder, karla):
    before = files_in(karla)
    code = """
import sys
from karla_hf.checkpoints import writing
with writing(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(karla)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        wanted = f"Another process is writing to the memory in {karla / 'engram'}; try again when it has finished."
        for command in (["read", karla, folder / "story.txt"], ["forget", karla, "facts"],
                        ["pack", "merge", karla, "facts", "--into", "x"],
                        ["new", folder / "backbone", karla, *SETTINGS, "--force"]):  # fmt: skip
            assert refuse(*command) == wanted
        succeed("packs", karla)
        other.kill()
    succeed("forget", karla, "facts")
    assert files_in(karla) == files_in(folder / "fresh")
    assert before != files_in(karla)


def test_a_missing_backbone_is_named(folder, tmp_path):
    backbone = shutil.copytree(folder / "backbone", tmp_path / "backbone")
    karla = save_karla(tmp_path / "karla", backbone)
    shutil.rmtree(backbone)
    assert f"The backbone '{backbone}' is neither a folder here" in refuse("info", karla)


def test_a_pack_name_is_checked_before_the_model_is_loaded(folder):
    assert "The pack name '../x' is not allowed" in refuse(
        "read", folder / "none", folder / "story.txt", "--pack", "../x"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["nosuch"],
        ["new", "b", "d", "--quantization", "int5"],
        ["read", "d", "f", "--context", "half"],
        ["read", "d", "f", "--nosuch"],
        ["info", "d", "--json", "/no/such/folder/x.json"],
        ["eval", "recall", "d", "f", "--limit", "0"],
        ["eval", "perplexity", "d", "f", "--max-tokens", "1"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_wrong_command_line_is_explained(arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback_of_a_sentence(tmp_path):
    result = run("--debug", "packs", tmp_path)
    assert isinstance(result.exception, OSError)
    assert "is no Karla" in str(result.exception)


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("karla_hf.commands.show_packs", lambda *arguments: int("no number"))
    result = run("packs", tmp_path)
    assert isinstance(result.exception, ValueError)
    assert "invalid literal" in str(result.exception)
