"""VR-MCL: the formulas by hand, a second implementation of the whole loop, what others see of a step, and the contract's edges."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig

from hf_continual import VRMCL, ContinualConfig, ContinualTrainer, Method, RecAdam, Replay
from hf_continual.methods.vrmcl import inner_step, variance_reduced
from tests import toy
from tests.methods.fake_run import FakeRun
from tests.trainer.same import same

ZERO_TOLERANCE = 0.0
# Two steps of two micro-batches: an inner step each, and in the second step both passes at the weights before.
EXTRA_FORWARDS = 2 + 2 + 4
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def example(world):
    return VRMCL(toy.rows(seed=9, low=30, high=59), ratio=0.2, inner_learning_rate=0.05, momentum=0.5)


def zero(world):
    return VRMCL(inner_steps=0, momentum=0.0)


def build(folder, *methods, peft=None, model=None, rows=None, **settings):
    return ContinualTrainer(
        model or toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=rows or toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=methods,
    )  # fmt: skip


class Quadratic(FakeRun):
    """Loss (w - c)^2 / 2 of one weight, where a batch is its c; the gradient is w - c."""

    def __init__(self, start: float) -> None:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, start)
        super().__init__(model)
        self.noted, self.scaled = {}, False

    def gradients(self, batches, scale=1.0, clip=True, training=True, alone=False):
        (w,) = self.model.parameters()
        c = sum(batch["labels"].float().mean() for batch in batches) / len(batches)
        w.grad = (w.detach() - c).clone()
        return ((w.detach() - c) ** 2 / 2).squeeze()

    def update(self, change=None):
        change()
        return True

    def zero_grad(self):
        for p in self.model.parameters():
            p.grad = None

    def note(self, name, total, count=1.0):
        self.noted[name] = float(total)


def test_two_steps_by_hand():
    """w = 2, c = 0 then 4; alpha = 1/2, one inner step, s = 1/4, eta = 1/2."""
    run, method = Quadratic(2.0), VRMCL(inner_learning_rate=0.5, momentum=0.25)
    (w,) = run.model.parameters()

    def step(c):
        batch = {"labels": torch.tensor([[c]])}
        method.begin_step(run, [batch])
        inside = float(w.detach())
        run.gradients([batch])  # the trainer's own pass
        method.edit_gradients(run.named_parameters())
        before, m = float(w.detach()), float(w.grad)
        with torch.no_grad():
            w.sub_(0.5 * w.grad)
        method.after_step(run)
        run.zero_grad()
        return inside, before, m

    method.begin_task(run)
    # theta' = 2 - 1/2 (2 - 0) = 1, g = 1 = m, theta_1 = 2 - 1/2.
    assert step(0) == (1.0, 2.0, 1.0) and w.item() == 1.5 and run.noted == {"vrmcl/inner_loss": 2.0}
    # At 1.5: theta' = 1.5 + 1/2 * 2.5 = 2.75, g = -1.25. At 2: theta' = 3, g = -1. m = -1.25 + 1/4 (1 + 1) = -0.75.
    assert step(4) == (2.75, 1.5, -0.75) and w.item() == 1.875
    assert variance_reduced(*map(torch.tensor, (-1.25, 1.0, -1.0)), 0.25) == -0.75


def test_the_formulas():
    g = torch.Generator().manual_seed(0)
    weight, grad, last, before = (torch.randn(3, 4, generator=g) for _ in range(4))
    assert torch.equal(inner_step(weight, grad, 0.1), weight - 0.1 * grad)
    assert (weight - inner_step(weight, grad, 1.0, bound=0.3)).abs().max() <= 0.3 + 1e-6
    assert torch.equal(variance_reduced(grad, last, before, 0.0), grad)
    # Where the weights did not move the correction leaves a plain running mean of weight 1 - s for the new gradient.
    torch.testing.assert_close(variance_reduced(grad, last, grad, 0.25), 0.75 * grad + 0.25 * last)
    # Noise that both evaluations share cancels as far as s goes: with s = 1 only the first step's is left.
    noise = torch.randn(50, 200, generator=g)
    m = noise[0]
    for t in range(1, 50):
        m = variance_reduced(1.0 + noise[t], m, 1.0 + noise[t], 0.9)
    assert m.var() < 0.2 * noise.var() and abs(float(m.mean()) - 1.0) < 0.15


def reference(model, batches, rate, alpha, n, s, bound, max_norm=1.0):
    """The whole loop again: full copies of a plain model, autograd, no trainer, no hook and no buffer of the method."""
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    theta = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}

    def gradient(weights, rows, own):
        at = copy.deepcopy(model).train()
        for k, p in at.named_parameters():
            if p.requires_grad:
                p.data = weights[k].clone()
        losses, count = [], 0
        for row in rows:
            labels = row["labels"].clone()
            if own and "replay_origin" in row:
                labels[row["replay_origin"]["source"] != -1] = -100
            inputs = {k: v for k, v in row.items() if k not in ("labels", "replay_origin")}
            logits = at(**inputs).logits[:, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
            ))  # fmt: skip
            count += int((labels[:, 1:] != -100).sum())
        found = torch.autograd.grad(sum(losses) / count, [p for p in at.parameters() if p.requires_grad])
        return dict(zip(names, found, strict=True))

    def meta(weights, rows):
        moved = dict(weights)
        for _ in range(n):
            g = gradient(moved, rows, own=True)
            moved = {k: moved[k] - alpha * (g[k] if bound is None else g[k].clamp(-bound, bound)) for k in names}
        g = gradient(moved, rows, own=False)
        norm = torch.stack([v.norm() for v in g.values()]).norm()
        return {k: v * min(1.0, max_norm / float(norm + 1e-6)) for k, v in g.items()}

    m, before = None, None
    for rows in batches:
        g = meta(theta, rows)
        if m is None:
            m = g
        else:
            old = meta(before, rows)
            m = {k: g[k] + s * (m[k] - old[k]) for k in names}
        before, theta = theta, {k: theta[k] - rate * m[k] for k in names}
    return torch.cat([theta[k].flatten() for k in names])


@pytest.mark.parametrize("bound", [None, 0.01])
@pytest.mark.parametrize("peft", [None, LoraConfig(**LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_second_implementation_agrees(tmp_path, peft, accumulation, bound):
    method = VRMCL(
        toy.rows(seed=9, low=30, high=59),
        ratio=0.4,
        inner_steps=2,
        inner_learning_rate=0.1,
        inner_clip=bound,
        momentum=0.4,
    )
    settings = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    trainer = build(tmp_path, method, peft=peft, gradient_accumulation_steps=accumulation, **settings)
    plain = toy.model() if peft is None else get_peft_model(toy.model(), peft)
    plain.load_state_dict(trainer.model.state_dict())
    seen = []
    begin = method.begin_step
    method.begin_step = lambda run, batches: (seen.append([dict(b) for b in batches]), begin(run, batches))
    trainer.train()
    trained = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    first = torch.cat([p.detach().flatten() for p in plain.parameters() if p.requires_grad])
    # Larger rates multiply differences in the last digit by ten in each step, in both implementations.
    wanted = reference(plain, seen, 0.05, 0.1, 2, 0.4, bound)
    assert len(seen) == 4 and (wanted - first).abs().max() > 5e-3
    torch.testing.assert_close(trained, wanted, rtol=0, atol=1e-6)
    for other in ((0.05, 0.1, 2, 0.0, bound), (0.05, 0.1, 1, 0.4, bound)):  # the test can tell
        assert (reference(plain, seen, *other) - trained).abs().max() > 1e-5


def test_dropout_is_the_same_in_both_evaluations(tmp_path):
    """Without any movement of the weights both are the same gradient, and a step is (1 - s) g + s m bit for bit."""
    lora = LoraConfig(**LORA, lora_dropout=0.4)
    method, inside = VRMCL(momentum=0.5, inner_learning_rate=0.05), []
    trainer = build(tmp_path, method, peft=lora, max_steps=3, optim="sgd", learning_rate=0.0)
    correct, edit = method._correct, method.edit_gradients

    def corrected(run, batches):
        start = method._direction.clone()
        correct(run, batches)
        inside.append((start - method._direction) / 0.5)  # g at the weights before, which are those of now

    def edited(params):
        if len(inside):
            now = torch.cat([p.grad.flatten() for p in params.values()])
            torch.testing.assert_close(inside.pop(), now, rtol=1e-4, atol=1e-7)
        edit(params)

    method._correct, method.edit_gradients = corrected, edited
    trainer.train()
    assert not inside


class Watch(Method):
    """What another method sees of a step: the weights in its passes, at its edit and after it."""

    name = "watch"

    def __init__(self):
        self.seen = []

    def begin_task(self, run):
        self.run = run

    def loss_terms(self, forward):
        self.seen.append(("pass", toy.flat(self.run.model)))
        return {}

    def edit_gradients(self, params):
        self.seen.append(("edit", toy.flat(self.run.model)))

    def end_step(self, run):
        self.seen.append(("end", toy.flat(run.model)))


def test_others_edit_at_the_weights_of_the_step_wherever_they_stand(tmp_path):
    watch = Watch()
    trainer = build(tmp_path, watch, example(None), max_steps=2)
    start = toy.flat(trainer.model)
    trainer.train()
    assert [what for what, _ in watch.seen] == ["pass", "edit", "end"] * 2
    (_, first), (_, edit), (_, end), (_, second), (_, edit2), _ = watch.seen
    assert not torch.equal(first, start) and torch.equal(edit, start)
    assert not torch.equal(second, end) and torch.equal(edit2, end), "the inner steps are undone bit for bit"


def test_weights_in_low_precision_keep_their_residuals(tmp_path):
    """RecAdam keeps what rounding takes from bf16 weights: moving there and back must not lose it."""

    def run(*methods):
        trainer = build(
            tmp_path, *methods, RecAdam(anneal="none", pull=0.01), model=toy.model().to(torch.bfloat16), max_steps=3
        )
        trainer.train()
        return toy.flat(trainer.model)

    # Inner steps that end where they began, and no correction, are no steps.
    assert torch.equal(run(), run(VRMCL(inner_learning_rate=1e-12, momentum=0.0)))


def test_an_interrupted_step_leaves_the_weights_of_its_start(tmp_path):
    method = example(None)
    trainer, states = build(tmp_path, method, Watch()), []
    begin = method.begin_step

    def dies(run, batches):
        states.append(toy.flat(run.model))
        begin(run, batches)
        if len(states) == 3:
            raise KeyboardInterrupt

    method.begin_step = dies
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(states[-1], toy.flat(trainer.model))


def test_skipped_steps_and_overflow_start_over():
    run, method = Quadratic(2.0), VRMCL(momentum=0.5, inner_steps=0)
    method.begin_task(run)
    batch = {"labels": torch.tensor([[0.0]])}
    for skipped in (False, True, False):
        method.begin_step(run, [batch])
        run.gradients([batch])
        if skipped:
            next(iter(run.model.parameters())).grad.fill_(float("inf"))
        method.edit_gradients(run.named_parameters())
        if not skipped:
            method.after_step(run)
    assert float(next(iter(run.model.parameters())).grad) == 2.0, "m is g again"
    run.update = lambda change=None: False  # an overflow at the weights before
    method.begin_step(run, [batch])
    assert not method._direction.any()


def test_on_a_base_in_four_bits(tmp_path):
    toy.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    runs = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four, dtype=torch.float32)
        trainer = build(tmp_path / "run", example(None), peft=LoraConfig(**LORA), model=model, max_steps=3)
        start = toy.flat(trainer.model)
        trainer.train()
        runs.append({k: p.detach() for k, p in trainer.run.named_parameters().items()})
        assert all("lora_" in k for k in runs[-1]) and not torch.equal(start, toy.flat(trainer.model))
    assert same(*runs)


def test_memory_from_another_method_is_the_same_run(tmp_path):
    rows = toy.rows(seed=9, low=30, high=59)
    one = build(tmp_path, VRMCL(rows, ratio=0.3, name="old"))
    two = build(tmp_path, VRMCL(), Replay(rows, ratio=0.3, name="old"))
    for trainer in (one, two):
        trainer.train()
    assert torch.equal(toy.flat(one.model), toy.flat(two.model))


def test_cost_is_stated(tmp_path):
    assert VRMCL(inner_steps=2).extra_steps(10) == 2 * 10 + 3 * 9 and VRMCL(momentum=0.0).extra_steps(10) == 10
    assert zero(None).extra_steps(10) == 0 and VRMCL().added_rows() is None
    assert example(None).added_rows().ratio == 0.2 and not example(None).needs_earlier_task()
    calls = []
    trainer = build(tmp_path, VRMCL(inner_steps=2, momentum=0.1), max_steps=3)
    trainer.model.register_forward_hook(lambda *a: calls.append(1))
    trainer.train()
    assert len(calls) == 3 + VRMCL(inner_steps=2).extra_steps(3)
    held = VRMCL()
    trainer = build(tmp_path, held, max_steps=1)
    held.release = lambda: None
    trainer.train()
    size = sum(p.numel() for p in trainer.model.parameters())
    assert sum(b.numel() * b.element_size() for b in held._buffers().values()) == VRMCL.bytes_per_parameter * size


def test_sentences(tmp_path):
    for wrong, error, said in (
        ({"ratio": 1.0}, ValueError, r"VRMCL\(ratio=1.0\) must lie between 0 and 1, both excluded"),
        ({"inner_steps": -1}, ValueError, "must be at least 0"),
        ({"inner_steps": 1.5}, TypeError, "must be a whole number"),
        ({"inner_learning_rate": 0.0}, ValueError, "must be above 0"),
        ({"inner_clip": "x"}, TypeError, "must be a number"),
        ({"momentum": 1.0}, ValueError, "would never forget"),
        ({"name": "a/b"}, ValueError, "a name is a word"),
        ({"memory": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl"),
        ({"memory": []}, ValueError, "no rows|nothing"),
    ):
        with pytest.raises(error, match=said):
            VRMCL(**wrong)
    with pytest.raises(ValueError, match="VRMCL and VRMCL both act before the passes of a step"):
        build(tmp_path, VRMCL(), VRMCL(name="other"))
    settings = {"save_strategy": "steps", "save_steps": 2}
    build(tmp_path / "a", VRMCL(), **settings).train()
    wider = build(tmp_path / "a", VRMCL(), model=toy.model(intermediate_size=48), **settings)
    with pytest.raises((ValueError, RuntimeError), match="belong to these parameters|size mismatch"):
        wider.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    state = {"follows": True, "before/x": torch.zeros(1), "direction/x": torch.zeros(1)}
    other = build(tmp_path, VRMCL())
    other.methods.methods[0].load_state_dict(state, other.run)
    with pytest.raises(ValueError, match="the state does not belong to these parameters"):
        other.train()


def test_as_sft_config_takes_it(tmp_path):
    with pytest.raises(ValueError, match="replay rows are text and the task's rows are prompt_completion"):
        ContinualTrainer(
            toy.model(), SFTConfig(**toy.settings(tmp_path)), train_dataset=toy.rows("prompt_completion"),
            processing_class=toy.tokenizer(), methods=[VRMCL(toy.rows("text"))],
        )  # fmt: skip
