import re
from collections import Counter

import pytest

from karla_hf import questions
from karla_hf.facts import SPLITS, make_facts
from karla_hf.questions import WORDINGS, make_paragraphs, reword


# Words of grammar and the two that every language asks with; what is asked and how is in the other words.
SHARED = {
    *(
        "a",
        "and",
        "are",
        "at",
        "by",
        "can",
        "did",
        "do",
        "does",
        "for",
        "from",
        "have",
        "how",
        "i",
        "in",
        "is",
        "it",
        "its",
    ),
    *(
        "me",
        "much",
        "name",
        "number",
        "of",
        "on",
        "or",
        "place",
        "since",
        "that",
        "the",
        "there",
        "to",
        "under",
        "was",
    ),
    *("what", "when", "where", "which", "who", "with", "would", "year", "you"),
}


def words(templates):
    text = " ".join(templates)
    return set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}('s)?", "", text).lower())) - SHARED


def templates(split):
    tables = (questions._QUESTIONS, questions._OTHER_VERBS, questions._IMPERATIVES)
    return [template for table in tables for pool in table[split].values() for template in pool]


def test_the_splits_share_no_question_and_no_verb():
    assert not words(templates("development")) & words(templates("test"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("wording", WORDINGS)
def test_another_wording_keeps_answer_and_subject(split, wording):
    for number, fact in enumerate(make_facts(20, split=split)):
        asked = reword(fact, wording, split=split, variant=number)
        assert (asked.answer, asked.form) == (fact.answer, fact.form)
        assert asked.prompt != fact.prompt
        assert "{" not in asked.prompt
        subject = next(word for word in re.findall(r"[A-Z][a-z]+", fact.prompt[1:]))
        assert subject.lower() in asked.prompt.lower()


def test_an_unknown_wording_and_another_split_are_refused():
    fact = make_facts(1)[0]
    with pytest.raises(ValueError, match="use one of lower case"):
        reword(fact, "song", split="development")
    with pytest.raises(ValueError, match="is no fact of the test split"):
        reword(fact, "chat", split="test")


@pytest.mark.parametrize("split", SPLITS)
def test_paragraphs_tell_every_fact_once_among_others(split):
    facts = make_facts(40, split=split)
    paragraphs = make_paragraphs(facts, split=split, seed=3)
    text = "\n".join(paragraphs)
    assert all(text.count(fact.text) == 1 for fact in facts)
    assert paragraphs == make_paragraphs(facts, split=split, seed=3)
    assert paragraphs != make_paragraphs(facts, split=split, seed=4)
    told = [sum(fact.text in paragraph for fact in facts) for paragraph in paragraphs]
    assert set(told[:-1]) <= {2, 3, 4}


def test_a_subject_has_company_of_its_own():
    facts = make_facts(40)
    text = " ".join(make_paragraphs(facts))
    counts = Counter(re.findall(r"[A-Z][a-z]+", text))
    subjects = [re.findall(r"[A-Z][a-z]+", fact.prompt[1:])[0] for fact in facts]
    assert all(counts[subject] >= 2 for subject in subjects)
