"""A model with a soft prompt is scored with it: batched, padded and from a cache, as PEFT itself answers one by one."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import log_softmax

from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.evaluation.generation import greedy
from hf_continual.evaluation.likelihood import label_likelihood
from hf_continual.tensors.reference import own_logits
from tests import toy

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [30, 31]]
KINDS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "encoder": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


def prompted(kind):
    model = get_peft_model(toy.model(), KINDS[kind]).eval()
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.mul_(20)  # so that it tells
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_model_alone(kind):
    model, tokenizer = prompted(kind), toy.tokenizer()
    found = [out.tokens for out in greedy(model, tokenizer, PROMPTS, [6, 4, 6, 5], ends=())]
    plain = [out.tokens for out in greedy(model.get_base_model(), tokenizer, PROMPTS, [6, 4, 6, 5], ends=())]
    for prompt, limit, tokens in zip(PROMPTS, (6, 4, 6, 5), found, strict=True):
        said = list(prompt)
        for _ in range(limit):
            with torch.no_grad():
                said.append(int(own_logits(model, said)[-1].argmax()))
        assert tokens == said[len(prompt) :]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            alone = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, eos_token_id=None
            )
        assert alone[0, len(prompt) :].tolist() == tokens
    assert found != plain


def test_scores_are_those_of_the_model_itself():
    model, tokenizer = prompted("prompt"), toy.tokenizer()
    rows = toy.rows("prompt_completion", number=6)
    forced = teacher_forced(model, tokenizer, rows)
    for row, score in zip(rows, forced.rows, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], 1]
        with torch.no_grad():
            logits = own_logits(model, prompt + answer)[len(prompt) - 1 : -1]
        wanted = -log_softmax(logits, -1)[range(len(answer)), answer].mean()
        assert score.also["nll"] == pytest.approx(float(wanted), rel=1e-4)
    assert [r.score for r in generated(model, tokenizer, rows).rows] == [r.score for r in forced.rows]


def test_labels_share_the_prompt_from_a_cache():
    model, tokenizer = prompted("prompt"), toy.tokenizer()
    rows = toy.rows("prompt_completion", number=4).map(lambda row, i: {"completion": f" w{i % 2}"}, with_indices=True)
    found = label_likelihood(model, tokenizer, rows, labels=[" w0", " w1"])
    for row, score in zip(rows, found.rows, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        values = {}
        for label, token in ((" w0", 4), (" w1", 5)):
            with torch.no_grad():
                logits = log_softmax(own_logits(model, [*prompt, token, 1])[len(prompt) - 1 : -1], -1)
            values[label] = float(logits[0, token] + logits[1, 1])
        assert score.prediction == max(values, key=values.get)


def test_prefix_tuning_is_refused_with_a_sentence():
    model = get_peft_model(toy.model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with pytest.raises(ValueError, match="PREFIX_TUNING.*cannot be scored here. Train a soft prompt"):
        greedy(model, toy.tokenizer(), PROMPTS, [2] * 4)
