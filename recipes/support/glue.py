"""The five tasks of GLUE as text to text, in the form in which T5 was made for them (Raffel et al. 2020, appendix D).

GoRA (arXiv:2502.12171), whose set-up LoRA-Over takes over, publishes its script for MRPC only, in this form too. LoRA-GA
(arXiv:2407.05000) writes an instruction and asks for the result ("classify the sentiment of the text: ..."), counts the padding
of answers into the loss, and compares the scores of two first tokens; none of this is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """What a task is called by, its columns of text in the order of the prompt, and its labels by number."""

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    validation: str = "validation"
    """GLUE's split with public labels; its test labels are not public, so papers report this one."""

    def prompt(self, record: Record) -> str:
        """`cola sentence: the dog sees a ball .`"""
        return " ".join([self.name, *(f"{column}: {record[column]}" for column in self.columns)])

    def answer(self, record: Record) -> str:
        """The label in words.

        Raises:
            ValueError: the label has none, as the -1 of GLUE's test splits.
        """
        label = str(record["label"])
        if label not in map(str, range(len(self.labels))):
            raise ValueError(
                f"label {label} is none of {self.name}'s 0 to {len(self.labels) - 1} ({', '.join(self.labels)})"
            )
        return self.labels[int(label)]


_SAME = ("not_equivalent", "equivalent")
_ENTAILS = ("entailment", "not_entailment")

TASKS = {
    task.name: task
    for task in (
        Task("mnli", ("hypothesis", "premise"), ("entailment", "neutral", "contradiction"), "validation_matched"),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("cola", ("sentence",), ("unacceptable", "acceptable")),
        Task("qnli", ("question", "sentence"), _ENTAILS),
        Task("mrpc", ("sentence1", "sentence2"), _SAME),
    )
}
