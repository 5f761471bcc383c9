"""What is never done: opening a pickle, leaving a folder, showing a token."""

import ast
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import OPTIONS, make_backbone, save_backbone, save_karla

from karla_hf import KarlaForCausalLM
from karla_hf.backbones import load_backbone
from karla_hf.modeling.weights_karla import check_index, check_weights


ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("karla_hf", "modeling", "recipes") for path in sorted((ROOT / folder).glob("**/*.py"))]
PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "pandas",
    "jsonpickle",
}
LOADERS = {"torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load", "yaml.load", "yaml.load_all",
           "yaml.unsafe_load", "yaml.full_load", "torch.package.PackageImporter", "eval", "exec"}  # fmt: skip


def forbidden_in(source: str) -> list[str]:
    """What a source does that could run code found in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & LOADERS) + ([node.module] if node.module.partition(".")[0] in PICKLES else [])
        elif isinstance(node, ast.Call):
            found += [ast.unparse(node.func)] if ast.unparse(node.func) in LOADERS else []
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = {"allow_pickle": "True", "weights_only": "False", "use_safetensors": "False",
                      "safe_serialization": "False", "trust_remote_code": "True"}  # fmt: skip
            found += [f"{name}={value}" for name, value in given.items() if unsafe.get(name) == value]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_of_ours_opens_a_pickle(path):
    assert forbidden_in(path.read_text(encoding="utf-8")) == []


def test_the_scan_for_pickles_finds_them():
    for line in ("import pickle", "from joblib import load", "torch.load(x)", "np.load(x)", "from yaml import load",
                 "yaml.load(x, Loader)", "f(allow_pickle=True)", "m(use_safetensors=False)", "eval(x)"):  # fmt: skip
        assert forbidden_in(line), line
    assert forbidden_in("yaml.safe_load(x)\nsafetensors.torch.load_file(x)\nmodel.eval()") == []
    assert len(SOURCES) > 80


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def backbone(tmp_path):
    return save_backbone(tmp_path / "backbone")


def test_weights_that_are_a_pickle_are_refused(backbone, tmp_path):
    (backbone / "model.safetensors").unlink()
    (backbone / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(
        OSError, match=r"backbone holds its weights as a pickle \(pytorch_model\.bin\), which can run code"
    ):
        load_backbone(str(backbone))
    torch.save(make_backbone().state_dict(), backbone / "pytorch_model.bin")  # also without a payload
    with pytest.raises(OSError, match="save them as safetensors where you trust the file"):
        KarlaForCausalLM.from_backbone(str(backbone), **OPTIONS)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_is_a_pickle_is_refused(backbone):
    (backbone / "adapter_config.json").write_text("{}")
    (backbone / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(OSError, match=r"holds its weights as a pickle \(adapter_model\.bin\)"):
        load_backbone(str(backbone))


def test_weights_of_a_karla_that_are_a_pickle_are_refused(backbone, tmp_path):
    karla = save_karla(tmp_path / "karla", backbone)
    (karla / "model.safetensors").unlink()
    (karla / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(OSError, match=r"karla holds its weights as a pickle \(pytorch_model\.bin\)"):
        KarlaForCausalLM.from_pretrained(karla)
    (karla / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        KarlaForCausalLM.from_pretrained(karla)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("named", ["adapter_model.bin", "x.bin", 7, ["model.safetensors"]])
def test_a_configuration_that_names_other_weights_is_refused(backbone, named):
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    with pytest.raises(
        OSError, match=r"config\.json names .* as its weights, which are no safetensors; remove that entry"
    ):
        load_backbone(str(backbone))


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    make_backbone().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def outside_names(tmp_path: Path) -> list:
    return ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "sub/../../outside.safetensors",
            "..\\outside.safetensors", "outside.bin", "", "..", ".", "a\0.safetensors", None, 7, ["x.safetensors"]]  # fmt: skip


def test_an_index_that_names_a_file_outside_is_refused(sharded, tmp_path):
    assert load_backbone(str(sharded)).config.vocab_size == 400
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    (tmp_path / "outside.safetensors").write_bytes((sharded / index["weight_map"][first]).read_bytes())
    for name in outside_names(tmp_path):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], first: name}}))
        with pytest.raises(OSError, match=r"which is no safetensors file in its folder; get the weights again\.$"):
            load_backbone(str(sharded))
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], first: "gone.safetensors"}}))
    with pytest.raises(OSError, match=r"names 'gone\.safetensors', which is missing; get the weights again\.$"):
        load_backbone(str(sharded))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}, "metadata": {}}', "[" * 100_000, '{"weight_map": 3}',
                                     '{"weight_map": {"a": "model.safetensors"}}', "\ud800"])  # fmt: skip
def test_an_index_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(
        OSError, match=r"index\.json is no (JSON|JSON object|index of weights)\b.*; restore it from a good"
    ):
        check_index(path)
    with pytest.raises(OSError, match=r"index\.json is no"):
        check_weights(tmp_path)


def test_weights_may_be_links_since_they_are_only_read_as_safetensors(backbone, tmp_path):
    """Unlike files of a memory, which are copied into exported packs: `test_link_to_another_place_is_not_followed`."""
    (backbone / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (backbone / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert load_backbone(str(backbone)).config.vocab_size == 400
    (tmp_path / "elsewhere.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(OSError, match="holds no weights that can be read"):
        load_backbone(str(backbone))
    assert not (tmp_path / "ran").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers 401 to everything, and keeps the tokens that it was sent."""

    tokens: list[str] = []

    def do_HEAD(self):
        self.tokens.append(self.headers.get("authorization", ""))
        self.send_response(401)
        self.send_header("X-Error-Message", "Invalid credentials")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_a_token_is_sent_but_never_shown_or_logged(tmp_path):
    code = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
from transformers.utils import logging as transformers_logging
transformers_logging.set_verbosity_debug()
from huggingface_hub.utils import logging as hub_logging
hub_logging.set_verbosity_debug()
from karla_hf.backbones import load_backbone
load_backbone("someone/model")
"""
    token = "hf_" + "SecretOfTheTest" * 2
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_DEBUG")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path),
    }
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    server.server_close()
    assert f"Bearer {token}" in Hub.tokens  # so that there is something to hide
    assert finished.returncode != 0
    shown = finished.stdout + finished.stderr
    assert re.search(r"DEBUG", shown)
    assert "The Hub does not serve config.json of 'someone/model'" in shown
    assert "SecretOfTheTest" not in shown
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"SecretOfTheTest" in path.read_bytes() for path in files)
