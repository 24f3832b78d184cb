"""A gauge's values against full logits, the scorers of plans, and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_continual.ends import padding_token
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.evaluation.general import general_loss
from hf_continual.evaluation.likelihood import answer_nll
from hf_continual.gauges import measure, probe
from hf_continual.gauges.measure import Base, divergence, measured, record
from hf_continual.gauges.probe import ProbeRow, batches, probe_rows
from hf_continual.gauges.values import ratio, values_of
from hf_continual.tensors.reference import as_reference
from tests import toy


def moved(model, by=0.3):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p) * (p.std() if p.numel() > 1 and p.std() > 0 else 1.0))
    return model


def lora():
    torch.manual_seed(1)
    return get_peft_model(toy.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def gauge(model, rows, base=None, size=3):
    """All batches of a gauge, in the order of the rows."""
    device, pad = torch.device("cpu"), padding_token(toy.tokenizer())
    found = torch.zeros(len(rows), 4, dtype=torch.float64)
    with as_reference(model, "task_start"):
        for batch in batches(rows, range(len(rows)), size):
            found[batch] = measured(model, rows, batch, base, device, pad)
    return found.numpy()


def recorded(model, rows, size=3):
    base = Base(model)
    with as_reference(model, "task_start"):
        for batch in batches(rows, range(len(rows)), size):
            record(model, rows, batch, base, torch.device("cpu"), padding_token(toy.tokenizer()))
    return base


def by_hand(model, base_logits, rows):
    """Loss and KL from the whole logits of each row alone, in float64."""
    losses, kls = [], []
    for row, old in zip(rows, base_logits, strict=True):
        with torch.no_grad():
            logp = model.eval()(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        for t in range(1, len(row.ids)):
            if row.predicted[t]:
                losses.append(-logp[t - 1, row.ids[t]])
                p = old[t - 1].double().log_softmax(-1)
                kls.append((p.exp() * (p - logp[t - 1])).sum())
    return float(torch.stack(losses).mean()), float(torch.stack(kls).mean())


@pytest.mark.parametrize("kind", ["full", "lora", "trained head"])
@pytest.mark.parametrize("chunk", [2, 64])
def test_loss_and_kl_are_those_of_the_full_logits(kind, chunk, monkeypatch):
    monkeypatch.setattr(measure, "CHUNK", chunk)
    model = toy.model() if kind == "full" else lora()
    if kind == "trained head":
        torch.manual_seed(1)
        model = get_peft_model(toy.model(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.train()
    rows = probe_rows(toy.rows("prompt_completion", number=7, seed=4), toy.tokenizer(), 64, "task")
    base = recorded(model, rows)
    with as_reference(model, "base"):
        old = [model.eval()(input_ids=torch.tensor([row.ids])).logits[0].clone() for row in rows]
    model.train()
    at_start = values_of(gauge(model, rows, base), None, kl=True)
    assert at_start["kl"].value == pytest.approx(0, abs=1e-6)
    moved(model, 1.0)
    values = values_of(gauge(model, rows, base), None, kl=True)
    assert all(m.training for m in model.modules())
    loss, kl = by_hand(model, old, rows)
    assert values["loss"].value == pytest.approx(loss, abs=1e-5)
    assert kl > 1e-3, kl
    assert values["kl"].value == pytest.approx(kl, abs=1e-5)


def test_a_gauge_of_text_is_general_loss_and_one_of_answers_exact_match():
    model, tokenizer = moved(toy.model(), 0.5), toy.tokenizer()
    text = toy.rows("text", number=9, seed=5)
    values = values_of(gauge(model, probe_rows(text, tokenizer, 512, "general")), None, kl=False)
    assert values["loss"].value == pytest.approx(general_loss(model, tokenizer, text).score.value, abs=1e-6)
    answers = toy.rows("prompt_completion", number=9, seed=5)
    scored = teacher_forced(model, tokenizer, answers)
    values = values_of(gauge(model, probe_rows(answers, tokenizer, 512, "old")), None, kl=False, by_row=True)
    assert values["exact"].value == pytest.approx(scored.score.value)
    loss = answer_nll(model, tokenizer, answers).score.value
    assert values["loss"].value == pytest.approx(loss, abs=1e-6)


def test_logits_exist_of_predicted_tokens_only():
    model, seen = toy.model(), []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    rows = [ProbeRow((3, 4, 5, 6), (False, False, True, True)), ProbeRow((7, 8), (False, True))]
    gauge(model, rows)
    assert seen == [(1, 3, model.config.vocab_size)] and not model.lm_head._forward_pre_hooks


def test_batches_are_bounded_in_rows_and_in_predicted_tokens(monkeypatch):
    monkeypatch.setattr(probe, "POSITIONS", 5)
    rows = [ProbeRow(tuple(range(n + 1)), (False, *[True] * n)) for n in (2, 2, 7, 1, 3, 2)]
    made = list(batches(rows, range(6), 2))
    assert sorted(i for batch in made for i in batch) == list(range(6))
    assert all(len(b) <= 2 and (len(b) == 1 or sum(rows[i].tokens for i in b) <= 5) for b in made)
    assert list(batches(rows, [], 2)) == []


def test_errors_worked_by_hand():
    # (1 + 5) / (2 + 2) = 1.5; residuals -2 and 2; sqrt(2 / 1 * 8) / 4 = 1.
    value = ratio(np.array([1.0, 5.0]), np.array([2.0, 2.0]))
    assert (value.value, value.se) == (1.5, 1.0)
    assert ratio(np.array([3.0]), np.array([2.0])).se is None
    now = np.array([[4.0, 2, 1, 0.2], [2.0, 2, 0, 0.4]])
    start = np.array([[2.0, 2, 0, 0.0], [2.0, 2, 0, 0.0]])
    values = values_of(now, start, kl=True)
    assert values["loss_change"].value == 0.5 and values["loss_change"].se == pytest.approx(0.5)
    assert values["loss_ratio"].value == 1.5 and values["exact_change"].value == 0.5
    assert values["kl"].value == pytest.approx(0.15)
    now[1, 1] = 4  # by row: (4 / 2 + 2 / 4) / 2, and the KL (0.2 / 2 + 0.4 / 4) / 2
    values = values_of(now, None, kl=True, by_row=True)
    assert values["loss"].value == 1.25 and values["kl"].value == pytest.approx(0.1)
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert float(divergence(p.log(), q.log())[0]) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_rows_that_cannot_be_measured():
    tokenizer = toy.tokenizer()
    with pytest.raises(ValueError, match="gauge 'old': row 1 has no token to predict within its first 2 tokens"):
        probe_rows(toy.rows("prompt_completion", number=1, seed=0), tokenizer, 2, "old")
    with pytest.raises(ValueError, match="Rows of a gauge have 'text', or 'prompt' and 'completion', or 'messages'"):
        probe_rows([{"question": "a"}], tokenizer, 9, "old")
