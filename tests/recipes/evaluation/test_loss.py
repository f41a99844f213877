"""Losses answer by answer, against the loss that each kind of model itself computes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from support.encoding import with_wrong_answers
from support.evaluation.loss import answer_losses
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "decoder":
        config = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2))
    if kind == "encoder-decoder":
        config = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0, pad_token_id=0))
    config = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(**config, num_attention_heads=2, num_labels=3))


class Padding:
    """What the collator needs of a tokenizer."""

    pad_token_id, padding_side, deprecation_warnings = 0, "right", {}

    def pad(self, features: Any, **_: Any) -> dict[str, torch.Tensor]:
        longest = max(len(each["input_ids"]) for each in features)
        padded: dict[str, torch.Tensor] = {}
        for name in features[0]:
            values = [each[name] for each in features]
            if isinstance(values[0], int):
                padded[name] = torch.tensor(values)
            else:
                padded[name] = torch.tensor([[*map(int, each), *[0] * (longest - len(each))] for each in values])
        return padded


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "encoder"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_each_loss_is_the_one_that_the_model_gives_of_the_example_alone(kind: str, batch: int) -> None:
    model, generator = model_of(kind).train(), torch.Generator().manual_seed(1)
    examples: list[dict[str, Any]] = []
    for length in (7, 4, 9, 5, 12):
        ids = torch.randint(1, 30, (length,), generator=generator).tolist()
        labels: Any = [-100, -100, *ids[2:]] if kind == "decoder" else ids[1:4] if kind == "encoder-decoder" else 2
        examples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    found = answer_losses(model, Padding(), examples, batch)
    assert model.training
    model.eval()
    for example, (loss, tokens) in zip(examples, found, strict=True):
        alone = {name: torch.tensor([value]) for name, value in example.items()}
        counted = 1 if kind == "encoder" else sum(label != -100 for label in example["labels"])
        assert tokens == counted
        assert loss == pytest.approx(tokens * float(model(**alone).loss.detach()), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_share_of_the_answers_is_that_of_other_records(share: float) -> None:
    records = [{"prompt": str(number), "answer": f"answer {number}"} for number in range(50)]

    def right(record: dict[str, str]) -> str:
        return record["answer"]

    given = [with_wrong_answers(records, right, share)(record) for record in records]
    assert sum(answer != right(record) for answer, record in zip(given, records, strict=True)) == round(share * 50)
    assert sorted(given) == sorted(map(right, records)), "the answers change places"
    assert given == [with_wrong_answers(records, right, share)(record) for record in records], "always the same ones"
    other = {"prompt": "x", "answer": "of another split"}
    assert with_wrong_answers(records, right, share)(other) == "of another split"


@pytest.mark.parametrize(("count", "share"), [(32, 0.01), (3, 0.3), (1, 1.0)])
def test_a_share_that_would_change_no_answer_is_refused(count: int, share: float) -> None:
    with pytest.raises(ValueError, match=f"--wrong-answers is {share:g}.*give a larger share, or 0"):
        with_wrong_answers([{"answer": str(number)} for number in range(count)], lambda record: str(record), share)
