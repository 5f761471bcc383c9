"""The page with the real SmolLM2-135M (slow: `make test-all`); it takes the picture that the README shows."""

import subprocess
import sys

import pytest
from pages import Server, Tab, open_browser

from karla_hf.facts import make_facts
from karla_hf.questions import make_paragraphs


pytest.importorskip("gradio", reason="the extra karla-hf[ui] is not installed")
pytestmark = pytest.mark.slow

QUESTION, ANSWER = "What is the cook of the inn Termol called?", "Sellin Fenkor"


def test_a_file_changes_an_answer_and_forgetting_it_changes_it_back(tmp_path):
    playwright, browser = open_browser()
    new = "from karla_hf.cli import main; main()"
    folder = tmp_path / "my-karla"
    made = [sys.executable, "-c", new, "new", "HuggingFaceTB/SmolLM2-135M-Instruct", str(folder)]
    subprocess.run(made, check=True, capture_output=True)
    facts = make_facts(40, split="test")
    assert any(ANSWER in fact.text for fact in facts)
    town = tmp_path / "towns.md"
    town.write_text("\n\n".join(make_paragraphs(facts, split="test", seed=0)), encoding="utf-8")
    server = Server(folder, "--max-new-tokens", "40")
    tab = Tab(browser, server.address)
    tab.page.fill("#certainty input[type=number]", "0.8")
    tab.page.keyboard.press("Tab")
    before = tab.say(QUESTION)
    assert ANSWER not in before
    tab.read(town, "towns")
    assert tab.say(QUESTION).startswith(ANSWER)
    tab.page.wait_for_function("!document.querySelector('#facts').innerText.includes('40 tokens')")
    tab.photograph("page", full_page=True)
    tab.clear()
    tab.page.click("#victim input")
    tab.page.get_by_role("option", name="towns").click()
    tab.page.click("#forget")
    tab.page.wait_for_selector("#packs label", state="detached")
    assert tab.say(QUESTION) == before
    tab.context.close()
    server.close()
    browser.close()
    playwright.stop()
