import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from karla_hf.facts import FORMS, MAX_FACTS, SPLITS, Fact, make_facts, read_facts, write_facts


ANSWERS = {
    "code": r" \d{3}-\d{3}\.",
    "date": r" ([1-9]|1\d|2[0-8]) [A-Z][a-z]+ 1[789]\d\d\.",
    "amount": r" \d,\d{3} (crowns|florins)\.",
    "city": r" [A-Z][a-z]+\.",
    "name": r" [A-Z][a-z]+ [A-Z][a-z]+\.",
}
FUNCTION_WORDS = {"at", "in", "is", "its", "of", "on", "s", "the", "to", "was", "with"}


def words(facts, *, capitalized, answers=False):
    text = " ".join(fact.text if answers else fact.prompt for fact in facts)
    return {word for word in re.findall(r"[A-Za-z]+", text) if word[0].isupper() == capitalized}


def write(path, *lines):
    path.write_bytes("\n".join(lines).encode("utf-8"))
    return path


@pytest.mark.parametrize("split", SPLITS)
def test_forms_are_even_and_in_turn(split):
    facts = make_facts(23, split=split)
    assert [fact.form for fact in facts] == [FORMS[index % 5] for index in range(23)]
    assert Counter(fact.form for fact in facts) == {"code": 5, "date": 5, "amount": 5, "city": 4, "name": 4}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", FORMS)
def test_prompts_and_answers_have_their_form(split, form):
    for fact in make_facts(200, split=split, forms=(form,)):
        assert fact.form == form
        assert re.fullmatch(ANSWERS[form], fact.answer)
        assert fact.prompt == fact.prompt.strip()
        assert not set("{}.") & set(fact.prompt)
        assert fact.text == fact.prompt + fact.answer


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_unique_up_to_the_largest_count(split):
    facts = make_facts(MAX_FACTS, split=split)
    assert len({fact.prompt for fact in facts}) == MAX_FACTS
    subjects = [re.findall(r"(?<!^)\b[A-Z][a-z]+", fact.prompt) for fact in facts]
    assert all(len(found) == 1 for found in subjects)
    assert len({found[0] for found in subjects}) == MAX_FACTS


def test_answers_vary():
    for form in FORMS:
        assert len({fact.answer for fact in make_facts(100, forms=(form,))}) > 90


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_facts_do_not_depend_on_the_process(hash_seed):
    code = "from karla_hf.facts import make_facts; print([f.text for s in (0, 7) for f in make_facts(50, seed=s)])"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str([fact.text for seed in (0, 7) for fact in make_facts(50, seed=seed)])


def test_first_facts_are_what_they_are():
    """A change here changes every recall that was ever reported with these facts."""
    assert [fact.text for split in SPLITS for fact in make_facts(2, split=split)] == [
        "The access code of Cekalu's locker number 8 is 454-111.",
        "The bridge of Ruhy was founded on 4 December 1716.",
        "At Pirdunrik the strongroom 34 opens with 780-379.",
        "Work at the Vindel theatre began on 26 April 1839.",
    ]


def test_fewer_facts_are_the_beginning_of_more():
    assert make_facts(40) == make_facts(200)[:40]


def test_seed_and_split_give_other_facts():
    prompts = [{fact.prompt for fact in make_facts(50, split=split, seed=seed)} for split in SPLITS for seed in (0, 1)]
    assert len(set.union(*prompts)) == 200


def test_splits_share_no_name_and_no_content_word():
    development, test = (make_facts(2000, split=split) for split in SPLITS)
    names = [words(facts, capitalized=True, answers=True) for facts in (development, test)]
    months = names[0] & names[1] - {"The"}
    assert len(months) == 12
    assert months == {fact.answer.split()[1] for fact in development if fact.form == "date"}
    prompts = [words(facts, capitalized=False) for facts in (development, test)]
    assert prompts[0] & prompts[1] <= FUNCTION_WORDS
    assert all(len(found - FUNCTION_WORDS) > 30 for found in prompts)


def test_splits_share_no_syllable():
    from karla_hf.facts import _SYLLABLES

    assert not set(_SYLLABLES["development"]) & set(_SYLLABLES["test"])
    assert all(syllable[-1] in "aeiouy" for syllable in _SYLLABLES["development"])
    assert all(syllable[-1] not in "aeiouy" for syllable in _SYLLABLES["test"])


@pytest.mark.parametrize("count", [0, -3, MAX_FACTS + 1])
def test_count_outside_the_range(count):
    with pytest.raises(ValueError, match=f"`count` is {count}, but it must be 1 to 10,000"):
        make_facts(count)


def test_unknown_split():
    with pytest.raises(ValueError, match=r"`split` is 'train'; use one of development, test\."):
        make_facts(5, split="train")


@pytest.mark.parametrize("forms", ["code", (), ("code", "code"), ("code", "color")])
def test_wrong_forms(forms):
    with pytest.raises(ValueError, match=r"`forms` is .*; give a tuple with some of code, date, amount, city, name"):
        make_facts(5, forms=forms)


def test_round_trip(tmp_path):
    facts = [*make_facts(30), Fact("Wo steht die Mühle?\n\u2028Antwort:", " Am Fluß.", "own")]
    write_facts(facts, tmp_path / "facts.jsonl")
    assert read_facts(tmp_path / "facts.jsonl") == facts
    assert (tmp_path / "facts.jsonl").read_bytes().count(b"\n") == 31


def test_no_facts_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"There are no facts to write to .*facts\.jsonl; give at least one"):
        write_facts([], tmp_path / "facts.jsonl")
    assert not (tmp_path / "facts.jsonl").exists()


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The mill is at", "Ruhy.", "The mill is at Ruhy."),
        ("The mill is at", " Ruhy.", "The mill is at Ruhy."),
        ("The mill is at ", "Ruhy.", "The mill is at Ruhy."),
        ("The mill:\n", "Ruhy.", "The mill:\nRuhy."),
        ("The mill:", "\nRuhy.", "The mill:\nRuhy."),
    ],
)
def test_one_space_between_prompt_and_answer(tmp_path, prompt, answer, text):
    path = write(tmp_path / "own.jsonl", json.dumps({"prompt": prompt, "answer": answer}))
    [fact] = read_facts(path)
    assert fact.text == text
    assert (fact.prompt, fact.form) == (prompt, "own")


def test_blank_lines_other_keys_and_windows_line_ends_are_allowed(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "A", "answer": "b.", "id": 3}\r\n\r\n{"prompt": "C", "answer": "d."}\r\n'
    )
    assert [fact.text for fact in read_facts(path)] == ["A b.", "C d."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "A", "answer": ', r"is not JSON \(Expecting value at column 27\)"),
        ("prompt,answer", r"is not JSON \(Expecting value at column 1\)"),
        ('["A", "b"]', "is not a JSON object; write one"),
        ("null", "is not a JSON object"),
        ('{"answer": "b."}', 'has no "prompt"; add it'),
        ('{"prompt": "A"}', 'has no "answer"; add it'),
        ('{"prompt": "A", "anwser": "b."}', 'has no "answer"; add it'),
        ('{"prompt": "A", "answer": ""}', r': "answer" is ""; give a text that is not blank'),
        ('{"prompt": "A", "answer": " \\n"}', ': "answer" is " .n"; give a text'),
        ('{"prompt": "A", "answer": 4217}', ': "answer" is 4217; give a text'),
        ('{"prompt": null, "answer": "b."}', ': "prompt" is null; give a text'),
        ('{"prompt": "", "answer": "b."}', r': "prompt" is ""; give a text'),
        ('{"prompt": "A", "answer": "b.", "form": 1}', ': "form" is 1; give a text'),
    ],
)
def test_defective_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "own.jsonl", '{"prompt": "A", "answer": "b."}', "", line)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 3:? ?.*{message.lstrip(': ')}") as caught:
        read_facts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, content):
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.jsonl holds no text"):
        read_facts(tmp_path / "own.jsonl")


def test_wrong_encoding_names_the_line(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes('{"prompt": "A", "answer": "b."}\n{"prompt": "Mühle", "answer": "b."}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.jsonl is not UTF-8 text: byte 0xfc at offset 45 \(line 2\)"):
        read_facts(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*own\.jsonl; give the path"):
        read_facts(Path(tmp_path, "own.jsonl"))
