r"""What a Llama reads and learns in each of LoRA-Over's settings; T5's prompts are in ``support/glue.py``.

LoRA-Over (arXiv:2605.16470) takes its set-up from GoRA (arXiv:2502.12171) and prints no prompt, and GoRA's code reads its prompts
from files that were not published. So these are the prompts of LoRA-GA (arXiv:2407.05000, repository Outsider565/LoRA-GA,
commit 89af7de, ``reproduce/data.py`` and ``reproduce/eval_humaneval.py``), the set-up that GoRA builds on. Whether
LoRA-Over's are the same cannot be known.

Differences from LoRA-GA's code that hold for all settings: prompt and answer are tokenized apart, so that training and
generation see the same tokens of the prompt, and no space is put between them; examples that are too long are left out
with the tokenizer of the model that is trained, not Llama 2's; the caller chooses the order (LoRA-GA's shuffle has no
effect, since its result is dropped). Further ones stand at each setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Example(NamedTuple):
    """What a model reads, and what it should answer."""

    prompt: str
    answer: str


def _columns(row: Row, *names: str) -> list[str]:
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if missing:
        raise ValueError(f"no text in column {', '.join(missing)}; the row has {', '.join(row) or 'no columns'}")
    return [row[name] for name in names]


# -- MetaMathQA and GSM8K ---------------------------------------------------------------------------------------------


def gsm8k_prompt(question: str) -> str:
    """The prompt of a question, in training and evaluation."""
    return f"Q: {question}\nA: "


def gsm8k(row: Row) -> Example:
    """A row of GSM8K (``openai/gsm8k``): ``question``, ``answer``."""
    question, answer = _columns(row, "question", "answer")
    return Example(gsm8k_prompt(question), answer)


def metamath(row: Row) -> Example | None:
    """A row of ``meta-math/MetaMathQA``: ``type``, ``query``, ``response``; ``None`` where it was not made from GSM8K.

    The answer is cut before "The answer is:", so that it ends in ``#### number``.
    """
    kind, query, response = _columns(row, "type", "query", "response")
    return Example(gsm8k_prompt(query), response.split("\nThe answer is:")[0]) if "GSM" in kind else None


# -- instructions -----------------------------------------------------------------------------------------------------


def alpaca_prompt(instruction: str) -> str:
    """The template without input of Stanford Alpaca (tatsu-lab/stanford_alpaca, Apache-2.0), as LoRA-GA ends it."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def wizardlm(row: Row) -> Example | None:
    """A row of WizardLM's evolved instructions: ``instruction``, ``output``.

    ``None`` for answers with "sorry" or "as an ai" in them. LoRA-GA's file is ``silk-road/Wizard-LM-Chinese-instruct-evol``,
    whose English columns have these names.
    """
    instruction, output = _columns(row, "instruction", "output")
    refused = "sorry" in output.lower() or "as an ai" in output.lower()
    return None if refused else Example(alpaca_prompt(instruction), output)


def mt_bench_prompt(conversation: Sequence[str]) -> str:
    """A conversation that ends with the user's turn, in the template that ``wizardlm`` trains on.

    LoRA-GA publishes no evaluation on MT-Bench. Later turns repeat the template's two headings, which training never saw;
    LoRA-Over reports the first turn alone.
    """
    if len(conversation) % 2 == 0:
        raise ValueError(f"a conversation of {len(conversation)} turns does not end with the user's")
    prompt = alpaca_prompt(conversation[0])
    for answer, question in zip(conversation[1::2], conversation[2::2], strict=True):
        prompt += f"{answer}\n\n### Instruction:\n{question}\n\n### Response:\n"
    return prompt


# -- CodeFeedback and HumanEval ---------------------------------------------------------------------------------------


def codefeedback(row: Row) -> Example | None:
    """A row of ``m-a-p/CodeFeedback-Filtered-Instruction``: ``query``, ``answer``; ``None`` for answers without a code block.

    The answer ends with its first fenced block.
    """
    query, answer = _columns(row, "query", "answer")
    parts = answer.split("```")
    return Example(alpaca_prompt(query), f"{parts[0]}```{parts[1]}```") if len(parts) > 1 else None


def humaneval_prompt(problem: Row) -> str:
    """The instruction that LoRA-GA's evaluation gives for a problem; it ends in an open code block.

    LoRA-GA breaks the template's first line in two, unlike in training; here it is the template of training. LoRA-GA also
    rewrites the indentation of what comes back and deletes docstrings, which ``humaneval.program_of`` does not.
    """
    (prompt,) = _columns(problem, "prompt")
    instruction = (
        "Complete the following Python code: \n"
        "Notes: respond with the entire complete function definition\n"
        "do not add any comments, be as concise in your code as possible\n"
        "use only built-in libraries, assume no additional imports other than those provided (if any)\n"
        "use `    ` (4 spaces) for each level of indentation\n\n"
        f"code:\n```python\n{prompt}\n```"
    )
    return f"{alpaca_prompt(instruction)}```python\n"
