"""Made-up facts that no model can know, to measure what a memory recalls.

Every subject and every name is put together from syllables and every number is drawn, so a right answer was read, not
known. There are two splits: settings are chosen on "development" and reported on "test". The two share no syllable, no
name, no noun and no content word of their prompts.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from karla_hf.documents import read_text


FORMS = ("code", "date", "amount", "city", "name")
SPLITS = ("development", "test")
MAX_FACTS = 10_000

_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# Development syllables end in a vowel and test syllables in a consonant: no name can belong to both splits.
_SYLLABLES = {
    "development": (
        *("ba", "bri", "ce", "dro", "fa", "fle", "gu", "ha", "hy", "jo", "ka", "ke", "lo", "lu", "me"),
        *("mo", "ni", "no", "pe", "qua", "ri", "ru", "sha", "so", "ta", "tri", "vo", "wy", "ya", "zu"),
    ),
    "test": (
        *("bal", "ben", "cor", "dax", "del", "dun", "fen", "fos", "gar", "gim", "hol", "jas", "kel", "kor", "lem"),
        *("lin", "mar", "mol", "nev", "nul", "pex", "pir", "rik", "ron", "sel", "tam", "ter", "vin", "wex", "zor"),
    ),
}

_PROMPTS = {
    "development": {
        "code": "The access code of {subject}'s {noun} number {number} is",
        "date": "The {noun} of {subject} was founded on",
        "amount": "The annual budget of the {subject} {noun} is",
        "city": "The {noun} {subject} has its headquarters in the town of",
        "name": "The {noun} {subject} is",
    },
    "test": {
        "code": "At {subject} the {noun} {number} opens with",
        "date": "Work at the {subject} {noun} began on",
        "amount": "Every year the {noun} {subject} spends",
        "city": "Letters to the {noun} {subject} go to its main office at",
        "name": "The {noun} {subject} is called",
    },
}

_NOUNS = {
    "development": {
        "code": ("vault", "locker", "archive", "hangar", "greenhouse"),
        "date": ("bridge", "mill", "chapel", "college", "harbour"),
        "amount": ("society", "academy", "choir", "orchestra", "museum"),
        "city": ("company", "bank", "brewery", "shipyard", "newspaper"),
        "name": ("captain of the ship", "mayor of the island", "owner of the farm", "rider of the horse"),
    },
    "test": {
        "code": ("cabinet", "safe", "cellar", "gate", "strongroom"),
        "date": ("tower", "market", "library", "lighthouse", "theatre"),
        "amount": ("guild", "club", "league", "hospital", "circus"),
        "city": ("firm", "foundry", "insurer", "railway", "printer"),
        "name": ("pilot of the airship", "cook of the inn", "editor of the journal", "warden of the forest"),
    },
}

_CURRENCIES = {"development": "crowns", "test": "florins"}


@dataclass(frozen=True)
class Fact:
    """One fact: what is asked, what is to be answered, and which form it has.

    Attributes:
        prompt: the sentence up to the answer, without a space at its end.
        answer: the rest of the sentence; it begins with a space and ends with a period.
        form: one of `FORMS`, or what a file says.
    """

    prompt: str
    answer: str
    form: str

    @property
    def text(self) -> str:
        """The whole sentence: prompt + answer."""
        return self.prompt + self.answer


def make_facts(count: int, *, split: str = "development", seed: int = 0, forms: Sequence[str] = FORMS) -> list[Fact]:
    """Make facts with invented subjects, the forms in turn.

    The same arguments give the same facts in every process, and fewer facts are the beginning of more facts.

    Args:
        count: how many, 1 to `MAX_FACTS`. If `forms` does not divide it, the first forms have one fact more.
        split: "development" to choose settings, "test" to report results.
        seed: another number gives other facts of the same split.
        forms: which of `FORMS`, in this order, none twice.

    Returns:
        `count` facts; no two have the same subject or the same prompt.

    Raises:
        ValueError: if an argument is outside what is said above.

    Example:
        >>> facts = make_facts(10)
        >>> [fact.form for fact in facts[:6]]
        ['code', 'date', 'amount', 'city', 'name', 'code']
        >>> facts == make_facts(10), facts == make_facts(10, seed=1)
        (True, False)
    """
    _check_arguments(count, split, forms)
    # A string seed is hashed with SHA-512, which unlike hash() is the same in every process.
    rng = random.Random(f"karla_hf facts {split} {seed}")

    def new_name() -> str:
        return "".join(rng.choice(_SYLLABLES[split]) for _ in range(rng.choice((2, 3)))).capitalize()

    facts = []
    subjects: set[str] = set()
    for index in range(count):
        form = forms[index % len(forms)]
        subject = new_name()
        while subject in subjects:
            subject = new_name()
        subjects.add(subject)
        noun, number = rng.choice(_NOUNS[split][form]), rng.randint(2, 99)
        prompt = _PROMPTS[split][form].format(subject=subject, noun=noun, number=number)
        facts.append(Fact(prompt, _make_answer(form, split, rng, new_name), form))
    return facts


def write_facts(facts: Iterable[Fact], path: str | Path) -> None:
    """Write facts as JSON Lines in UTF-8, one object with the keys prompt, answer and form per line.

    Args:
        facts: at least one fact.
        path: the file; an existing one is replaced.

    Raises:
        ValueError: if there are no facts, since such a file could not be read again.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_facts(make_facts(5), Path(folder, "facts.jsonl"))
        ...     read_facts(Path(folder, "facts.jsonl")) == make_facts(5)
        True
    """
    lines = [json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts]
    if not lines:
        raise ValueError(f"There are no facts to write to {path}; give at least one.")
    Path(path).write_bytes("".join(lines).encode("utf-8"))


def read_facts(path: str | Path) -> list[Fact]:
    """Read facts from JSON Lines: one object {"prompt": "…", "answer": "…"} per line.

    If neither the prompt ends nor the answer begins with whitespace, a space is put before the answer. An optional
    "form" names the group of a fact ("own" without it). Other keys and blank lines are skipped.

    Args:
        path: a UTF-8 file.

    Returns:
        The facts in the order of the file, at least one.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if the path is a directory.
        ValueError: if the file is blank or not UTF-8, or if a line is not such an object; names the file and the line.
    """
    # Split at "\n" only: splitlines() would also split at U+2028, which JSON strings may hold.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [_parse_fact(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _check_arguments(count: int, split: str, forms: Sequence[str]) -> None:
    if not 1 <= count <= MAX_FACTS:
        raise ValueError(f"`count` is {count}, but it must be 1 to {MAX_FACTS:,}; choose a number in that range.")
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; use one of {', '.join(SPLITS)}.")
    if isinstance(forms, str) or not forms or len(set(forms)) < len(forms) or not set(forms) <= set(FORMS):
        raise ValueError(f"`forms` is {forms!r}; give a tuple with some of {', '.join(FORMS)}, none twice.")


def _make_answer(form: str, split: str, rng: random.Random, new_name: Callable[[], str]) -> str:
    if form == "code":
        return f" {rng.randint(100, 999)}-{rng.randint(100, 999)}."
    if form == "date":
        return f" {rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1700, 1949)}."
    if form == "amount":
        return f" {rng.randint(1000, 9999):,} {_CURRENCIES[split]}."
    if form == "city":
        return f" {new_name()}."
    return f" {new_name()} {new_name()}."


def _parse_fact(line: str, place: str) -> Fact:
    cure = 'write one {"prompt": "…", "answer": "…"} there.'
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg} at column {error.colno}); {cure}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{place} is JSON with too many digits or brackets; {cure}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is not a JSON object; {cure}")
    entry = {"form": "own", **entry}
    for key in ("prompt", "answer", "form"):
        if key not in entry:
            raise ValueError(f'{place} has no "{key}"; add it as a text that is not blank.')
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f'{place}: "{key}" is {json.dumps(entry[key])}; give a text that is not blank.')
    prompt, answer = entry["prompt"], entry["answer"]
    separated = prompt[-1].isspace() or answer[0].isspace()
    return Fact(prompt, answer if separated else f" {answer}", entry["form"])
