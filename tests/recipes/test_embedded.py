"""What the offline demo stands on: the word problems, the tokenizer and the base model kept in the repository."""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.embedded import pretrain, word_problems
from recipes.embedded.scoring import final_number, score

MODEL = Path(word_problems.__file__).parent / "model"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
FIRST_TEST_PROBLEM = {
    "question": (
        "Nora has 2 baskets of 7 beads. "
        "She gives half of the beads to Rosa and then gets 37 more. "
        "There are 14 nuts on the table. "
        "How many beads does Nora have now?"
    ),
    "answer": ("The baskets hold <<2*7=14>>14 beads.\nHalf is <<14/2=7>>7.\nThen it is <<7+37=44>>44.\n#### 44"),
}
FAMILIES = pytest.mark.parametrize("family", word_problems.FAMILIES)
SPLITS = pytest.mark.parametrize("split", word_problems.SPLITS)


def evaluate(expression: str) -> float:
    """One operation on two integers."""
    node = ast.parse(expression, mode="eval").body
    assert isinstance(node, ast.BinOp)
    return OPERATORS[type(node.op)](ast.literal_eval(node.left), ast.literal_eval(node.right))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


@FAMILIES
@SPLITS
def test_problems_are_decided_by_the_arguments(family, split):
    problems = word_problems.generate(family, split, 50, seed=3)
    assert problems == word_problems.generate(family, split, 50, seed=3)
    assert problems[:20] == word_problems.generate(family, split, 20, seed=3)
    assert problems != word_problems.generate(family, split, 50, seed=4)


def test_the_list_never_changes_without_notice():
    [problem] = word_problems.generate("composed", "test", 1)
    assert problem == FIRST_TEST_PROBLEM


@FAMILIES
def test_splits_share_no_question_whatever_the_seeds(family):
    questions = {
        split: {
            problem["question"] for seed in range(3) for problem in word_problems.generate(family, split, 1000, seed)
        }
        for split in word_problems.SPLITS
    }
    assert not questions["train"] & questions["validation"]
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]


@SPLITS
def test_composed_problems_are_all_different_and_never_basic(split):
    composed = {problem["question"] for problem in word_problems.generate("composed", split, 2000)}
    assert len(composed) == 2000
    assert not composed & {problem["question"] for problem in word_problems.generate("basic", split, 2000)}


@FAMILIES
@SPLITS
def test_every_mark_and_the_result_are_right(family, split):
    for problem in word_problems.generate(family, split, 1000):
        marks = re.findall(r"<<([^=>]+)=(\d+)>>(\d+)", problem["answer"])
        assert len(marks) == problem["answer"].count("<<") == problem["answer"].count("\n")
        for expression, value, repeated in marks:
            assert evaluate(expression) == int(value)
            assert value == repeated
            assert 0 <= int(value) <= word_problems.LARGEST
        assert problem["answer"].endswith(f"\n#### {marks[-1][1]}")
        assert final_number(problem["answer"]) == int(marks[-1][1])


@FAMILIES
def test_operands_come_from_the_question_or_an_earlier_step(family):
    for problem in word_problems.generate(family, "train", 1000):
        known = {int(number) for number in re.findall(r"\d+", problem["question"])} | {2, 3}
        for expression, value in re.findall(r"<<([^=>]+)=(\d+)>>", problem["answer"]):
            assert {int(number) for number in re.findall(r"\d+", expression)} <= known
            known.add(int(value))


@pytest.mark.parametrize(("family", "split", "n"), [("easy", "train", 1), ("basic", "dev", 1), ("basic", "train", -1)])
def test_what_cannot_be_generated_is_refused(family, split, n):
    with pytest.raises(ValueError, match=r"family is|split is|n is"):
        word_problems.generate(family, split, n)


def test_command_line_writes_gsm8k_json_lines(tmp_path):
    word_problems.main([str(tmp_path), "--train", "5", "--validation", "3", "--test", "2", "--seed", "1"])
    for split, size in {"train": 5, "validation": 3, "test": 2}.items():
        records = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert records == word_problems.generate("composed", split, size, seed=1)
        assert all(list(record) == ["question", "answer"] for record in records)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.",
        "tabs\tand\r\nlines\n\n",
        "  1,234.50 €",
        "数学 🦙 naïve",
        "'s",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


@FAMILIES
def test_a_prompt_is_cut_the_same_with_and_without_its_answer(tokenizer, family):
    for problem in word_problems.generate(family, "train", 200):
        prompt = f"Q: {problem['question']}\nA: "
        together = tokenizer(prompt + problem["answer"])["input_ids"]
        assert together == tokenizer(prompt)["input_ids"] + tokenizer(problem["answer"])["input_ids"]


def test_special_tokens(tokenizer, model):
    identifiers = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(identifiers)) == 3
    config = model.generation_config
    assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == identifiers


def test_the_model_is_a_small_llama_3(model):
    config = model.config
    assert config.model_type == "llama"
    assert model.num_parameters() <= 2_000_000
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.tie_word_embeddings
    assert config.hidden_act == "silu"
    assert config.max_position_embeddings >= 1024


def test_the_base_model_answers_in_the_right_form_but_mostly_wrongly(model, tokenizer):
    scores = score(model, tokenizer, word_problems.generate("composed", "test", 60))
    assert scores.well_formed >= 0.95
    assert scores.right <= 0.25


def test_the_base_model_knows_what_it_was_trained_on(model, tokenizer):
    assert score(model, tokenizer, word_problems.generate("basic", "test", 60)).right >= 0.8


@pytest.mark.parametrize("hidden", [64, 192])
def test_a_model_of_another_width_has_the_same_heads(tokenizer, hidden):
    made = pretrain.make_model(pretrain.Pretraining(layers=1, **pretrain.of_width(hidden)), tokenizer).config
    assert (made.hidden_size, made.head_dim) == (hidden, 32)
    assert made.num_attention_heads == 2 * made.num_key_value_heads
    usual = pretrain.Pretraining()
    assert made.intermediate_size * usual.hidden == hidden * usual.intermediate
    assert pretrain.of_width(usual.hidden).items() <= dataclasses.asdict(usual).items()


@pytest.mark.parametrize("hidden", [0, 32, 100])
def test_a_width_without_whole_heads_is_refused(hidden):
    with pytest.raises(ValueError, match="multiple of 64"):
        pretrain.of_width(hidden)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hidden", "64"], "--hidden 64 would replace the embedded model: give another --folder"),
        (["--hidden", "100", "--folder", "elsewhere"], "--hidden is 100: give a multiple of 64"),
    ],
)
def test_another_width_never_replaces_the_embedded_model(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(arguments)
    assert said in capsys.readouterr().err


def test_pretraining_continues_exactly_where_it_stopped(tmp_path, monkeypatch):
    settings = pretrain.Pretraining(
        steps=6, horizon=8, cooldown=2, batch=4, warmup=2, vocabulary=300, hidden=32, intermediate=32, layers=1
    )
    whole, _ = pretrain.pretrain(settings, tmp_path / "whole", tmp_path / "whole.pt", checkpoint_every=4)

    class Interrupted(Exception):
        pass

    taken = iter(range(5))

    def loss_that_stops(*arguments):
        if next(taken, None) is None:
            raise Interrupted
        return loss(*arguments)

    loss = pretrain.batch_loss
    monkeypatch.setattr(pretrain, "batch_loss", loss_that_stops)
    with pytest.raises(Interrupted):
        pretrain.pretrain(settings, tmp_path / "resumed", tmp_path / "resumed.pt", checkpoint_every=4)
    monkeypatch.setattr(pretrain, "batch_loss", loss)
    resumed, _ = pretrain.pretrain(settings, tmp_path / "resumed", tmp_path / "resumed.pt", checkpoint_every=4)
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(resumed.state_dict()[name]), name
    assert not (tmp_path / "resumed.pt").exists()
