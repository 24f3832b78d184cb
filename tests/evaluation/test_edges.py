"""Edges of scoring: no rows, empty answers, rows that are too long or cut, NaN, labels that cannot be told apart."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
)

from hf_continual.data.self_generated import own_words
from hf_continual.ends import added_tokens, end_tokens, padding_token
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.evaluation.general import general_loss
from hf_continual.evaluation.generation import greedy
from hf_continual.evaluation.likelihood import choice_log_likelihoods, label_likelihood, multiple_choice
from hf_continual.evaluation.prompts import encode
from hf_continual.evaluation.table import build_scorer, columns_of
from hf_continual.evaluation.trained import trained_tokens
from tests import toy
from tests.evaluation.scripted import scripted
from tests.evaluation.templates import tokenizer

TEXTS = [("what colour is the sky ?", " blue"), ("the grass ?", " blue red"), ("the sea ?", " red")]


def rows_of(pairs):
    return Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])


def learned(made, rows, **kwargs):
    split = [trained_tokens(row, made) for row in rows]
    return scripted(
        len(made), made.convert_tokens_to_ids("z"), [(p + a, [-100] * len(p) + a) for p, a in split], **kwargs
    )


@pytest.fixture(scope="module")
def made():
    return tokenizer("llama3")


def test_no_rows_are_no_measurement(made):
    none, model = Dataset.from_list([]), scripted(len(made), 0)
    for scorer in (teacher_forced, generated, label_likelihood):
        assert scorer(model, made, none).score.status == "NOT_RUN"
    assert general_loss(model, made, []).score.status == "NOT_RUN"


def test_rows_that_cannot_be_scored_are_counted(made, caplog):
    model = scripted(len(made), 0)
    with pytest.raises(
        ValueError, match=r"the prompt '' has no tokens before the answer.*row 1, and 2 of 3 rows in all"
    ):
        teacher_forced(model, made, rows_of([("a", " b"), ("", " b"), ("", " c")]))
    with pytest.raises(ValueError, match="all 2 rows have an empty answer"):
        generated(model, made, rows_of([("a", ""), ("b", " ")]))
    mixed = rows_of([("a", " blue"), ("b", "")])
    with caplog.at_level(logging.WARNING):
        assert teacher_forced(learned(made, mixed), made, mixed).right == [True, True]
    assert "1 of 2 rows have an empty answer (the first is row 1)" in caplog.text
    said = [{"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    for row, message in (
        ({"prompt": "a", "completion": answer}, "the prompt is of type str and the completion of type list"),
        ({"prompt": said, "completion": [*answer, *said, *answer]}, "a completion of 3 messages is not one answer"),
        ({"messages": said}, "this row has 1 and ends with role 'user'"),
        ({"messages": [*said, *answer, *said]}, "this row has 3 and ends with role 'user'"),
        ({"text": "a"}, "needs 'prompt' and 'completion', but this one has ..text'."),
    ):
        with pytest.raises(ValueError, match=message):
            teacher_forced(model, made, [row])
    bare = tokenizer("llama3")
    bare.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end-of-sequence token"):
        encode({"prompt": "a", "completion": " b"}, bare)


def test_a_template_that_leaves_the_answer_out_is_refused(made):
    deaf = tokenizer("chatml-special")
    deaf.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    )
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="the chat template leaves the text of the last message out"):
        teacher_forced(scripted(len(deaf), 0), deaf, [row])


def test_limits_that_cut_are_said(made, caplog):
    rows = rows_of(TEXTS)
    model = learned(made, rows)
    most = len(encode(rows[0], made)[1])
    with caplog.at_level(logging.WARNING):
        cut = generated(model, made, rows, max_new_tokens=most)
    assert cut.right == [True, False, True] and [r.also for r in cut.rows] == [{}, {"cut": 1.0}, {}]
    assert f"max_new_tokens={most} cuts 1 of 3 answers short" in caplog.text
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens={wrong} leaves no room"):
            generated(model, made, rows, max_new_tokens=wrong)


def test_stop_strings(made, caplog):
    rows = rows_of([("sky ?", " blue\n"), ("grass ?", " green\n"), ("both ?", " blue\ngreen\n")])
    model = learned(made, rows)
    with caplog.at_level(logging.WARNING):
        scored = generated(model, made, rows, stop="\n")
    assert scored.right == [True, True, False] and [r.prediction for r in scored.rows] == [" blue", " green", " blue"]
    assert "1 of 3 answers contain a stop string before their end" in caplog.text
    named = generated(model, made, rows, match="exact", stop=["<|end_of_text|>"])
    assert named.right == [True] * 3  # a stop string that is a token
    with pytest.raises(ValueError, match="stop contains an empty string"):
        generated(model, made, rows, stop=["\n", ""])


@pytest.mark.parametrize("cached", [True, False])
def test_logits_that_are_not_numbers_never_score(made, cached):
    rows = rows_of(TEXTS)
    model = learned(made, rows, cached=cached)
    model.head.weight.data[0] = float("nan")
    choices = Dataset.from_list([{"context": "a", "choices": ["b", "c"], "answer": 0}])
    for call in (
        lambda: teacher_forced(model, made, rows), lambda: generated(model, made, rows),
        lambda: label_likelihood(model, made, rows), lambda: multiple_choice(model, made, choices),
        lambda: general_loss(model, made, ["blue red"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="logits are not numbers"):
            call()
    with pytest.raises(ValueError, match="the metric <lambda> returned scores that are not numbers"):
        build_scorer(lambda model, tokenizer, rows: [float("nan")] * 3)(model, made, rows)


def test_labels_that_cannot_be_chosen_are_refused(made):
    rows = rows_of(TEXTS)
    model = learned(made, rows)
    given = label_likelihood(model, made, rows, [" red", " blue", " blue red", " blue red green"])
    assert given.right == [True] * 3
    with pytest.raises(ValueError, match="' blue red' is not one of the labels"):
        label_likelihood(model, made, rows, [" red", " blue"])
    with pytest.raises(ValueError, match="labels=' blue' is a single text"):
        label_likelihood(model, made, rows, " blue")
    spoken = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]} for c in ("b", "b ")
    ]
    with pytest.raises(ValueError, match="the labels 'b' and 'b ' have the same tokens"):  # the template strips
        label_likelihood(model, made, spoken)
    wrong = Dataset.from_list([{"context": "a", "choices": ["b", "c"], "answer": 2}])
    with pytest.raises(ValueError, match="row 0 has the answer 2, and 2 choices"):
        multiple_choice(model, made, wrong)


def test_rows_longer_than_the_model(made, caplog):
    rows = rows_of([("w1 " * 20, " w2")])
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=64, n_positions=16))
    with pytest.raises(
        ValueError, match="1 of 1 rows take up to 22 tokens with their answer, but the model has 16 positions"
    ):
        teacher_forced(model, toy.tokenizer(), rows)
    with caplog.at_level(logging.WARNING):
        teacher_forced(toy.model(max_position_embeddings=16), toy.tokenizer(), rows)
    assert "it was not made for texts of this length" in caplog.text
    fits = rows_of([("w1 " * 14, " w2")])
    generated(model, toy.tokenizer(), fits, max_new_tokens=50)  # as far as the table goes


def hybrid(name):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1)  # fmt: skip
    if name == "lfm2":
        return Lfm2ForCausalLM(Lfm2Config(**shape, layer_types=["conv", "full_attention"])).eval()
    options = dict(layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_state=8, mamba_d_head=8, mamba_expand=2, num_local_experts=0, shared_intermediate_size=64)  # fmt: skip
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**shape, **options)).eval()


@pytest.mark.parametrize("name", ["lfm2", "granite-hybrid"])
def test_states_that_are_not_keys_are_not_continued_by_rows(name):
    model, made = hybrid(name), toy.tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    texts = toy.rows("prompt_completion", number=6, seed=2)["prompt"][:]
    choices = [[" w3", " w4 w5 w6", " w7 w8"]] * 6
    shared = choice_log_likelihoods(model, made, texts, choices, 4)
    alone = [
        choice_log_likelihoods(model, made, [t], [c], 1, share_prompt=False)[0]
        for t, c in zip(texts, choices, strict=True)
    ]
    for one, other in zip(shared, alone, strict=True):
        assert [v for v, _ in one] == pytest.approx([v for v, _ in other], rel=1e-4)
    prompts = [made(t)["input_ids"] for t in texts]
    batched = greedy(model, made, prompts, [6] * 6, batch_size=4)
    assert [o.tokens for o in batched] == [greedy(model, made, [p], [6])[0].tokens for p in prompts]


def test_ends_come_from_everywhere():
    made, model = tokenizer("llama3"), toy.model()
    model.generation_config.eos_token_id = None
    assert end_tokens(model, made) == {made.eos_token_id} == end_tokens(None, made)
    model.generation_config.eos_token_id = [5, 7]
    assert end_tokens(model, made) == {5, 7, made.eos_token_id}
    model.generation_config.eos_token_id = torch.tensor(5)
    assert end_tokens(model, made) == {5, made.eos_token_id}
    assert made.convert_tokens_to_ids("<|eot_id|>") in added_tokens(made).special
    made.pad_token = None
    assert padding_token(made) == made.eos_token_id
    unknown = toy.tokenizer()
    unknown.unk_token = "w0"
    assert (
        unknown.unk_token_id not in added_tokens(unknown).special
    )  # a word that the tokenizer does not know is not empty


def test_own_words_have_no_special_tokens():
    made = tokenizer("llama3", adds_bos=True)
    model = toy.model(vocab_size=len(made))
    model.generation_config.eos_token_id = [made.convert_tokens_to_ids("<|eot_id|>"), made.convert_tokens_to_ids("e")]
    texts = own_words(model, made, 3, 60, seed=0, batch_size=16)
    assert not any(token in text for text in texts for token in made.all_special_tokens)
    assert all("e" not in text[8:] or " " in text for text in texts)


def test_columns_of_conversations():
    assert columns_of("exact_match", ["messages"]) == ("messages",)
    assert columns_of("exact_match", ["messages", "prompt", "completion"]) == ("prompt", "completion")
    assert columns_of("multiple_choice", ["messages"]) == ("context", "choices", "answer")
