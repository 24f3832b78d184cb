"""Scoring on real chat templates against SFTTrainer's tokens, `model.generate` and plain decoding.

Models are scripted: they answer exactly what SFTTrainer would have trained, token by token.
"""

from __future__ import annotations

import functools
import itertools
import tempfile

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualTrainer
from hf_continual.ends import added_tokens, end_tokens
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.evaluation.frame import frame_of
from hf_continual.evaluation.general import general_loss
from hf_continual.evaluation.likelihood import label_likelihood
from hf_continual.evaluation.prompts import encode
from hf_continual.evaluation.questions import read_questions
from hf_continual.evaluation.trained import reference, rendered, trained_tokens
from tests import toy
from tests.evaluation.scripted import scripted
from tests.evaluation.templates import FAMILIES, tokenizer

# Answers of which one is a prefix of another, so that only an end tells them apart.
PAIRS = [("what colour is the sky ?", "blue red"), ("and the grass ?", "blue"), ("the sea, then ?", "blue red green")]
KINDS = ["text", "conversation", "messages", "from_value", "turns", "rendered"]


def say(role, content):
    return {"role": role, "content": content}


def rows_of(kind, made, end):
    """The pairs as rows of a kind."""
    chats = [([say("user", q)], [say("assistant", a)]) for q, a in PAIRS]
    if kind == "text":
        return Dataset.from_list([{"prompt": q, "completion": " " + a} for q, a in PAIRS])
    if kind == "turns":
        before = [say("user", "hello"), say("assistant", "blue")]
        return Dataset.from_list([{"prompt": before + q, "completion": a} for q, a in chats])
    if kind == "messages":
        return Dataset.from_list([{"messages": q + a} for q, a in chats])
    if kind == "from_value":
        told = [[{"from": m["role"], "value": m["content"]} for m in q + a] for q, a in chats]
        return Dataset.from_list([{"conversations": messages} for messages in told])
    if kind == "rendered":  # by hand: with a BOS in the text, and one more where the tokenizer adds it
        shown = [rendered({}, made, q, True, tokenize=False) for q, _ in chats]
        ends = [a[0]["content"] + (end or "") for _, a in chats]
        return Dataset.from_list([{"prompt": q, "completion": a} for q, a in zip(shown, ends, strict=True)])
    return Dataset.from_list([{"prompt": q, "completion": a} for q, a in chats])


@functools.cache
def _trainer_parts():
    config = SFTConfig(tempfile.mkdtemp(), report_to=[], bf16=False, use_cpu=True, disable_tqdm=True, max_length=None)
    return toy.model(), config


@functools.cache
def cell(name, kind, adds_bos):
    """Tokenizer, rows, and the tokens and labels that SFTTrainer makes of them."""
    made = tokenizer(name, adds_bos)
    rows = rows_of(kind, made, FAMILIES[name].end)
    model, config = _trainer_parts()
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=made)
    prepared = trainer.train_dataset
    return made, rows, [(row["input_ids"], row["labels"]) for row in prepared]


def taught(name, made, learned, cached=True):
    """A model that has learned these sequences, with the generation config of its family."""
    model = scripted(len(made), made.convert_tokens_to_ids("z"), learned, cached)
    model.generation_config.eos_token_id = made.convert_tokens_to_ids(list(FAMILIES[name].stops))
    # Neither may matter: settings of a checkpoint are not those of a measurement.
    model.generation_config.cache_implementation = "static"
    model.generation_config.repetition_penalty = 9.0
    return model


def covering():
    """Every family with half of the kinds, every pair of neighbouring families with all, the other choices in turn."""
    for (i, name), (j, kind) in itertools.product(enumerate(FAMILIES), enumerate(KINDS)):
        if (i + j) % 2 == 0:
            yield pytest.param(name, kind, bool((i // 2 + j) % 2), bool((i + j // 2) % 3), id=f"{name}-{kind}")


def product():
    for name, kind, bos, cached in itertools.product(FAMILIES, KINDS, (False, True), (False, True)):
        yield pytest.param(name, kind, bos, cached, id=f"{name}-{kind}-{bos}-{cached}")


def check_cell(name, kind, adds_bos, cached):
    made, rows, prepared = cell(name, kind, adds_bos)
    for row, (ids, labels) in zip(rows, prepared, strict=True):
        prompt, completion = trained_tokens(row, made)
        assert prompt + completion == ids
        if "messages" not in row and "conversations" not in row:
            assert [-100] * len(prompt) + completion == labels
        assert completion[: len(encode(row, made)[1])] == encode(row, made)[1]
    model = taught(name, made, prepared, cached)
    for size in (1, 8):
        forced = teacher_forced(model, made, rows, size)
        assert forced.right == [True] * 3, [r.prediction for r in forced.rows]
        assert forced.nll.value < 1e-3
    for match in (None, "exact", "stripped", "normalized", "prefix", "rougeL"):
        said = generated(model, made, rows, 2, match=match)
        assert said.right == [True] * 3, (match, [r.prediction for r in said.rows])
        assert [r.prediction.strip() for r in said.rows] == [r.prediction.strip() for r in forced.rows]
        if kind != "rendered":
            assert [r.prediction.strip() for r in said.rows] == [a for _, a in PAIRS]
    assert generated(model, made, rows, max_new_tokens=40).right == [True] * 3
    chosen = label_likelihood(model, made, rows)
    assert chosen.right == [True] * 3 and [r.reference for r in chosen.rows] == [reference(row) for row in rows]
    as_generate_says(model, made, rows)
    ignorant = taught(name, made, [], cached)
    for scored in (teacher_forced(ignorant, made, rows), generated(ignorant, made, rows)):
        assert scored.right == [False] * 3
    assert generated(ignorant, made, rows, match="prefix").right == [False] * 3
    knows_one_answer(name, made, rows, cached)


def as_generate_says(model, made, rows):
    """The text of `model.generate` and plain decoding is the answer, with what the template writes before it."""
    for row, question in zip(rows, read_questions(model, made, rows), strict=True):
        prompt = torch.tensor([question.prompt])
        config = dict(do_sample=False, repetition_penalty=1.0, cache_implementation=None, pad_token_id=0)
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(question.answer),
            eos_token_id=sorted(question.ends), **config,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        assert out == question.answer and question.accepts(out)
        lead = frame_of(row, made, end_tokens(model, made), added_tokens(made))
        plain = made.decode([i for i in out if i not in question.ends])
        assert plain.startswith(lead.lead + reference(row).strip()) or question.wanted(made) in plain


def knows_one_answer(name, made, rows, cached):
    """A model that answers every prompt with the answer of one row has that row right alone."""
    first = trained_tokens(rows[1], made)[1]
    same = [(p + first, [-100] * len(p) + first) for p in (trained_tokens(row, made)[0] for row in rows)]
    model = taught(name, made, same, cached)
    right = [False, True, False]
    assert teacher_forced(model, made, rows).right == right
    assert generated(model, made, rows).right == generated(model, made, rows, match="exact").right == right
    assert label_likelihood(model, made, rows).right == right


@pytest.mark.parametrize(("name", "kind", "adds_bos", "cached"), list(covering()))
def test_what_was_trained_is_what_is_scored(name, kind, adds_bos, cached):
    check_cell(name, kind, adds_bos, cached)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "kind", "adds_bos", "cached"), list(product()))
def test_every_cell(name, kind, adds_bos, cached):
    check_cell(name, kind, adds_bos, cached)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_ends_turns_as_it_is_known_to(name):
    made, rows, _ = cell(name, "conversation", True)
    end = FAMILIES[name].end
    frame = frame_of(rows[0], made, end_tokens(None, made), added_tokens(made))
    assert frame.end == (None if end is None else made.convert_tokens_to_ids(end))
    prompt, answer = encode(rows[0], made)
    assert made.bos_token_id is None or prompt.count(made.bos_token_id) <= 1  # the template's, and no second one
    assert answer[-1] == frame.end or made.decode(answer).endswith("<|im_end|>\n")


def test_thoughts_before_an_answer_are_not_part_of_it():
    for name, said, wanted in (
        ("qwen3", "<think>\nhm, the sky\n</think>\n\nblue red<|im_end|>", "blue red"),
        ("qwen3", "blue red<|im_end|>", "blue red"),
        ("qwen3", "<think>\nhm, the sky", "<think>\nhm, the sky"),
        ("gpt-oss", "<|channel|>analysis<|message|>sky<|end|><|start|>assistant<|channel|>final<|message|>blue<|return|>", "blue"),
        ("chatml-text", "blue<|im_end|>\n<|im_start|>user", "blue"),
    ):  # fmt: skip
        made, rows, _ = cell(name, "conversation", False)
        question = read_questions(taught(name, made, []), made, rows)[0]
        assert question.text(made(said, add_special_tokens=False)["input_ids"], made) == wanted
    made, _, _ = cell("qwen3", "conversation", False)
    thought = {"prompt": [say("user", "q")], "completion": [say("assistant", "<think>\nhm\n</think>\n\nblue")]}
    prompt, answer = encode(thought, made)
    assert made.decode(answer) == "<think>\nhm\n</think>\n\nblue<|im_end|>"
    model = taught("qwen3", made, [(prompt + answer, [-100] * len(prompt) + answer)])
    scored = generated(model, made, Dataset.from_list([thought]), match="exact")
    assert scored.right == [True] and scored.rows[0].prediction == "blue"
    off = {**thought, "chat_template_kwargs": {"enable_thinking": False}}
    off["completion"] = [say("assistant", "blue")]
    assert made.decode(encode(off, made)[1]) == "blue<|im_end|>"  # the empty block is in the prompt then


def test_any_end_ends_an_answer():
    made, rows, prepared = cell("qwen2.5", "conversation", False)
    swap = {made.convert_tokens_to_ids("<|im_end|>"): made.eos_token_id}
    other = [([*ids[:-2], swap[ids[-2]]], [*labels[:-2], swap[labels[-2]]]) for ids, labels in prepared]
    model = taught("qwen2.5", made, other)
    assert teacher_forced(model, made, rows).right == generated(model, made, rows).right == [True] * 3
    endless = [(ids[:-2], labels[:-2]) for ids, labels in prepared]
    model = taught("qwen2.5", made, endless)
    assert teacher_forced(model, made, rows).right == generated(model, made, rows).right == [False] * 3


def test_general_text_has_the_first_token_of_training():
    for adds_bos in (False, True):
        made = tokenizer("llama3", adds_bos)
        ids = made("blue red")["input_ids"]
        assert (ids[0] == made.bos_token_id) == adds_bos
        model = scripted(len(made), 0, [(ids, ids)])
        assert general_loss(model, made, ["blue red"]).score.value < 1e-3
        assert general_loss(model, made, ["blue red"]).score.n == len(ids) - 1


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_rows_that_a_trainer_has_learned_score_one(name, tmp_path):
    made, rows = tokenizer(name), rows_of("conversation", tokenizer(name), None)
    args = SFTConfig(**toy.settings(tmp_path, max_steps=60, learning_rate=1e-2, logging_strategy="no"))
    model = toy.model(
        vocab_size=len(made), eos_token_id=made.eos_token_id, num_hidden_layers=2, max_position_embeddings=512
    )
    before = teacher_forced(model, made, rows).right + generated(model, made, rows).right
    ContinualTrainer(model, args, train_dataset=rows, processing_class=made).train()
    assert before == [False] * 6
    assert teacher_forced(model, made, rows).right == generated(model, made, rows).right == [True] * 3
    assert generated(model, made, rows, match="exact").right == label_likelihood(model, made, rows).right == [True] * 3
