"""The T5 recipe: its generated tasks, GLUE's formats, the paper's settings, and a run over several tasks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from support import loading, running
from support.evaluation.generate import Chooser
from support.glue import TASKS
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

from recipes import ablate, llama31_gsm8k
from recipes import t5_glue as recipe
from recipes.embedded import sentences
from tnadapt import RowRescale

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

FAMILY = "composed"
EACH_TASK = pytest.mark.parametrize("task", sentences.TASKS)
SMALL: dict[str, Any] = {
    "train_size": 32,
    "eval_size": 6,
    "max_steps": 3,
    "batch": 8,
    "micro_batch": 4,
    "order": 4,
    "save_every": 2,
    "lr": 3e-3,
}


def small(**changes: Any) -> recipe.Config:
    return dataclasses.replace(recipe.Config(), **{**SMALL, **changes})


# -- generated sentences ----------------------------------------------------------------------------------------------


@EACH_TASK
@pytest.mark.parametrize("split", sentences.SPLITS)
def test_records_are_decided_by_the_arguments(task: str, split: str) -> None:
    records = sentences.generate(FAMILY, task, split, 40, seed=3)
    assert records == sentences.generate(FAMILY, task, split, 40, seed=3)
    assert records[:10] == sentences.generate(FAMILY, task, split, 10, seed=3)
    assert records != sentences.generate(FAMILY, task, split, 40, seed=4)
    assert {sentences.split_of(record) for record in records} == {split}
    assert all(set(record) == {*TASKS[task].columns, "label"} for record in records)


@EACH_TASK
def test_labels_are_balanced(task: str) -> None:
    labels = [record["label"] for record in sentences.generate(FAMILY, task, "train", 3000)]
    expected = 1 / len(TASKS[task].labels)
    for number in range(len(TASKS[task].labels)):
        assert labels.count(number) / len(labels) == pytest.approx(expected, abs=0.04)


@given(st.sampled_from(sentences.FAMILIES), st.integers(0, 2**32))
def test_acceptable_sentences_agree_and_others_break_one_rule(family: str, seed: int) -> None:
    """An independent reading of each sentence: does the verb's form fit the noun's, and "one" a singular noun?"""
    for record in sentences.generate(family, "cola", "train", 20, seed):
        words = str(record["sentence"]).split()
        singular = words[1] in {noun for nouns in sentences._KINDS.values() for noun in nouns}
        verb = words[words.index("one") - 1]
        article_fits = not words[-2].endswith("s")
        wrong = [singular == (verb in sentences._VERBS), not article_fits]
        assert sum(wrong) == (0 if record["label"] else 1), record


@given(st.sampled_from(sentences.FAMILIES), st.integers(0, 2**32))
def test_a_review_is_positive_if_a_good_word_stands_or_a_bad_one_is_negated(family: str, seed: int) -> None:
    for record in sentences.generate(family, "sst2", "train", 20, seed):
        words = str(record["sentence"]).split()
        good = any(word in ("great", "charming", "funny", "clever", "moving") for word in words)
        assert bool(record["label"]) == (good != ("not" in words or "never" in words))


@given(st.integers(0, 2**32))
def test_paraphrases_have_the_same_roles_and_the_same_verb(seed: int) -> None:
    participles = {
        "sees": "seen",
        "finds": "found",
        "takes": "taken",
        "knows": "known",
        "holds": "held",
        "watches": "watched",
    }
    synonym = {"big": "large", "small": "little", "quick": "fast"}
    for record in sentences.generate(FAMILY, "mrpc", "train", 20, seed):
        _, subject, verb, _, adjective, target, _ = str(record["sentence1"]).split()
        _, adjective2, target2, _, participle, _, _, subject2, _ = str(record["sentence2"]).split()
        assert adjective2 == synonym.get(adjective, adjective)
        same = participle == participles[verb] and (subject, target) == (subject2, target2)
        assert bool(record["label"]) == same


def test_unknown_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="task is 'rte'; choose one of"):
        sentences.generate(FAMILY, "rte", "train", 1)
    with pytest.raises(ValueError, match="split is 'dev'"):
        sentences.generate(FAMILY, "cola", "dev", 1)
    with pytest.raises(ValueError, match="n is -1"):
        sentences.generate(FAMILY, "cola", "train", -1)


@EACH_TASK
def test_every_word_and_every_label_has_a_token(task: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe.RECIPE.embedded_model)
    for record in sentences.generate(FAMILY, task, "test", 200):
        for text in (TASKS[task].prompt(record), TASKS[task].answer(record)):
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    for label in TASKS[task].labels:
        assert tokenizer.decode(tokenizer(label)["input_ids"], skip_special_tokens=True) == label


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "record", "prompt", "answer"),
    [
        ("sst2", {"sentence": "a fine film", "label": 1}, "sst2 sentence: a fine film", "positive"),
        ("cola", {"sentence": "He go.", "label": "0"}, "cola sentence: He go.", "unacceptable"),
        (
            "mrpc",
            {"sentence1": "A.", "sentence2": "B.", "label": 0},
            "mrpc sentence1: A. sentence2: B.",
            "not_equivalent",
        ),
        ("qnli", {"question": "Q?", "sentence": "S.", "label": 0}, "qnli question: Q? sentence: S.", "entailment"),
        (
            "mnli",
            {"premise": "P.", "hypothesis": "H.", "label": 2},
            "mnli hypothesis: H. premise: P.",
            "contradiction",
        ),
    ],
)
def test_prompts_and_labels_are_t5s(task: str, record: dict[str, Any], prompt: str, answer: str) -> None:
    assert (TASKS[task].prompt(record), TASKS[task].answer(record)) == (prompt, answer)


@EACH_TASK
@pytest.mark.parametrize("label", [-1, 3, None, "positive"])
def test_a_label_without_a_word_is_refused(task: str, label: Any) -> None:
    with pytest.raises(ValueError, match=f"label {label} is none of {task}'s 0 to"):
        TASKS[task].answer({"label": label})


def test_an_answer_is_right_word_for_word() -> None:
    record = {"sentence": "x", "label": 1, "task": "sst2"}
    assert recipe.grade(record, "positive") == (True, True)
    assert recipe.grade(record, " negative") == (True, False)
    assert recipe.grade(record, "positive positive") == (False, False)
    assert recipe.grade(record, "") == (False, False)


def test_a_folder_of_glue_is_read_and_lends_the_end_of_its_training_records(tmp_path: Path) -> None:
    rows = [f'a "quoted film {number} \t{number % 2}' for number in range(10)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nno\t0\n")
    config = small(task="sst2", data=str(tmp_path), eval_size=3)
    train, evaluation = recipe.load_records(config)
    assert [record["sentence"] for record in evaluation] == ["no"]
    assert train[1] == {"sentence": 'a "quoted film 1 ', "label": "1", "task": "sst2"}
    assert len(train) == 10
    train, evaluation = recipe.load_records(dataclasses.replace(config, eval_split="validation"))
    assert [record["sentence"] for record in evaluation] == [f'a "quoted film {number} ' for number in (7, 8, 9)]
    assert len(train) == 7


def test_json_lines_are_read_too(tmp_path: Path) -> None:
    record = {"premise": "p", "hypothesis": "h", "label": 2, "more": "left out"}
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    train, evaluation = recipe.load_records(small(task="mnli", data=str(tmp_path)))
    assert train == evaluation == [{"premise": "p", "hypothesis": "h", "label": "2", "task": "mnli"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence\nfine\n", r"train\.tsv has no column label for sst2; its header has sentence"),
        ("sentence\tlabel\nfine\t2\n", r"train\.tsv, line 2: label is '2'; sst2 has 0, 1"),
        ("sentence\tlabel\nfine\t1\nshort\n", r"train\.tsv, line 3"),
        ("", r"train\.tsv has no column sentence, label for sst2; its header has nothing"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.load_records(small(task="sst2", data=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.tsv", b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n", r"train\.tsv, line 3: not UTF-8"),
        ("train.tsv", b"sentence\tlabel\n\nshort\n", r"train\.tsv, line 3: columns are missing"),
        ("train.tsv", b"sentence\tlabel\n" + b"a" * 200_000 + b"\t1\n", r"train\.tsv, line \d: field larger"),
        ("train.jsonl", b'{"sentence": "fine", "label": 1}\n{"sentence": "fine"}\n', r"line 2: no column label"),
        ("train.jsonl", b'{"sentence": "fine", "label": 1}\n{"sentence"', r"train\.jsonl, line 2: not valid JSON"),
        ("train.jsonl", b'{"sentence": "fine", "label": 7}\n', r"train\.jsonl, line 1: label is 7; sst2 has 0, 1"),
        ("train.jsonl", b'{"sentence": 3, "label": 1}\n', r"line 1: column sentence should be str, found int"),
        ("train.jsonl", b'{"sentence": "caf\xe9", "label": 1}\n', r"train\.jsonl, line 1: byte \d+ is not UTF-8"),
    ],
)
def test_a_broken_line_is_named_with_its_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        recipe.load_records(small(task="sst2", data=str(tmp_path)))


def test_a_line_of_json_ends_at_its_line_break_alone(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl"):
        line = json.dumps({"sentence": "one\u2028two", "label": "1"}, ensure_ascii=False)
        (tmp_path / name).write_text(f"{line}\n", encoding="utf-8")
    train, _ = recipe.load_records(small(task="sst2", data=str(tmp_path)))
    assert [(row["sentence"], row["label"]) for row in train] == [("one\u2028two", "1")]


def test_a_folder_without_records_to_evaluate_on_says_which_files_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t1\n")
    with pytest.raises(ValueError, match=r"has none of the files dev\.tsv, dev\.jsonl, validation\.tsv"):
        recipe.load_records(small(task="sst2", data=str(tmp_path)))


# -- rates -----------------------------------------------------------------------------------------------------------


def test_a_method_without_a_tuned_rate_is_refused_with_the_command_that_tunes_it() -> None:
    config = dataclasses.replace(recipe.PRESETS["paper"], method="dora")
    with pytest.raises(ValueError, match=r"no rate of dora .* recipes/ablate\.py tune --recipe recipes/t5_glue\.py"):
        recipe.RECIPE.resolve(config)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_tasks_make_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    tasks = ["--task", "cola", "mnli", "--method", "lora", "lora-over-mpo-r"]
    recipe.main(recipe.RECIPE, [*tasks, "--runs", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert printed.count("comparison: ") == 2
    assert "Accuracy, cola embedded" in printed
    assert "Accuracy, mnli embedded" in printed
    results = [json.loads(path.read_text()) for path in tmp_path.glob("t5_glue-*/result.json")]
    assert {(result["config"]["task"], result["config"]["method"]) for result in results} == {
        (task, method) for task in ("cola", "mnli") for method in ("lora", "lora-over-mpo-r")
    }


def test_the_tuner_takes_this_recipe(tmp_path: Path) -> None:
    options = [
        part for name, value in SMALL.items() if name != "lr" for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    script = [
        "tune",
        "--recipe",
        str(recipe.RECIPE.path),
        "--task",
        "sst2",
        "--methods",
        "lora",
        "--lrs",
        "1e-3",
        "1e-2",
    ]
    ablate.main([*script, "--eval-split", "validation", "--runs", str(tmp_path), *options])
    (table,) = (tmp_path / "ablations").glob("tune-*/table.json")
    rows = json.loads(table.read_text())["rows"]
    assert [(row["value"], row["errors"]) for row in rows] == [(1e-3, []), (1e-2, [])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task", "rte"],
            "argument --task: invalid choice: 'rte' (choose from 'mnli', 'sst2', 'cola', 'qnli', 'mrpc')",
        ),
        (["--preset", "huge"], "argument --preset: invalid choice: 'huge' (choose from 'laptop', 'paper')"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--tsk", "sst2"], "unrecognized arguments: --tsk sst2"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe.main(recipe.RECIPE, options)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message}; --help lists all options\n"


# -- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BERT of one layer with the embedded T5's tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(recipe.RECIPE.embedded_model)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForMaskedLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["lora", "full", "lora-equal", "adalora", "alpha-lora", "lora-over-mpo-r"])
def test_an_encoder_chooses_the_label(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Its new head is trained with every method, saved, and the same for one seed; the loss falls on the records of training."""
    trained: list[Any] = []
    real = running.train
    monkeypatch.setattr(running, "train", lambda model, *a: (trained.append(model), real(model, *a))[1])
    few = {"train_size": 8, "batch": 8, "micro_batch": 8, "max_steps": 12, "every": 2}
    lr = 5e-2 if method == "adalora" else 1e-2
    config = small(task="mnli", model=encoder, method=method, lr=lr, **few)
    result = running.run(recipe.RECIPE, config, tmp_path, quiet=True)
    losses = [loss for _, loss in result["curve"]]
    assert losses[-1] < 0.7 * losses[0]
    assert result["metrics"]["format_rate"] == 1.0, "it can say nothing but a label"
    folder, (model,) = Path(result["folder"]), trained
    head = model.classifier if method == "full" else model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.shape == (3, 32)
    if method == "full":
        loaded = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
        loaded = PeftModel.from_pretrained(base, folder / "adapter")
    if method == "alpha-lora":
        RowRescale.from_file(loaded, folder / "adapter" / "alpha.safetensors")
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_head_of_an_encoder(encoder: str) -> None:
    weights = [
        loading.load_model(recipe.RECIPE, small(model=encoder, seed=seed))[0].classifier.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_padding_changes_no_choice(encoder: str) -> None:
    model, tokenizer = loading.load_model(recipe.RECIPE, small(model=encoder, task="sst2"))
    choose = Chooser(model, tokenizer, TASKS["sst2"].labels)
    prompts = [TASKS["sst2"].prompt(record) for record in sentences.generate(FAMILY, "sst2", "test", 8)]
    assert choose(prompts) == [choose([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("tt-lora", "trains nothing but its own matrices"),
        ("lora-rite", "trains nothing but its own matrices"),
        ("pissa", "changes the base model"),
        ("lora-ga", "changes the base model"),
    ],
)
def test_a_method_that_leaves_no_room_for_a_head_is_refused_for_an_encoder(
    tmp_path: Path, encoder: str, method: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"--method is {method}, which {reason}"):
        running.run(recipe.RECIPE, small(model=encoder, method=method), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_recipe_of_free_text_refuses_an_encoder(tmp_path: Path, encoder: str) -> None:
    config = llama31_gsm8k.Config(model=encoder, lr=1e-3)
    with pytest.raises(ValueError, match=r"an encoder \(bert\), which cannot write; llama31_gsm8k.py needs a decoder"):
        running.run(llama31_gsm8k.RECIPE, config, tmp_path)
    assert not [*tmp_path.iterdir()]
