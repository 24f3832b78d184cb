"""Scoring inside a run leaves every module in the mode that it was in, not just the model as a whole."""

from __future__ import annotations

import pytest
import torch

from hf_continual.data.sampling import Sampling, sample
from hf_continual.evaluation.prompts import evaluating
from hf_continual.tensors.modes import evaluation_mode
from hf_continual.tensors.reference import as_reference
from tests import toy


def modes(model):
    return [module.training for module in model.modules()]


def samples(model):
    sample(model, toy.tokenizer(), [5], 1, (0,), Sampling(max_new_tokens=2), frozenset({1}))


@pytest.mark.parametrize(
    "scored", [evaluation_mode, evaluating, lambda model: as_reference(model, "task_start"), samples]
)
def test_a_module_that_was_in_evaluation_mode_stays_there(scored):
    model = toy.model().train()
    model.model.layers[0].eval()
    before = modes(model)
    if scored is samples:
        samples(model)
    else:
        with pytest.raises(ZeroDivisionError), scored(model):
            assert not any(modes(model))
            raise ZeroDivisionError
    assert modes(model) == before and len(set(before)) == 2


def test_an_error_inside_leaves_gradients_on():
    model = toy.model()
    with pytest.raises(ZeroDivisionError), as_reference(model, "task_start"):
        raise ZeroDivisionError
    assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())
