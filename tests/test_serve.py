"""`karla serve` in a process of its own, asked by the `openai` client, by `transformers chat` and by plain requests."""

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from starlette.testclient import TestClient
from tiny import CHAT_TEMPLATE, files_in, save_backbone, save_karla, speak
from typer.testing import CliRunner

from karla_hf import serve
from karla_hf.checkpoints import load_checkpoint
from karla_hf.cli import app


ROOT = Path(__file__).parent.parent
FACT = "The harbour master of Tiskel is Orla Venn."
PROMPT = "The harbour master of Tiskel is"
QUESTIONS = ["Who keeps the keys of the orchard?", "When does the ferry leave, and from where?"]


def make_karla(folder: Path, **backbone) -> Path:
    """A Karla whose head speaks and whose memory holds FACT."""
    torch.manual_seed(0)  # a fixture of the file is made before the seed of a test is set
    save_karla(folder / "karla", save_backbone(folder / "backbone", **backbone))
    model, tokenizer = load_checkpoint(folder / "karla")
    speak(model).read(FACT, tokenizer, progress=False)
    model.save_pretrained(folder / "karla")
    return folder / "karla"


def environment(**changes) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **changes}


@contextmanager
def serving(directory: Path, *options: str):
    """The URL of a server that runs meanwhile, and the first line that it printed."""
    command = [sys.executable, "-m", "karla_hf", "serve", str(directory), "--port", "0", *options]
    with open(directory.parent / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        assert line, (directory.parent / "server.log").read_text()
        yield re.search(r"http://\S+/v1", line).group(), process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def karla(tmp_path_factory):
    return make_karla(tmp_path_factory.mktemp("served"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def server(karla):
    """URL of the server. What it serves is never written."""
    before = files_in(karla)
    with serving(karla) as (url, process):
        yield url
        assert process.poll() is None
    assert process.returncode == 0
    assert files_in(karla) == before


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def loaded(karla):
    return load_checkpoint(karla)


def expected(loaded, inputs, length: int, **options) -> str:
    """What the model itself answers, greedily."""
    model, tokenizer = loaded
    answer = model.generate(**inputs, max_new_tokens=length, do_sample=False, **options)
    return tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_inputs(loaded, question: str):
    messages = [{"role": "user", "content": question}]
    return loaded[1].apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def ask(client, question: str, **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model="karla", messages=messages, temperature=0, max_tokens=12, timeout=60, **options
    )


def test_the_only_model_is_listed_by_the_name_of_its_folder(client, karla):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("karla", "karla")
    assert model.created == int((karla / "config.json").stat().st_mtime)


def test_chat_answers_what_the_model_generates(client, loaded):
    answer = ask(client, QUESTIONS[0])
    wanted = expected(loaded, chat_inputs(loaded, QUESTIONS[0]), 12)
    assert answer.choices[0].message.content == wanted != ""
    assert (answer.model, answer.choices[0].finish_reason) == ("karla", "length")
    assert answer.usage.completion_tokens == 12


def test_a_streamed_answer_comes_in_pieces_and_is_the_same(client):
    whole = ask(client, QUESTIONS[0]).choices[0].message.content
    chunks = list(ask(client, QUESTIONS[0], stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_two_requests_at_once_get_the_answers_that_each_gets_alone(client):
    def streamed(question: str) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, question, stream=True))

    alone = [ask(client, question).choices[0].message.content for question in QUESTIONS]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(8) as pool:
        plain = [pool.submit(ask, client, question) for question in QUESTIONS * 2]
        streams = [pool.submit(streamed, question) for question in QUESTIONS * 2]
        assert [future.result().choices[0].message.content for future in plain] == alone * 2
        assert [future.result() for future in streams] == alone * 2


def test_the_memory_is_on(client, loaded):
    answer = client.completions.create(model="karla", prompt=PROMPT, max_tokens=9, temperature=0).choices[0].text
    assert answer == expected(loaded, loaded[1](PROMPT, return_tensors="pt"), 9)
    assert answer == " Orla Venn"


def test_another_model_is_refused(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "Hello"}])
    assert caught.value.response.json()["detail"] == "Server is pinned to 'karla'; requested 'gpt-5'."
    with post(server.removesuffix("/v1") + "/load_model", {"model": "other"}) as events:
        assert "There is no model 'other' here; this server has 'karla'." in events.read().decode()


def test_a_name_that_leads_here_is_refused(server):
    """As a web page would use it whose own name is made to point to this machine."""
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(f"{server}/completions", {"prompt": PROMPT}, Host="pages.example")


def post(url: str, body: dict, **headers):
    headers = {"Content-Type": "application/json", **headers}
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60)


def test_transformers_chat_talks_to_it(server, loaded, tmp_path):
    """In a terminal of its own; greedily, so that the answer is known."""
    wanted = expected(loaded, chat_inputs(loaded, QUESTIONS[1]), 12)
    terminal, its_end = pty.openpty()
    # With HF_HUB_OFFLINE its client refuses even this machine.
    variables = environment(HF_HUB_OFFLINE="0", COLUMNS="200", TERM="dumb", HF_HOME=str(tmp_path))
    flags = ["do_sample=False", "max_new_tokens=12"]
    command = [str(Path(sys.executable).with_name("transformers")), "chat", "karla", server, *flags, "--user", "me"]
    process = subprocess.Popen(command, env=variables, stdin=its_end, stdout=its_end, stderr=its_end, cwd=tmp_path)
    os.close(its_end)
    seen, said = "", [QUESTIONS[1], "n", "!exit"]
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # how Linux says that the other end is closed
                break
        prompts = seen.count("<me>:") + seen.count("Continue generating?")
        if said and prompts > 3 - len(said):
            os.write(terminal, (said.pop(0) + "\n").encode())
    process.wait(timeout=30)
    os.close(terminal)
    assert process.returncode == 0, seen
    assert wanted.split()[0] in seen, (wanted, seen)


@pytest.fixture
def applications(monkeypatch):
    """Gets the application of every server that is run in this process; it is not listened for."""
    seen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append(self.config.app))
    return seen


def test_ticks_of_the_command_line_hold_for_every_answer(karla, loaded, applications):
    inputs = chat_inputs(loaded, QUESTIONS[0])
    wanted = [
        expected(loaded, inputs, 12, **options) for options in ({"max_ticks": 1}, {"certainty_threshold": 0.0}, {})
    ]
    assert len(set(wanted)) == 3
    serve.run_server(karla, host="localhost", port=0, ticks=1, threshold=None)
    serve.run_server(karla, host="localhost", port=0, ticks=None, threshold=0.0)
    for application, answer in zip(applications, wanted[:2], strict=True):
        client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=TestClient(application))
        assert ask(client, QUESTIONS[0]).choices[0].message.content == answer


def test_without_a_chat_template_only_completions_answer(tmp_path, applications, capsys):
    folder = make_karla(tmp_path)
    serve.run_server(folder, host="127.0.0.1", port=0, ticks=None, threshold=None)
    assert "Its tokenizer has no chat template, so only /v1/completions answers." in capsys.readouterr().out
    http = TestClient(*applications, base_url="http://127.0.0.1")
    client = openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=http)
    with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
        ask(client, QUESTIONS[0])
    assert client.completions.create(model="karla", prompt=PROMPT, max_tokens=9).choices[0].text == " Orla Venn"


def test_other_machines_are_let_in_only_if_asked_for_and_with_a_word(karla, applications, capsys):
    serve.run_server(karla, host="0.0.0.0", port=0, ticks=None, threshold=None)
    assert "Whoever reaches 0.0.0.0 may use it: there is no login." in capsys.readouterr().out
    http = TestClient(*applications, base_url="http://karla.example")
    assert http.get("/v1/models").json()["data"][0]["id"] == "karla"


def told(*arguments) -> str:
    """What the command says on standard error."""
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


def test_what_cannot_be_served_is_told_in_one_sentence(karla, tmp_path, monkeypatch):
    assert told(tmp_path / "none") == (
        f"Error: {tmp_path}/none is no folder; give a folder that `karla new` or `save_pretrained` made."
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert told(karla, "--port", port) == (
            f"Error: 127.0.0.1:{port} cannot be listened on (Address already in use); give another --host or --port, or "
            "--port 0 for a free one."
        )
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert told(karla) == (
        "Error: `karla serve` needs the extra `serve`; install it with `pip install 'karla-hf[serve]'`."
    )
