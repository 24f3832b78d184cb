"""Likelihoods and generation against lm-eval's own, in process on the same model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM

from hf_continual.evaluation.exact_match import generated
from hf_continual.evaluation.generation import greedy
from hf_continual.evaluation.likelihood import _as_lm_eval, log_likelihoods, multiple_choice
from tests import toy
from tests.evaluation.templates import FAMILIES, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
CHOICES = ["blue", "blue red", "red", " green", "blue red green"]


def contexts(made):
    first = made.bos_token or made.eos_token
    return ["what colour ?", "the sky is ", "the grass:\n", "", f"{first}the sea", "the sky is b"]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
def test_likelihoods_are_lm_evals(name, adds_bos):
    made = tokenizer(name, adds_bos)
    model = toy.model(vocab_size=len(made)).eval()
    texts = contexts(made)
    pairs = [[_as_lm_eval(context, " " + choice, made) for choice in CHOICES] for context in texts]
    with torch.inference_mode():
        wrapped = HFLM(pretrained=model, tokenizer=made, batch_size=4)
        asked = [SimpleNamespace(args=(context, " " + choice)) for context in texts for choice in CHOICES]
        theirs = [value for value, _ in wrapped.loglikelihood(asked, disable_tqdm=True)]
    for size in (1, 4):
        ours = [value for row in log_likelihoods(model, made, pairs, size) for value, _ in row]
        assert ours == pytest.approx(theirs, abs=2e-4)
    rows = Dataset.from_list([{"context": c, "choices": CHOICES, "answer": 1} for c in texts])
    for normalise, sizes in (("sum", [1] * 5), ("characters", [len(c) for c in CHOICES])):
        best = [max(range(5), key=lambda k: theirs[5 * i + k] / sizes[k]) for i in range(len(texts))]
        scored = multiple_choice(model, made, rows, normalise)
        assert [CHOICES.index(r.prediction) for r in scored.rows] == best
        assert scored.right == [k == 1 for k in best]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "phi3"])
def test_generation_is_lm_evals(name, adds_bos):
    made = tokenizer(name, adds_bos)
    model = toy.model(vocab_size=len(made), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.generation_config.eos_token_id = made.convert_tokens_to_ids(list(FAMILIES[name].stops))
    rows = Dataset.from_list(
        [{"prompt": p, "completion": " blue"} for p in ("what colour ?", "the sky", "red", "a b c")]
    )
    ours = generated(model, made, rows, batch_size=3, max_new_tokens=12, stop=["e"])
    wrapped = HFLM(pretrained=model, tokenizer=made, batch_size=1)
    until = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    asked = [SimpleNamespace(args=(row["prompt"], until)) for row in rows]
    theirs = wrapped.generate_until(asked, disable_tqdm=True)
    assert [r.prediction for r in ours.rows] == theirs
    alone = [greedy(model, made, [made(row["prompt"])["input_ids"]], [12], stop=["e"])[0].text for row in rows]
    assert alone == theirs
