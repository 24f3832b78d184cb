"""RecAdam on weights in low precision is the fp32 run rounded, even if other code edits them; and deferred pulls."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from hf_continual import KIF, ContinualConfig, ContinualTrainer, RecAdam
from hf_continual.methods.base import Method
from hf_continual.methods.recadam.optimizer import RecAdamOptimizer
from hf_continual.paper import Paper
from hf_continual.tensors.flat import Flat
from tests import toy


def exact(optimizer, p):
    residual = optimizer.residual(p)
    return p.detach().float() if residual is None else p.detach().float() + residual


OPTIONS = [
    {"anneal": "none", "anchor_strength": 20.0},
    {"anneal": "sigmoid", "k": 0.3, "t0": 6, "anchor_strength": 90.0, "weight_decay": 0.1, "correct_bias": False},
    {"anneal": "linear", "t0": 9, "anchor_strength": 50.0, "floor": 0.2, "pull_every": 4},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_low_precision_is_the_fp32_run_rounded(dtype, options):
    g = torch.Generator().manual_seed(3)
    start = torch.randn(300, generator=g).to(dtype)
    low, master = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    both = [RecAdamOptimizer([p], lr=2e-3, **options) for p in (low, master)]
    for _ in range(30):
        low.grad = torch.randn(300, generator=g).to(dtype)
        master.grad = low.grad.float()
        for optimizer in both:
            optimizer.step()
        assert torch.equal(low.detach(), master.detach().to(dtype))
        assert torch.equal(exact(both[0], low), master.detach())


def stepped(dtype=torch.bfloat16, steps=5, **options):
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.randn(50).to(dtype))
    optimizer = RecAdamOptimizer([p], **{"lr": 1e-4, "anneal": "none", "anchor_strength": 1.0, **options})
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert dtype == torch.float32 or optimizer.residual(p).abs().sum() > 0
    return p, optimizer


EDITS = {
    "copy": lambda p: p.copy_(p.clone()),
    "part": lambda p: p[:3].zero_(),
    "view": lambda p: p.view(5, 10).t().mul_(1.0),
    "detached": lambda p: p.detach().add_(1),
    "foreach": lambda p: torch._foreach_mul_([p], 0.5),
    "replaced": lambda p: setattr(p, "data", p.data.clone()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_place_drops_the_residual(edit):
    p, optimizer = stepped()
    saved = optimizer.state_dict()["state"][0]["residual"]
    assert saved.abs().sum() > 0  # saving is not an edit
    with torch.no_grad():
        EDITS[edit](p)
    assert torch.equal(exact(optimizer, p), p.detach().float())
    assert saved.abs().sum() == 0  # torch's state_dict shares tensors
    p.grad = torch.zeros_like(p)
    optimizer.step()


def test_what_is_edited_between_two_steps_is_what_the_next_one_starts_from():
    p, optimizer = stepped()
    with torch.no_grad():
        p.fill_(2.0)
    fresh = torch.nn.Parameter(torch.full((50,), 2.0))
    again = RecAdamOptimizer([fresh], lr=1e-4, anneal="none", anchor_strength=1.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[p].items()}
    fresh.grad = torch.zeros(50)
    again.step()
    q, other = stepped()
    with torch.no_grad():
        q.data.fill_(2.0)  # hidden on purpose, then settled
    other.residual(q).zero_()
    other.settle(q)
    q.grad = torch.zeros_like(q)
    other.step()
    assert torch.equal(p, q) and torch.equal(state["residual"], other.state[q]["residual"])


def test_residuals_of_checkpoints_in_the_weights_dtype_are_read():
    p, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["residual"] = saved["state"][0]["residual"].bfloat16()
    del saved["param_groups"][0]["pull_every"]
    q = torch.nn.Parameter(p.detach().clone())
    again = RecAdamOptimizer([q], lr=1e-4, anneal="none", anchor_strength=1.0)
    again.load_state_dict(saved)
    assert again.state[q]["residual"].dtype == torch.float32 and again.state[q]["exp_avg"].dtype == torch.float32
    q.grad = torch.zeros_like(q)
    again.step()


def test_flat_buffers_read_and_write_exact_weights():
    p, optimizer = stepped()
    flat = Flat({"p": p}, optimizer)
    (bucket,) = flat.buckets
    assert torch.equal(flat.weights(bucket), exact(optimizer, p))
    wanted = torch.linspace(0.1, 3, 50)
    flat.write(bucket, wanted)
    assert torch.equal(flat.weights(bucket), wanted)
    assert torch.equal(p.detach(), wanted.bfloat16()) and torch.equal(exact(optimizer, p), wanted)


def test_sharded_weights_keep_residuals_and_see_edits(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole, _ = stepped(steps=0, dtype=torch.float32)
        p = torch.nn.Parameter(distribute_tensor(whole.detach().bfloat16(), mesh, [Shard(0)]))
        optimizer = RecAdamOptimizer([p], lr=1e-4, anneal="none", anchor_strength=1.0)
        for _ in range(4):
            p.grad = distribute_tensor(torch.ones(50).bfloat16(), mesh, [Shard(0)])
            optimizer.step()
        assert optimizer.residual(p).abs().sum() > 0
        flat = Flat({"p": p}, optimizer)
        flat.write(flat.buckets[0], torch.full((50,), 1.001))
        assert torch.equal(flat.weights(flat.buckets[0]), torch.full((50,), 1.001))
        for edit in (lambda: p.mul_(1.0), lambda: p.to_local().mul_(1.0)):
            flat.write(flat.buckets[0], torch.full((50,), 1.001))
            with torch.no_grad():
                edit()
            assert optimizer.residual(p).abs().sum() == 0
    finally:
        destroy_process_group()


# --- in the trainer


def build(folder, *methods, model=None, **settings):
    return ContinualTrainer(
        toy.model().bfloat16() if model is None else model,
        ContinualConfig(**toy.settings(folder, **{"learning_rate": 2e-5, **settings})),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=methods,
    )


@pytest.mark.parametrize("options", [{}, {"rule": "code"}, {"outer_optimizer": "shared"}, {"rule": "adaptive"}])
def test_after_a_fusion_the_exact_weights_are_the_fused_ones(tmp_path, options):
    kif = KIF(toy.rows(seed=9), inner_steps=2, outer_steps=1, **options)
    trainer = build(tmp_path, RecAdam(anneal="none", pull=0.01), kif, max_steps=4)
    start = toy.flat(trainer.model)
    trainer.train()
    optimizer = trainer.run.optimizer
    for name, anchor in kif._sides.flat.items(kif._sides.anchor):
        assert torch.equal(exact(optimizer, kif._sides.flat.params[name]), anchor)
    now = torch.cat([exact(optimizer, p).flatten() for p in trainer.model.parameters()])
    assert 0 < ((now != start) & (toy.flat(trainer.model) == start)).sum()  # changes below bf16's precision are kept


@dataclass
class GoBack(Method):
    """Puts the weights back to where they were, at one of the two hooks."""

    hook: str
    name: ClassVar[str] = "back"
    paper: ClassVar[Paper] = Paper("x", "y", 2020)

    def begin_task(self, run):
        self.saved = {n: p.detach().clone() for n, p in run.named_parameters().items()}

    def _edit(self, run):
        with torch.no_grad():
            for name, p in run.named_parameters().items():
                p.copy_(self.saved[name])

    def after_step(self, run):
        if self.hook == "after_step":
            self._edit(run)

    def end_step(self, run):
        if self.hook == "end_step":
            self._edit(run)


@pytest.mark.parametrize("hook", ["after_step", "end_step"])
def test_a_method_that_edits_weights_leaves_no_residual(tmp_path, hook):
    trainer = build(
        tmp_path, RecAdam(anneal="none", pull=0.01), GoBack(hook), max_steps=3, save_steps=3, save_strategy="steps"
    )
    before = toy.flat(trainer.model)
    trainer.train()
    assert torch.equal(before, toy.flat(trainer.model))
    assert all(trainer.run.optimizer.residual(p).abs().sum() == 0 for p in trainer.model.parameters())
    state = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    assert all(entry["residual"].abs().sum() == 0 for entry in state.values())


# --- deferred pulls


@settings(max_examples=30, deadline=None)
@given(every=st.integers(1, 6), steps=st.integers(1, 15), r=st.floats(0, 1), start=st.floats(-3, 3))
def test_put_off_pulls_without_gradient_go_as_far(every, steps, r, start):
    p = torch.nn.Parameter(torch.full((2,), start, dtype=torch.float64))
    group = {"params": [p], "anchors": [torch.full((2,), 0.5, dtype=torch.float64)]}
    optimizer = RecAdamOptimizer([group], lr=1.0, anneal="none", anchor_strength=r, pull_every=every)
    for i in range(steps):
        p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = 1 / (1 + i)  # the shares of a window differ
        optimizer.step()
    optimizer.apply_owed_pulls()
    left = torch.prod(1 - torch.tensor([r / (1 + i) for i in range(steps)], dtype=torch.float64))
    assert p.detach().tolist() == pytest.approx([0.5 + (start - 0.5) * float(left)] * 2, abs=1e-6)


def test_the_anchor_is_not_looked_at_within_a_window():
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    ours = RecAdamOptimizer([p], lr=1e-2, anneal="none", anchor_strength=5.0, pull_every=3)
    adam = RecAdamOptimizer([q], lr=1e-2, anneal="none", anchor_strength=0.0)
    for step in range(1, 4):
        p.grad, q.grad = torch.ones(4), torch.ones(4)
        ours.step()
        adam.step()
        assert torch.equal(p, q) == (step < 3)
    share = 1 - 0.95**3
    assert p.detach().tolist() == pytest.approx((q.detach() + share * (1 - q.detach())).tolist())


def test_parameters_without_a_gradient_in_a_step_have_windows_of_their_own():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = RecAdamOptimizer([{"params": params, "anchors": [torch.zeros(2)] * 2}], lr=0.1, anneal="none",
                                 anchor_strength=1.0, pull_every=2)  # fmt: skip
    rates = [0.1, 0.2, 0.3]
    for i, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for j, p in enumerate(params):
            p.grad = torch.zeros(2) if j == 0 or i else None
        optimizer.step()
    optimizer.apply_owed_pulls()
    assert params[0].tolist() == pytest.approx([0.9 * 0.8 * 0.7] * 2) and params[1].tolist() == pytest.approx(
        [0.8 * 0.7] * 2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumes_within_a_window_and_its_last_checkpoint_is_whole(tmp_path, dtype):
    def make():
        method = RecAdam(anneal="none", pull=0.2, pull_every=4)
        return build(
            tmp_path,
            method,
            model=toy.model().to(dtype),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            learning_rate=1e-3,
        )

    straight = make()
    straight.train()
    assert all(float(s["owed"]) == 0 for s in straight.run.optimizer.state.values())
    last = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    for name, p in straight.model.named_parameters():
        assert name not in last or torch.equal(last[name], p)
    middle = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    assert all(float(s["owed"]) > 0 for s in middle.values())
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))


def test_a_best_checkpoint_that_was_loaded_is_not_pulled(tmp_path):
    trainer = ContinualTrainer(
        toy.model(),
        ContinualConfig(**toy.settings(
            tmp_path, max_steps=20, learning_rate=0.5, save_strategy="steps", save_steps=1, eval_strategy="steps",
            eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        )),
        train_dataset=toy.rows(), eval_dataset=toy.rows(seed=2), processing_class=toy.tokenizer(),
        methods=[RecAdam(anneal="none", anchor_strength=0.2, pull_every=10)],
        callbacks=[EarlyStoppingCallback(1)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 10
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(best[n], p) for n, p in trainer.model.named_parameters() if n in best)


@pytest.mark.parametrize(
    ("every", "error", "said"),
    [
        (0, ValueError, r"pull_every=0\) must be at least 1 \(updates\)"),
        (-1, ValueError, r"pull_every=-1\) must be at least 1"),
        (2.0, TypeError, "pull_every=2.0.* must be a whole number"),
        (True, TypeError, "pull_every=True.* must be a whole number"),
    ],
)
def test_windows_that_make_no_sense(every, error, said):
    with pytest.raises(error, match=said):
        RecAdam(pull_every=every)
