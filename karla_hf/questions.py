"""The made-up facts of `facts`, asked in other words, and running paragraphs to read them from.

A memory that only continues sentences is no help to someone who asks. Here every fact is asked in six ways, and it is
read among other facts: the same thing of another subject, other things of the same subject, and sentences that answer
nothing. Settings are chosen on "development" and reported on "test"; the two share no question and no verb of one.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from karla_hf.facts import _NOUNS, _PROMPTS, FORMS, Fact, make_facts


WORDINGS = ("lower case", "? It is", "Q: A:", "other verbs", "imperative", "chat")
_DISTRACTOR_SEED = 1_000_003

# Asked with "? It is", as "Q: … A:", and in every other chat.
_QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "development": {
        "code": (
            "What is the access code of {subject}'s {noun} number {number}?",
            "I have to enter {noun} {number} of {subject}. What is its code?",
        ),
        "date": (
            "When exactly was the {noun} of {subject} founded?",
            "When was {subject}'s {noun} founded?",
        ),
        "amount": (
            "What is the annual budget of the {subject} {noun}?",
            "How large is the budget of {noun} {subject}?",
        ),
        "city": (
            "In which town does the {noun} {subject} have its headquarters?",
            "What town is home to the headquarters of the {noun} {subject}?",
        ),
        "name": ("Who is the {noun} {subject}?", "Can you tell me who the {noun} {subject} is?"),
    },
    "test": {
        "code": (
            "Which digits open the {noun} {number} at {subject}?",
            "I am standing in front of {noun} {number} at {subject}. With which combination does it open?",
        ),
        "date": (
            "On which day did work at the {subject} {noun} begin?",
            "Do you know since when there has been work at the {noun} in {subject}?",
        ),
        "amount": (
            "How much does the {noun} {subject} spend every year?",
            "How much money a year does the {subject} {noun} spend?",
        ),
        "city": (
            "Where is the main office of the {noun} {subject}?",
            "Where do letters to {subject}, the {noun}, have to go?",
        ),
        "name": ("What is the {noun} {subject} called?", "How is the {noun} {subject} called, please?"),
    },
}

# Asked without anything after the question mark, and in the other chats. The verb of the sentence is not there.
_OTHER_VERBS: dict[str, dict[str, tuple[str, ...]]] = {
    "development": {
        "code": (
            "How do I unlock {noun} {number} of {subject}?",
            "What do I type to enter {subject}'s {noun} {number}?",
        ),
        "date": ("When did {subject} receive its {noun}?", "When did they build the {noun} in {subject}?"),
        "amount": (
            "What does it cost to run the {noun} {subject} for a year?",
            "What amount can the {subject} {noun} use each year?",
        ),
        "city": ("From which place is the {noun} {subject} run?", "Where would I visit the {noun} {subject}?"),
        "name": (),
    },
    "test": {
        "code": (
            "What has to be dialled at {noun} {number} in {subject}?",
            "Which numbers get me into {subject}'s {noun} {number}?",
        ),
        "date": (
            "When was ground broken for the {noun} at {subject}?",
            "Since what date has {subject} been putting up its {noun}?",
        ),
        "amount": (
            "What are the yearly expenses of the {noun} {subject}?",
            "How much is paid out by the {subject} {noun} in twelve months?",
        ),
        "city": (
            "Which place is the {noun} {subject} based in?",
            "What address do I put on mail for the {subject} {noun}?",
        ),
        "name": (),
    },
}
_ROLES = {
    "captain of the ship": "Who commands the ship {subject}?",
    "mayor of the island": "Who governs the island {subject}?",
    "owner of the farm": "To whom does the farm {subject} belong?",
    "rider of the horse": "Who sits on the horse {subject}?",
    "pilot of the airship": "Who flies the airship {subject}?",
    "cook of the inn": "Who prepares the meals at the inn {subject}?",
    "editor of the journal": "Under whom does the journal {subject} appear?",
    "warden of the forest": "Who looks after the forest {subject}?",
}

_IMPERATIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "development": {
        "code": (
            "Tell me the code of {subject}'s {noun} number {number}.",
            "Name the code for {noun} {number} of {subject}:",
        ),
        "date": (
            "Tell me when {subject} founded its {noun}.",
            "Name the moment when the {noun} of {subject} was founded:",
        ),
        "amount": ("Tell me the budget of the {noun} {subject}.", "Name the annual budget of the {subject} {noun}:"),
        "city": ("Tell me the town where the {noun} {subject} sits.", "Name the home town of the {noun} {subject}:"),
        "name": ("Tell me who the {noun} {subject} is.", "Name the {noun} {subject}:"),
    },
    "test": {
        "code": (
            "Give the combination for {noun} {number} at {subject}:",
            "Please remind me what opens the {subject} {noun} {number}.",
        ),
        "date": (
            "Give the date on which the {noun} at {subject} was begun:",
            "Please remind me since when {subject} has had work going on at its {noun}.",
        ),
        "amount": (
            "Give the sum that the {noun} {subject} spends per year:",
            "Please remind me how much the {subject} {noun} spends.",
        ),
        "city": (
            "Give the place of the {noun} {subject}'s main office:",
            "Please remind me where to send a letter for the {subject} {noun}.",
        ),
        "name": ("Give the name of the {noun} {subject}:", "Please remind me what the {noun} {subject} is called."),
    },
}

# Of the same subject and the same thing, and of nothing in particular: sentences that answer no question.
_ASIDES = {
    "development": (
        "Few people in the region have ever heard of {subject}.",
        "The {thing} was once painted by a traveller who stayed for the winter.",
        "Anyone who comes to see the {thing} is offered tea.",
    ),
    "test": (
        "An old song praises {subject} and its people.",
        "Nobody remembers who first thought of such a {thing}.",
        "Much has been said about {subject}, and not all of it kindly.",
    ),
}
_FILLERS = {
    "development": (
        "It rained for most of the week, and the roads were soft.",
        "The committee met again and could not agree on the colour of the doors.",
        "This was reported in the papers at the time.",
        "In the evening the shops close early, except before holidays.",
    ),
    "test": (
        "The weather has been kind this spring, so the fields are green already.",
        "They say that the winters used to be colder.",
        "A new edition of the guide is being prepared.",
        "There is a bench by the water where one can rest.",
    ),
}


def reword(fact: Fact, wording: str, *, split: str, variant: int = 0) -> Fact:
    """The same fact, asked in other words.

    Args:
        fact: one that `make_facts` made for `split`.
        wording: one of `WORDINGS`; for "chat" the prompt is what the user says, without the chat template.
        split: "development" or "test".
        variant: which of the wordings, any integer.

    Returns:
        A fact with another prompt and the same answer and form.

    Raises:
        ValueError: for another wording, or a fact of another split.

    Example:
        >>> fact = make_facts(1)[0]
        >>> print(reword(fact, "Q: A:", split="development").prompt)
        Q: What is the access code of Cekalu's locker number 8?
        A:
    """
    if wording not in WORDINGS:
        raise ValueError(f"`wording` is {wording!r}; use one of {', '.join(WORDINGS)}.")
    if wording == "lower case":
        return replace(fact, prompt=fact.prompt.lower())
    parts = _parts(fact, split)
    questions = _QUESTIONS[split][fact.form]
    verbs = _OTHER_VERBS[split][fact.form] or (_ROLES[parts["noun"]],)
    imperatives = _IMPERATIVES[split][fact.form]
    pools = {"other verbs": verbs, "imperative": imperatives, "chat": (*questions, *verbs, *imperatives)}
    pool = pools.get(wording, questions)
    asked = pool[variant % len(pool)].format(**parts)
    frames = {"? It is": "{} It is", "Q: A:": "Q: {}\nA:"}
    return replace(fact, prompt=frames.get(wording, "{}").format(asked))


def make_paragraphs(facts: Sequence[Fact], *, split: str = "development", seed: int = 0) -> list[str]:
    """Running text that tells the facts among others: two to four facts a paragraph, and more than that beside them.

    Beside every fact stand a fact of the same form about another subject, one of the same form about the same subject
    (another noun, or another number where there is one), an aside on its subject and a sentence about nothing.

    Args:
        facts: facts that `make_facts` made for `split`.
        split: "development" or "test".
        seed: another number gives other company and another order.

    Returns:
        The paragraphs; every fact's sentence stands in one of them as it is.

    Example:
        >>> facts = make_facts(10)
        >>> text = " ".join(make_paragraphs(facts))
        >>> all(fact.text in text for fact in facts)
        True
    """
    rng = random.Random(f"karla_hf paragraphs {split} {seed}")
    subjects = {_parts(fact, split)["subject"] for fact in facts}
    others = _Others(split, seed, subjects)
    order = list(facts)
    rng.shuffle(order)
    paragraphs = []
    while order:
        count = rng.randint(2, 4)
        sentences = []
        for fact in order[:count]:
            parts = _parts(fact, split)
            stranger = others.take(fact.form)
            nouns = [noun for noun in _NOUNS[split][fact.form] if noun != parts["noun"] or fact.form == "code"]
            sibling = {**parts, "noun": rng.choice(nouns), "number": str(rng.randint(101, 199))}
            thing = parts["noun"].split()[-1]
            company = [
                stranger.text,
                _PROMPTS[split][fact.form].format(**sibling) + others.take(fact.form).answer,
                rng.choice(_ASIDES[split]).format(subject=parts["subject"], thing=thing),
                rng.choice(_FILLERS[split]),
            ]
            sentences += [fact.text, *company]
        rng.shuffle(sentences)
        paragraphs.append(" ".join(sentences))
        order = order[count:]
    return paragraphs


class _Others:
    """Facts that are not asked, about subjects that are not asked about."""

    def __init__(self, split: str, seed: int, subjects: set[str]):
        self._split, self._seed, self._subjects = split, _DISTRACTOR_SEED + seed, subjects
        self._stock: dict[str, list[Fact]] = {form: [] for form in FORMS}

    def take(self, form: str) -> Fact:
        """The next one of a form."""
        while not self._stock[form]:
            for fact in make_facts(500, split=self._split, seed=self._seed):
                if _parts(fact, self._split)["subject"] not in self._subjects:
                    self._stock[fact.form].append(fact)
            self._seed += 1_000
        return self._stock[form].pop()


def _parts(fact: Fact, split: str) -> dict[str, str]:
    """Subject, noun and number of a fact ("0" where it has none)."""
    pattern = re.escape(_PROMPTS[split][fact.form]) if fact.form in _PROMPTS[split] else "(?!)"
    for field, what in (("subject", r"\w+"), ("noun", r"[\w ]+"), ("number", r"\d+")):
        pattern = pattern.replace(rf"\{{{field}\}}", f"(?P<{field}>{what})")
    found = re.fullmatch(pattern, fact.prompt)
    if found is None:
        raise ValueError(
            f"{fact.prompt!r} is no fact of the {split} split; make facts with make_facts(split={split!r})."
        )
    return {"number": "0", **found.groupdict()}
