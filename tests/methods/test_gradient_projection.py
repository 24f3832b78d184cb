"""Gradient projection: both formulas, the preliminary runs, and what is left along the directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hf_continual import ContinualConfig, ContinualTrainer, GradientProjection, Stopped, stopping
from hf_continual.methods import gradient_projection
from hf_continual.methods.gradient_projection import project, ready
from tests import toy

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "baselines" / "gradproj_method1.safetensors")

ZERO_TOLERANCE = 0.0
SHORTER = {"runs": 1, "steps": 3, "since": 1}
EXTRA_FORWARDS = 8  # 2 runs of 2 steps, two micro-batches each


def example(world):
    return GradientProjection(runs=2, steps=2, since=1, layers="all")


def zero(world):
    return GradientProjection(runs=0)


@pytest.mark.parametrize("dims", [1, 2])
def test_the_published_formula_and_the_projection(dims):
    grad, direction = GOLDEN[f"grad{dims}"], GOLDEN[f"dir{dims}"]
    torch.testing.assert_close(project(grad, direction, literal=True), GOLDEN[f"out{dims}"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(project(grad, direction), GOLDEN[f"proper{dims}"], rtol=1e-6, atol=1e-7)
    assert torch.equal(project(grad, torch.zeros_like(grad)), grad)
    for literal, key in ((False, "proper"), (True, "out")):  # the form used in a step
        p = torch.nn.Parameter(torch.zeros_like(grad))
        p.grad = grad.clone()
        method = GradientProjection(literal=literal)
        method._live = {"w": ready(direction, literal)}
        method.edit_gradients({"w": p})
        torch.testing.assert_close(p.grad, GOLDEN[f"{key}{dims}"], rtol=1e-6, atol=1e-7)


def build(folder, method, peft=None, **settings):
    return ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=[method],
    )  # fmt: skip


def by_hand(folder, runs, steps, since):
    """The mean movement of plain runs from the same start on the rows that the preliminary runs draw."""
    trainer = build(folder, GradientProjection(runs=0))
    model, run, total = trainer.model, trainer.run, {}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i in range(runs):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        for step in range(steps):
            if step == since:
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
            (batch,) = run.micro_batches(run.task_rows, i * steps + step)
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        for n, p in model.named_parameters():
            total[n] = total.get(n, 0) + (p.detach() - before[n]) / runs
    return total


def test_directions_are_the_mean_movement_and_nothing_is_left_of_the_runs(tmp_path):
    """Weights, random numbers and the sampler's draws are those of a run without them: dropout shows it."""
    method = GradientProjection(runs=2, steps=3, since=1, layers="all")
    trainer, seen = build(tmp_path, method), {}

    def noted(run, chosen):
        state = torch.get_rng_state()
        weights = toy.flat(run.model)
        seen.update(type(method)._found(method, run, chosen))
        assert torch.equal(state, torch.get_rng_state()) and torch.equal(weights, toy.flat(run.model))
        assert all(p.grad is None for p in run.model.parameters())
        return seen

    method._found = noted
    trainer.train()
    for name, expected in by_hand(tmp_path / "hand", 2, 3, 1).items():
        torch.testing.assert_close(seen[name], expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_nothing_is_left_along_the_directions(tmp_path, layers):
    """Of the gradient, and with SGD of the movement."""
    method = GradientProjection(runs=1, steps=2, since=0, layers=layers)
    trainer = build(tmp_path, method, max_steps=3, optim="sgd", learning_rate=0.1, weight_decay=0.0)
    edit, along = method.edit_gradients, []

    def checked(params):
        along.append({n: float((params[n].grad * d).sum(-1).abs().max()) for n, d in method._live.items()})
        edit(params)
        along.append({n: float((params[n].grad * d).sum(-1).abs().max()) for n, d in method._live.items()})

    method.edit_gradients = checked
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    kept = {}
    end = method.end_task
    method.end_task = lambda run: (kept.update(method._live), end(run))
    trainer.train()
    names = {n for n in before if layers == "all" or ".self_attn." in n}
    assert set(kept) == names
    for first, second in zip(along[::2], along[1::2], strict=True):
        assert max(first.values()) > 1e-2 and max(second.values()) < 1e-6
    moved = {n: p.detach() - before[n] for n, p in trainer.model.named_parameters()}
    for name, d in kept.items():
        assert float((moved[name] * d).sum(-1).abs().max()) < 1e-6, name
    assert all(m.abs().max() > 0 for m in moved.values())


def test_a_run_killed_in_its_preliminary_runs_resumes_there(tmp_path, monkeypatch):
    method = GradientProjection(runs=3, steps=2, since=1)
    straight = build(tmp_path / "straight", method)
    straight.train()
    assert not list((tmp_path / "straight").glob("continual-*"))
    made, real = [], GradientProjection._preliminary

    def dies(self, run, which, chosen):
        made.append(which)
        if made == [0, 1]:
            raise KeyboardInterrupt
        return real(self, run, which, chosen)

    monkeypatch.setattr(GradientProjection, "_preliminary", dies)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a", GradientProjection(runs=3, steps=2, since=1)).train()
    file = tmp_path / "a" / "continual-gradient_projection.unfinished"
    again = build(tmp_path / "a", GradientProjection(runs=3, steps=2, since=1))
    again.train()
    assert made == [0, 1, 1, 2] and not file.exists()
    assert torch.equal(toy.flat(straight.model), toy.flat(again.model))
    # If asked to stop, it ends after the current run, and resumes after it.
    made.clear()
    made += [None]
    with monkeypatch.context() as patched, pytest.raises(Stopped, match="after 1 of 3 preliminary runs"):
        patched.setattr(stopping, "asked", lambda: "SIGTERM")
        build(tmp_path / "a", GradientProjection(runs=3, steps=2, since=1)).train()
    build(tmp_path / "a", GradientProjection(runs=3, steps=2, since=1)).train()
    assert made == [None, 0, 1, 2]
    # Sums for other options are not reused, nor is a truncated file.
    for damage in (lambda: save_file({}, file, metadata={"key": "other", "done": "2"}), lambda: file.write_bytes(b"x")):
        made.clear()
        made += [None]
        damage()
        build(tmp_path / "a", GradientProjection(runs=3, steps=2, since=1)).train()
        assert made == [None, 0, 1, 2]


def test_weights_are_put_back_after_an_error(tmp_path, monkeypatch):
    trainer = build(tmp_path, GradientProjection(runs=1, steps=2))
    before = toy.flat(trainer.model).clone()
    with monkeypatch.context() as patched:
        patched.setattr(gradient_projection, "whole", lambda t: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert torch.equal(before, toy.flat(trainer.model))


def test_adapters_on_attention(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    method, names = GradientProjection(runs=1, steps=2), []
    trainer = build(tmp_path, method, lora, max_steps=1)
    end = method.end_task
    method.end_task = lambda run: (names.extend(method._live), end(run))
    trainer.train()
    assert len(names) == 4 * 4 * 2 and all(".self_attn." in n and "lora_" in n for n in names)


def test_sentences(tmp_path):
    for wrong, error, said in (
        ({"runs": -1}, ValueError, "must be at least 0"),
        ({"steps": 0}, ValueError, "must be at least 1"),
        ({"since": 150}, ValueError, "It is one of the preliminary steps"),
        ({"since": 1.5}, TypeError, "must be a whole number"),
        ({"layers": "mlp"}, ValueError, "must be one of attention, all"),
    ):
        with pytest.raises(error, match=said):
            GradientProjection(**wrong)
    assert GradientProjection().first_counted == 100 and GradientProjection(runs=2, steps=3).extra_steps(9) == 6
    lora = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="none of the 8 trained weights belongs to an attention module"):
        build(tmp_path, GradientProjection(runs=1, steps=1), lora).train()
    stream = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path)), train_dataset=toy.rows().to_iterable_dataset(),
        processing_class=toy.tokenizer(), methods=[GradientProjection(runs=1, steps=1)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="asks for the task's own rows, but they are a stream"):
        stream.train()
