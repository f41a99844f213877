"""Prompts as their sources have them, the loss on answers alone, masks, and generation that no batch changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from recipes.support.evaluation import prompts
from recipes.support.evaluation.generate import Generator, Sampling
from recipes.support.evaluation.prompts import Example
from recipes.support.evaluation.tokenization import IGNORED, collator, encode, prompt_tokens

WORDS = [f"w{number}" for number in range(20)]


def tokenizer_of(pad: bool, begins: bool, ends: bool = False) -> Any:
    """A word tokenizer: <pad> 0, <s> 1, </s> 2, w0 3, ...; without a padding token, with <s> or </s> put around a text."""
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = f"{'<s> ' * begins}$A{' </s>' * ends}"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


EXAMPLES = [Example("w0 w1", "w2"), Example("w3", "w4 w5 w6")]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize(("pad", "padding"), [(True, 0), (False, 2)])
def test_a_decoders_batch_is_padded_right_and_its_labels_are_answer_and_end(pad: bool, padding: int, ends: bool):
    tokenizer = tokenizer_of(pad, begins=True, ends=ends)
    batch = collator(tokenizer)([encode(tokenizer, example, 16) for example in EXAMPLES])
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 2, padding], [1, 6, 7, 8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [5, 2, IGNORED], [IGNORED] * 2 + [7, 8, 9, 2]]
    assert tokenizer.pad_token_id == (0 if pad else None)


@pytest.mark.parametrize(("pad", "padding"), [(True, 0), (False, 2)])
def test_an_encoder_decoders_batch_has_the_answer_as_labels(pad: bool, padding: int):
    tokenizer = tokenizer_of(pad, begins=False, ends=True)
    batch = collator(tokenizer)([encode(tokenizer, example, 16, encoder_decoder=True) for example in EXAMPLES])
    assert batch["input_ids"].tolist() == [[3, 4, 2], [6, 2, padding]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 2, IGNORED, IGNORED], [7, 8, 9, 2]]


def test_examples_that_are_too_long_are_left_out_and_never_cut():
    tokenizer = tokenizer_of(True, begins=True)
    assert encode(tokenizer, EXAMPLES[0], 5) is not None
    assert encode(tokenizer, EXAMPLES[0], 4) is None
    whole = tokenizer_of(True, begins=False, ends=True)
    assert encode(whole, EXAMPLES[1], 4, encoder_decoder=True) is not None
    assert encode(whole, EXAMPLES[1], 3, encoder_decoder=True) is None


def test_a_tokenizer_without_end_is_refused():
    tokenizer = tokenizer_of(True, begins=True)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode(tokenizer, EXAMPLES[0], 16)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, max_position_embeddings=64, **sizes, **special)).double()


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=23, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, dropout_rate=0.5,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double()
    with torch.no_grad():  # random T5s repeat one token; a wider spread makes answers depend on their prompts
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


MODELS = {"llama": (llama, False), "t5": (t5, True)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pad", [True, False])
def test_the_loss_of_a_padded_batch_is_that_of_its_examples(kind: str, pad: bool):
    make, encoder_decoder = MODELS[kind]
    model, tokenizer = make().eval(), tokenizer_of(pad, begins=not encoder_decoder, ends=encoder_decoder)
    encoded = [encode(tokenizer, example, 16, encoder_decoder) for example in EXAMPLES]
    together = model(**collator(tokenizer)(encoded)).loss
    counts = [sum(label != IGNORED for label in each["labels"]) for each in encoded]
    alone = [model(**collator(tokenizer)([each])).loss for each in encoded]
    expected = sum(count * loss for count, loss in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected)


TEXTS = ["w1", "w5 w6 w7 w8 w9 w10", "w2 w3", "w11 w4 w4", "w0 w1 w2 w3 w4 w5 w6 w7"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pad", [True, False])
def test_greedy_answers_in_a_batch_are_those_of_one_prompt_at_a_time(kind: str, pad: bool):
    make, encoder_decoder = MODELS[kind]
    model, tokenizer = make().train(), tokenizer_of(pad, begins=not encoder_decoder, ends=encoder_decoder)
    generate = Generator(model, tokenizer, 12)
    together = generate(TEXTS)
    assert together == [generate([text])[0] for text in TEXTS]
    assert len(set(together)) > 1
    assert model.training
    # an oracle without generate, cache, padding or batch: the likeliest token, one after the other
    model.eval()
    for text, answer in zip(TEXTS, together, strict=True):
        tokens, told = prompt_tokens(tokenizer, text, encoder_decoder), [0]
        found: list[int] = []
        while len(found) < 12:
            if encoder_decoder:
                logits = model(input_ids=torch.tensor([tokens]), decoder_input_ids=torch.tensor([told + found])).logits
            else:
                logits = model(input_ids=torch.tensor([tokens + found])).logits
            found.append(int(logits[0, -1].argmax()))
            if found[-1] == 2:
                break
        assert answer == tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_greedy_and_sampling_has_no_top_k_whatever_the_model_says(kind: str):
    make, encoder_decoder = MODELS[kind]
    model, tokenizer = make(), tokenizer_of(True, begins=not encoder_decoder, ends=encoder_decoder)
    plain, hot = Generator(model, tokenizer, 8), Generator(model, tokenizer, 8, Sampling(temperature=50.0, top_p=1.0))
    greedy, sampled = plain(TEXTS), hot(TEXTS)
    told = model.generation_config
    told.do_sample, told.temperature, told.top_k, told.top_p, told.repetition_penalty = True, 9.0, 1, 0.1, 5.0
    assert Generator(model, tokenizer, 8)(TEXTS) == greedy
    assert Generator(model, tokenizer, 8, Sampling(temperature=50.0, top_p=1.0))(TEXTS) == sampled != greedy


@pytest.mark.parametrize("kind", MODELS)
def test_each_token_costs_one_position_also_where_a_model_was_saved_without_its_cache(kind: str):
    make, encoder_decoder = MODELS[kind]
    model, tokenizer = make(), tokenizer_of(True, begins=not encoder_decoder, ends=encoder_decoder)
    expected = Generator(model, tokenizer, 8)(TEXTS)
    model.config.use_cache = model.generation_config.use_cache = False
    decoder = model.model.layers[0].mlp if kind == "llama" else model.decoder.block[0].layer[-1]
    positions: list[int] = []
    decoder.register_forward_hook(lambda _module, inputs, _output: positions.append(inputs[0].shape[1]))
    assert Generator(model, tokenizer, 8)(TEXTS) == expected
    assert len(positions) > 1
    assert set(positions[1:]) == {1}


def test_a_sampled_batch_depends_on_seed_and_number_alone():
    model, tokenizer = llama(), tokenizer_of(True, begins=True)
    generate = Generator(model, tokenizer, 8, Sampling(seed=3))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = generate(TEXTS, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(TEXTS, 0) == first
    others = [generate(TEXTS, 1), Generator(model, tokenizer, 8, Sampling(seed=4))(TEXTS, 0)]
    assert first not in others
    assert others[0] != others[1]


def test_what_does_not_fit_and_impossible_settings_are_refused():
    model, tokenizer = llama(), tokenizer_of(True, begins=True)
    with pytest.raises(
        ValueError, match="a prompt of 9 tokens and 60 new ones do not fit into the model's 64 positions"
    ):
        Generator(model, tokenizer, 60)([TEXTS[-1]])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Generator(model, tokenizer, 0)
    for settings in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Sampling(**settings)


# -- prompts ----------------------------------------------------------------------------------------------------------

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nDo it.\n\n### Response:\n"
)


def test_mathematics():
    row = {"type": "GSM_Rephrased", "query": "How many?", "response": "Two.\n#### 2\nThe answer is: 2"}
    assert prompts.metamath(row) == Example("Q: How many?\nA: ", "Two.\n#### 2")
    assert prompts.metamath({**row, "type": "MATH_AnsAug"}) is None
    assert prompts.gsm8k({"question": "How many?", "answer": "#### 2"}) == Example("Q: How many?\nA: ", "#### 2")


def test_instructions():
    assert prompts.wizardlm({"instruction": "Do it.", "output": "Done."}) == Example(ALPACA, "Done.")
    for refusal in ("I am Sorry.", "As an AI model"):
        assert prompts.wizardlm({"instruction": "Do it.", "output": refusal}) is None
    assert prompts.mt_bench_prompt(["Do it."]) == ALPACA
    second = f"{ALPACA}Done.\n\n### Instruction:\nAgain.\n\n### Response:\n"
    assert prompts.mt_bench_prompt(["Do it.", "Done.", "Again."]) == second
    with pytest.raises(ValueError, match="2 turns does not end with the user's"):
        prompts.mt_bench_prompt(["Do it.", "Done."])


def test_code():
    row = {"query": "Do it.", "answer": "So:\n```python\nx\n```\nand\n```\ny\n```"}
    assert prompts.codefeedback(row) == Example(ALPACA, "So:\n```python\nx\n```")
    assert prompts.codefeedback({**row, "answer": "no code"}) is None
    asked = prompts.humaneval_prompt({"prompt": "def f():\n"})
    assert asked.startswith(ALPACA.split("Do it.")[0] + "Complete the following Python code: \n")
    assert asked.endswith("code:\n```python\ndef f():\n\n```\n\n### Response:\n```python\n")
