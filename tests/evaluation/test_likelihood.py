"""Likelihoods of choices: the shared prompt against whole sequences, and against lm-eval's own numbers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_continual.evaluation.harness import lm_eval
from hf_continual.evaluation.likelihood import answer_nll, choice_log_likelihoods, label_likelihood, multiple_choice
from tests import toy

LABELS = [" w3", " w4 w5 w6", " w7 w8"]


def prompts(number=7):
    return toy.rows("prompt_completion", number=number, seed=3)["prompt"][:]


def by_hand(model, prompt, choice):
    tokenizer = toy.tokenizer()
    first, rest = (tokenizer(text)["input_ids"] for text in (prompt, choice))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([first + rest])).logits[0].log_softmax(-1)
    return sum(float(logits[len(first) + i - 1, t]) for i, t in enumerate(rest)), len(rest)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_shared_prompt_changes_nothing(family, share, batch_size):
    torch.manual_seed(0)
    model = (
        toy.model()
        if family == "llama"
        else GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1))
    ).eval()
    choices = [LABELS[: 2 + i % 2] for i in range(7)]
    got = choice_log_likelihoods(model, toy.tokenizer(), prompts(), choices, batch_size, share_prompt=share)
    for prompt, offered, values in zip(prompts(), choices, got, strict=True):
        wanted = [by_hand(model, prompt, choice) for choice in offered]
        assert [n for _, n in values] == [n for _, n in wanted]
        assert [v for v, _ in values] == pytest.approx([v for v, _ in wanted], abs=1e-4)


def test_a_prompt_is_computed_once_for_all_its_choices(monkeypatch):
    model, seen = toy.model(), []
    forward = model.model.forward

    def counted(*args, **kwargs):
        seen.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    choice_log_likelihoods(model, toy.tokenizer(), prompts(4), [LABELS] * 4, 4)
    shared, seen[:] = sum(seen), []
    choice_log_likelihoods(model, toy.tokenizer(), prompts(4), [LABELS] * 4, 4, share_prompt=False)
    assert shared < 0.6 * sum(seen)


class Joins:
    """A tokenizer that joins the last letter of the prompt with the first of the answer."""

    eos_token_id = 1

    def __call__(self, text):
        return {"input_ids": toy.tokenizer()(text.replace("w2 w3", "w9"))["input_ids"]}


def test_tokens_that_straddle_the_boundary():
    model = toy.model().eval()
    (values,) = choice_log_likelihoods(model, Joins(), ["w1 w2"], [[" w3", " w4"]])
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[5]])).logits[0, -1].log_softmax(-1)
        pair = model(input_ids=torch.tensor([[5, 6]])).logits[0].log_softmax(-1)
    assert values[0] == (pytest.approx(float(first[13]), abs=1e-5), 1)  # w9 stands for the prompt's end and the choice
    assert values[1][0] == pytest.approx(float(pair[1, 8]), abs=1e-5) and values[1][1] == 1


def test_labels():
    model, rows = toy.model(), [{"prompt": p, "completion": LABELS[i % 3]} for i, p in enumerate(prompts())]
    scored = label_likelihood(model, toy.tokenizer(), Dataset.from_list(rows))
    values = choice_log_likelihoods(model, toy.tokenizer(), prompts(), [sorted(LABELS)] * 7)
    best = [max(zip(v, sorted(LABELS), strict=True))[1] for v in values]
    assert [r.prediction for r in scored.rows] == best and scored.protocol == "most likely of 3 labels, by sum"
    tokens = label_likelihood(model, toy.tokenizer(), Dataset.from_list(rows), LABELS, "tokens")
    assert {r.prediction for r in tokens.rows} <= set(LABELS)
    with pytest.raises(ValueError, match="' w3' is not one of the labels"):
        label_likelihood(model, toy.tokenizer(), Dataset.from_list(rows), [" w4 w5 w6"])
    with pytest.raises(ValueError, match="normalise='words' must be one of"):
        label_likelihood(model, toy.tokenizer(), Dataset.from_list(rows), LABELS, "words")  # type: ignore[arg-type]


def choice_rows():
    return [{"context": p, "choices": [c.strip() for c in LABELS], "answer": i % 3} for i, p in enumerate(prompts(12))]


TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_multiple_choice_is_lm_evals(tmp_path):
    rows, model, tokenizer = Dataset.from_list(choice_rows()), toy.model(), toy.tokenizer()
    rows.to_json(tmp_path / "rows.jsonl")
    (tmp_path / "toy_choice.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    for metric, normalise in (("acc", "sum"), ("acc_norm", "characters")):
        theirs = lm_eval(model, tokenizer, task="toy_choice", metric=metric, include_path=str(tmp_path))
        ours = multiple_choice(model, tokenizer, rows, normalise)
        assert [r.score for r in ours.rows] == [r.score for r in theirs.rows]
        assert 0 < ours.score.value < 1 and theirs.protocol == f"lm_eval toy_choice, {metric}"
    with pytest.raises(ValueError, match="knows no task 'nothing'"):
        lm_eval(model, tokenizer, task="nothing")
    with pytest.raises(ValueError, match="has no metric 'f1'"):
        lm_eval(model, tokenizer, task="toy_choice", metric="f1", include_path=str(tmp_path))


def test_answer_nll_is_a_loss():
    rows = toy.rows("prompt_completion", number=4)
    scored = answer_nll(toy.model(), toy.tokenizer(), rows)
    assert scored.lower_is_better and scored.score.value == pytest.approx(scored.nll.value)
