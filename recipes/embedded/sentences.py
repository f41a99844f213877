"""Made-up sentences with a rule to learn, for the five tasks of GLUE that the recipes fine-tune on.

Each task has GLUE's columns and labels, so that the same code reads the real data:

``cola``
    Is a sentence acceptable? The verb agrees with its noun, however far away that is; "one" goes with singular nouns.
``sst2``
    Is a review positive? "not" and "never" turn the word round that follows.
``mrpc``
    Do two sentences say the same? Active and passive do, and so do synonyms; exchanged roles do not.
``qnli``
    Does a sentence answer a question?
``mnli``
    Does a premise entail a hypothesis, contradict it, or neither? A dog is an animal; what is not said is neutral.

Two families, as of the word problems: ``basic`` records, in which the rule is seen at once, are what the embedded T5 is
pre-trained on; it is fine-tuned on ``composed`` ones, in which the rule meets other words, negation, the passive.

Which split a record belongs to is decided by a hash of its text, so splits share no record whatever the seeds and sizes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

FAMILIES = ("basic", "composed")
SPLITS = ("train", "validation", "test")

_KINDS = {
    "animal": ("dog", "cat", "bird", "horse", "fox"),
    "person": ("girl", "boy", "farmer", "doctor", "king"),
    "thing": ("ball", "book", "stone", "chair", "box"),
}
_VERBS = {"see": "seen", "find": "found", "take": "taken", "know": "known", "hold": "held", "watch": "watched"}
_SYNONYMS = {"big": "large", "small": "little", "quick": "fast"}
_ADJECTIVES = (*_SYNONYMS, "red", "old", "young", "blue")
_PLACES = ("near the river", "behind the house", "in the garden", "on the hill")
_GOOD = ("great", "charming", "funny", "clever", "moving")
_BAD = ("dull", "awful", "boring", "weak", "stupid")
_WORKS = ("film", "story", "play", "actor", "scene")

Record = dict[str, str | int]


@dataclass(frozen=True)
class Clause:
    """Somebody does something to somebody or something."""

    subject: str
    verb: str
    target: str
    adjective: str
    place: str

    @staticmethod
    def draw(rng: random.Random) -> Clause:
        """A clause of two different nouns."""
        subject, target = rng.sample([noun for nouns in _KINDS.values() for noun in nouns], 2)
        return Clause(subject, rng.choice([*_VERBS]), target, rng.choice(_ADJECTIVES), rng.choice(_PLACES))

    def active(self, target: str = "") -> str:
        """`the dog sees the red ball`."""
        return f"the {self.subject} {_singular(self.verb)} the {target or f'{self.adjective} {self.target}'}"

    def passive(self, adjective: str) -> str:
        """`the red ball is seen by the dog`."""
        return f"the {adjective} {self.target} is {_VERBS[self.verb]} by the {self.subject}"


def _singular(verb: str) -> str:
    return f"{verb}es" if verb.endswith("ch") else f"{verb}s"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("x") else f"{noun}s"


def _other(rng: random.Random, word: str, words: tuple[str, ...]) -> str:
    return rng.choice([each for each in words if each != word])


def _kind(noun: str) -> str:
    return next(kind for kind, nouns in _KINDS.items() if noun in nouns)


def _cola(rng: random.Random, basic: bool) -> Record:
    clause = Clause.draw(rng)
    many, acceptable = rng.random() < 0.5, rng.random() < 0.5
    noun = _plural(clause.subject) if many else clause.subject
    between = rng.choice((f" {clause.place}", f" behind the {rng.choice(('trees', 'tree', 'houses', 'house'))}"))
    between = "" if basic else between
    agrees, article = True, True
    if not acceptable:
        agrees, article = rng.choice(((False, True), (False, True), (True, False)))
    verb = clause.verb if many == agrees else _singular(clause.verb)
    target = clause.target if article else _plural(clause.target)
    return {"sentence": f"the {noun}{between} {verb} one {clause.adjective} {target} .", "label": int(acceptable)}


def _sst2(rng: random.Random, basic: bool) -> Record:
    positive = rng.random() < 0.5
    turned = not basic and rng.random() < 0.5
    word = rng.choice(_GOOD if positive != turned else _BAD)
    negation = rng.choice(("not", "never")) if turned else rng.choice(("really", "often", "so"))
    work = rng.choice(_WORKS)
    start = rng.choice((f"the {work} is", f"i think the {work} is", f"this {rng.choice(_ADJECTIVES)} {work} is"))
    end = rng.choice(("", f" in the {_other(rng, work, _WORKS)}", " for us", " at the end"))
    return {"sentence": f"{start} {negation} {word}{end} .", "label": int(positive)}


def _mrpc(rng: random.Random, basic: bool) -> Record:
    clause, same = Clause.draw(rng), rng.random() < 0.5
    adjective = _SYNONYMS.get(clause.adjective, clause.adjective)
    if basic:
        verb = clause.verb if same else _other(rng, clause.verb, (*_VERBS,))
        second = Clause(clause.subject, verb, clause.target, adjective, clause.place).active()
    elif same:
        second = clause.passive(adjective)
    else:
        swapped = Clause(clause.target, clause.verb, clause.subject, clause.adjective, clause.place)
        other = Clause(
            clause.subject, _other(rng, clause.verb, (*_VERBS,)), clause.target, clause.adjective, clause.place
        )
        second = rng.choice((swapped, other)).passive(adjective)
    return {"sentence1": f"{clause.active()} .", "sentence2": f"{second} .", "label": int(same)}


def _qnli(rng: random.Random, basic: bool) -> Record:
    clause, answered = Clause.draw(rng), rng.random() < 0.5
    verb, target = clause.verb, clause.target
    if not answered:
        if not basic and rng.random() < 0.5:
            verb = _other(rng, verb, (*_VERBS,))
        else:
            target = rng.choice(
                [noun for nouns in _KINDS.values() for noun in nouns if noun not in (target, clause.subject)]
            )
    who, where = f"who {_singular(verb)} the {target} ?", f"where is the {target} {_VERBS[verb]} ?"
    question = who if basic else rng.choice((who, where))
    return {"question": question, "sentence": f"{clause.active()} {clause.place} .", "label": int(not answered)}


def _mnli(rng: random.Random, basic: bool) -> Record:
    clause, label = Clause.draw(rng), rng.randrange(3)
    premise = f"{clause.active()} {clause.place} ."
    whole = f"{clause.adjective} {clause.target}"
    weaker = whole if basic else rng.choice((clause.target, _kind(clause.target), whole))
    new = _other(rng, clause.adjective, _ADJECTIVES)
    if label == 0:
        hypotheses = [f"{clause.active(weaker)} ."]
    elif label == 1:
        hypotheses = [
            f"{clause.active(weaker)} {rng.choice(('today', 'again', 'every day'))} .",
            f"the {new} {clause.subject} {_singular(clause.verb)} the {weaker} .",
        ]
    else:
        hypotheses = [
            f"the {clause.subject} does not {clause.verb} the {weaker} .",
            f"nobody {_singular(clause.verb)} the {weaker} .",
        ]
    hypothesis = hypotheses[0] if basic else rng.choice(hypotheses)
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


_MAKERS: dict[str, Callable[[random.Random, bool], Record]] = {
    "mnli": _mnli,
    "sst2": _sst2,
    "cola": _cola,
    "qnli": _qnli,
    "mrpc": _mrpc,
}
TASKS = tuple(_MAKERS)


def split_of(record: Record) -> str:
    """The split that a record belongs to: 80 % train, 10 % validation, 10 % test, by the hash of its text."""
    text = "\n".join(str(value) for key, value in record.items() if key != "label")
    return {0: "test", 1: "validation"}.get(hashlib.sha256(text.encode()).digest()[0] % 10, "train")


def _records(family: str, task: str, split: str, seed: int) -> Iterator[Record]:
    rng = random.Random(f"{family}/{task}/{split}/{seed}")
    while True:
        record = _MAKERS[task](rng, family == "basic")
        if split_of(record) == split:
            yield record


def generate(family: str, task: str, split: str, n: int, seed: int = 0) -> list[Record]:
    """``n`` records of a task, the same ones whenever the arguments are the same. Few of them repeat.

    A larger ``n`` continues the list of a smaller one.

    Raises:
        ValueError: for an unknown family, task or split, or a negative ``n``.
    """
    for name, value, known in (("family", family, FAMILIES), ("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
    if n < 0:
        raise ValueError(f"n is {n}; it counts records, so it cannot be negative")
    records = _records(family, task, split, seed)
    return [next(records) for _ in range(n)]
