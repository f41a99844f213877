"""A judge behind an OpenAI-compatible endpoint, which grades one answer from 1 to 10.

The protocol is MT-Bench's single-answer grading (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot
Arena", arXiv:2306.05685), as FastChat implements it: temperature 0, at most 2048 tokens, and the grade between double
brackets. ``judge_prompts.jsonl`` beside this file quotes the four prompts of that protocol, with their source.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import read_records

PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")
_GRADE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_GRADE_IN_SINGLE_BRACKETS = re.compile(r"\[(\d+(?:\.\d+)?)\]")


class JudgeError(ValueError):
    """The judge cannot be asked at all: no key, a wrong address, an unknown model, a refused request."""


@dataclass(frozen=True)
class JudgePrompt:
    """A system prompt, and a template with the names of what is filled in between braces."""

    name: str
    system: str
    template: str

    @property
    def hash(self) -> str:
        """SHA-256 of both texts."""
        return hashlib.sha256(f"{self.system}\0{self.template}".encode()).hexdigest()

    def fill(self, fields: Mapping[str, str]) -> str:
        """The user's message. Raises ``ValueError`` for a template that asks for other fields than there are."""
        try:
            return self.template.format(**fields)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"judge prompt {self.name} cannot be filled with {', '.join(fields)}: {error!r}"
            ) from error


def read_judge_prompts(path: str | Path = PROMPTS) -> dict[str, JudgePrompt]:
    """Prompts by name, from a file in FastChat's format: ``name``, ``system_prompt``, ``prompt_template``."""
    columns = {"name": str, "system_prompt": str, "prompt_template": str}
    return {
        record["name"]: JudgePrompt(record["name"], record["system_prompt"], record["prompt_template"])
        for record in read_records(path, columns)
    }


def grade_in(reply: str) -> float | None:
    """The first grade between brackets, double ones before single ones; ``None`` if there is none from 1 to 10."""
    found = _GRADE.search(reply) or _GRADE_IN_SINGLE_BRACKETS.search(reply)
    grade = float(found[1]) if found else 0.0
    return grade if 1 <= grade <= 10 else None


@dataclass(frozen=True)
class Grade:
    """``score`` is ``None`` where the judge gave no grade; ``problem`` then says why in one line."""

    score: float | None
    replies: tuple[str, ...]
    """All replies, as they came; the last one holds the grade."""
    problem: str


class Judge:
    """Asks one model at one address.

    ``base_url`` is the address of any server with OpenAI's chat completions; ``None`` means OpenAI's own. The key is read
    from the environment variable ``key_variable``. A request that times out, or that the server is too busy for, is repeated
    by the client with growing pauses; a reply without a grade is asked for anew; ``attempts`` bounds either. Raises
    ``JudgeError`` where the client or the key is missing.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        attempts: int = 3,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}; it should be at least 1")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it should be a positive number of seconds")
        try:
            import openai
        except ImportError as error:
            raise JudgeError("a judge needs the openai client: pip install 'tnadapt[recipes]'") from error
        key = os.environ.get(key_variable)
        if not key:
            raise JudgeError(
                f"no key for the judge: set the environment variable {key_variable} (to any word for a server without keys)"
            )
        self.model, self.attempts = model, attempts
        self._openai: Any = openai
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=attempts - 1)

    def grade(self, prompt: JudgePrompt, fields: Mapping[str, str]) -> Grade:
        """Ask for a grade. What stays without one is a ``Grade`` with its problem; ``JudgeError`` ends the run."""
        message = prompt.fill(fields)
        replies: list[str] = []
        for _ in range(self.attempts):
            try:
                replies.append(self._ask(prompt.system, message))
            except (
                self._openai.APITimeoutError,
                self._openai.RateLimitError,
                self._openai.InternalServerError,
            ) as error:
                return Grade(None, tuple(replies), f"no reply after {self.attempts} attempts: {_line(error)}")
            except self._openai.APIResponseValidationError as error:
                replies.append(str(error.body))
            except self._openai.OpenAIError as error:
                raise JudgeError(f"{self.model} at {self._client.base_url} cannot be asked: {_line(error)}") from error
            score = grade_in(replies[-1])
            if score is not None:
                return Grade(score, tuple(replies), "")
        return Grade(
            None, tuple(replies), f"{len(replies)} replies without a grade from 1 to 10, the last: {_line(replies[-1])}"
        )

    def _ask(self, system: str, message: str) -> str:
        completion = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": message}],
            temperature=0.0,
            max_tokens=2048,
        )
        # a server that speaks the protocol badly may leave out what the client's types promise
        choices: Any = getattr(completion, "choices", None)
        content = choices[0].message.content if choices and choices[0].message else None
        return content if isinstance(content, str) else ""


def _line(said: object) -> str:
    return " ".join(str(said).split())[:200]
