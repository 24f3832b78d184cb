"""RecAdam against numbers of the authors' optimizer, and everything the trainer needs from it."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trl import SFTConfig

from hf_continual import ContinualTrainer
from hf_continual.methods.recadam import RecAdam, RecAdamOptimizer, recall_schedule, recall_share
from hf_continual.methods.recadam.anchored import pull_now
from tests import toy
from tests.methods.fake_run import FakeRun

GOLDEN = Path(__file__).parents[1] / "golden" / "recadam"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]


def example(world=None):
    return RecAdam(anneal="sigmoid", k=1.0, t0=3, anchor_strength=100.0, floor=0.2)


def zero(world=None):
    return RecAdam(anneal="none", anchor_strength=0.0)


ZERO_TOLERANCE = 1e-5
# RecAdam's eps is outside the bias correction, unlike AdamW's: with 1e-8 the two differ for gradients that small.
ZERO_SETTINGS = {"adam_epsilon": 1e-15}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    """One case per file: the weights after each step, the moments, the counters."""
    case, data = CASES[name], load_file(GOLDEN / CASES[name]["file"])
    options = case["optimizer_kwargs"]
    tolerance = {"float64": {"rtol": 1e-12, "atol": 1e-15}, "float32": {"rtol": 2e-6, "atol": 2e-7}}[case["dtype"]]
    params = [torch.nn.Parameter(data[f"p0.{i}"].clone()) for i in range(3)]
    optimizer = RecAdamOptimizer(
        [{"params": [p], "anchors": [data[f"pretrained.{i}"]], **case["groups"][i]} for i, p in enumerate(params)],
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
        correct_bias=options["correct_bias"],
        anneal=options["anneal_fun"],
        k=options["anneal_k"],
        t0=options["anneal_t0"],
        anchor_strength=options["pretrain_cof"],
    )
    without = {tuple(pair) for pair in case["grad_is_None_at_group_step"]}
    for step in range(case["n_steps"]):
        for i, p in enumerate(params):
            optimizer.param_groups[i]["lr"] = case["lr_used_at_each_step"][step]
            p.grad = None if (i, step) in without else data[f"grads.{i}"][step].clone()
        optimizer.step()
        for i, p in enumerate(params):
            torch.testing.assert_close(p.detach(), data[f"params.{i}"][step], **tolerance)
    for i, p in enumerate(params):
        assert int(optimizer.state[p]["step"]) == case["final_state_step"][i]
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][moment], data[f"{moment}.{i}"], **tolerance)


def test_golden_schedule():
    table = json.loads((GOLDEN / "anneal_table.json").read_text())
    for row in table:
        got = recall_schedule(row["function"], row["step"], row["k"], row["t0"], row["weight"])
        assert got == pytest.approx(row["value"], rel=1e-15, abs=0)
    assert recall_schedule("sigmoid", 1, 1.0, 1000, 1.0) == 0.0  # exp would overflow


def one(value=1.0, anchor=0.5, dtype=torch.float64, **options):
    p = torch.nn.Parameter(torch.full((3,), value, dtype=dtype))
    group = {"params": [p], "anchors": [torch.full((3,), anchor, dtype=dtype)]}
    return p, RecAdamOptimizer([group], **{"lr": 1.0, "anneal": "none", "anchor_strength": 0.1, **options})


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), steps=st.integers(1, 20), start=st.floats(-3, 3), anchor=st.floats(-3, 3))
def test_without_gradient_the_distance_shrinks_by_one_minus_r(share, steps, start, anchor):
    p, optimizer = one(start, anchor, anchor_strength=share)
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.detach().tolist() == pytest.approx([anchor + (start - anchor) * (1 - share) ** steps] * 3, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_still_move(dtype):
    """Steps below half a unit in the last place: a plain bf16 weight would stay at 1.0 forever."""
    p, optimizer = one(1.0, 0.5, dtype, anchor_strength=2e-3)
    for _ in range(2000):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert float(p.detach()[0]) == pytest.approx(0.5 + 0.5 * 0.998**2000, abs=4e-3)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert optimizer.state[p]["anchor"].dtype == dtype


def test_low_precision_equals_a_master_copy_in_fp32():
    g = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=g).bfloat16()
    low, master = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    both = [RecAdamOptimizer([p], lr=1e-3, anneal="none", anchor_strength=20.0) for p in (low, master)]
    for _ in range(50):
        grad = torch.randn(200, generator=g).bfloat16()
        low.grad, master.grad = grad.clone(), grad.float()
        for optimizer in both:
            optimizer.step()
    exact = low.detach().float() + both[0].state[low]["residual"].float()
    torch.testing.assert_close(exact, master.detach(), rtol=0, atol=2e-3)
    torch.testing.assert_close(low.detach().float(), master.detach(), rtol=8e-3, atol=8e-3)


def test_overshoot_is_refused_before_anything_moves_or_clamped():
    p, optimizer = one(lr=1e-3, anchor_strength=5000.0)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"= 5 lies outside \[0, 1\].*anchor_strength below 1000"):
        optimizer.step()
    assert p.detach().tolist() == [1.0] * 3 and int(optimizer.state[p]["step"]) == 0
    p, optimizer = one(lr=1e-3, anchor_strength=5000.0, out_of_range="clamp")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.detach().tolist() == [0.5] * 3


def test_the_range_is_checked_on_the_r_of_the_step():
    """lr * gamma = 5 is out of range, and every r_t of this run is in it."""
    p, optimizer = one(lr=1e-3, anchor_strength=5000.0, anneal="sigmoid", k=5.0, t0=-1)
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert 0 < recall_share(optimizer.param_groups[0], 1)[1] < 0.01


def test_floor_keeps_a_pull_after_t0():
    group = {"anneal_w": 1.0, "lr": 0.1, "anneal": "sigmoid", "k": 1.0, "t0": 5, "anchor_strength": 1.0}
    assert recall_share({**group, "floor": 0.0}, 100)[1] < 1e-30
    assert recall_share({**group, "floor": 0.25}, 100) == (1.0, pytest.approx(0.025))


def test_constant_has_no_recall_and_none_always_has_it():
    p, optimizer = one(anneal="constant", anchor_strength=0.9, lr=1e-9)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.detach().tolist() == [1.0] * 3


def test_weight_decay_comes_last():
    p, optimizer = one(1.0, 0.5, anchor_strength=0.1, weight_decay=0.2)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.detach().tolist() == pytest.approx([(1.0 + 0.1 * (0.5 - 1.0)) * (1 - 0.2)] * 3)


def test_large_odd_and_strided_parameters_equal_small_ones():
    """Chunks, joins of small tensors and copies of strided ones change nothing."""
    g = torch.Generator().manual_seed(1)
    shapes = [(7,), (1 << 19, 3), (5, 5), (1,), (0,)]
    values = [torch.randn(s, generator=g) for s in shapes] + [torch.randn(40, 30, generator=g)]
    grads = [torch.randn(v.shape, generator=g) for v in values]
    together = [torch.nn.Parameter(v.clone()) for v in values]
    together[-1] = torch.nn.Parameter(values[-1].t().contiguous().t())
    assert not together[-1].is_contiguous()
    alone = [torch.nn.Parameter(v.clone()) for v in values]
    options = {"lr": 0.01, "anneal": "none", "anchor_strength": 5.0, "weight_decay": 0.1}
    optimizers = [RecAdamOptimizer(together, **options), *(RecAdamOptimizer([p], **options) for p in alone)]
    for scale in (1.0, -0.5, 2.0):
        for a, b, grad in zip(together, alone, grads, strict=True):
            a.grad, b.grad = grad * scale, grad * scale
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def train(model, optimizer, steps, seed=3):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()
    return g


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_resumes_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5).to(dtype)
    again = copy.deepcopy(model)
    options = {"lr": 0.01, "k": 0.5, "t0": 4, "anchor_strength": 10.0}
    optimizer = RecAdamOptimizer(model.parameters(), **options)
    train(model, optimizer, 4)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again.load_state_dict(model.state_dict())
    second = RecAdamOptimizer(again.parameters(), **options)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for m, o in ((model, optimizer), (again, second)):
        train(m, o, 4, seed=9)
    assert torch.equal(toy.flat(model), toy.flat(again))


def test_given_anchors_are_not_saved_with_the_groups_and_survive_a_load():
    _p, optimizer = one()
    assert "anchors" not in optimizer.state_dict()["param_groups"][0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert "anchors" in optimizer.param_groups[0]


def test_missing_anchors_are_an_error_not_a_guess():
    p, optimizer = one()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.store_anchors = False
    q, fresh = one()
    del fresh.param_groups[0]["anchors"]
    fresh.load_state_dict(optimizer.state_dict())
    q.grad = torch.zeros_like(q)
    with pytest.raises(RuntimeError, match="anchors are not in the loaded optimizer state"):
        fresh.step()


def test_sharded_tensors(tmp_path):
    """DTensor parameters: state is sharded in the same way and the numbers equal those of plain tensors."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = torch.nn.Parameter(torch.randn(6, 4))
        sharded = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
        for p in (plain, sharded):
            optimizer = RecAdamOptimizer([p], lr=0.01, anneal="none", anchor_strength=5.0)
            for i in range(3):
                grad = torch.full((6, 4), 0.1 * i - 0.05)
                p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if p is sharded else grad
                optimizer.step()
        assert isinstance(optimizer.state[sharded]["anchor"], DTensor)
        assert isinstance(optimizer.state[sharded]["exp_avg"], DTensor)
        assert torch.equal(sharded.detach().full_tensor(), plain.detach())
    finally:
        destroy_process_group()


def test_options_per_group_and_their_checks():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = RecAdamOptimizer([{"params": [p]}, {"params": [q], "anneal_w": 0.0, "eps": 1e-3}], lr=0.1)
    assert recall_share(optimizer.param_groups[1], 5) == (1.0, 0.0)
    for bad in ({"anneal": "cosine"}, {"anneal": "linear", "t0": 0}, {"lr": -1}, {"betas": (1.0, 0.9)}, {"floor": -1}):
        with pytest.raises(ValueError, match="RecAdam"):
            RecAdamOptimizer([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, **bad})
    with pytest.raises(ValueError, match="1 params and 2 anchors"):
        RecAdamOptimizer([{"params": [torch.nn.Parameter(torch.ones(1))], "anchors": [torch.ones(1)] * 2}])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"pull": 0.1, "anchor_strength": 2.0}, ValueError, "Give one"),
        ({"pull": 1.5}, ValueError, "must lie between 0 and 1"),
        ({"floor": 2.0}, ValueError, "floor"),
        ({"anneal": "cosine"}, ValueError, "one of sigmoid, linear, constant, none"),
        ({"t0": -1}, ValueError, "t0"),
        ({"k": "fast"}, TypeError, "must be a number, got str"),
        ({"groups": {"head": {"strength": 1}}}, ValueError, "no option 'strength'"),
        ({"out_of_range": "ignore"}, ValueError, "one of error, clamp"),
    ],
)
def test_sentences(options, error, said):
    with pytest.raises(error, match=said):
        RecAdam(**options)


def test_pull_is_r_at_the_peak_learning_rate_and_t0_a_share_of_the_run():
    run = FakeRun(torch.nn.Linear(2, 2), lr=2e-4, max_steps=200)
    kwargs = RecAdam(pull=0.02, t0=0.25).optimizer(run).kwargs
    assert kwargs["anchor_strength"] * 2e-4 == pytest.approx(0.02) and kwargs["t0"] == 50
    with pytest.raises(ValueError, match="length is not known"):
        RecAdam(t0=0.5).optimizer(FakeRun(torch.nn.Linear(2, 2), max_steps=0))


def test_nothing_anchored_is_an_error_and_a_late_t0_is_logged(caplog):
    run = FakeRun(toy.model())
    method = RecAdam(anneal_w=0.0)
    run.build(method)
    with pytest.raises(ValueError, match="anchors no parameter"):
        method.begin_task(run)
    late = RecAdam(t0=250)
    run.build(late)
    with caplog.at_level(logging.WARNING):
        late.begin_task(run)
    assert "after all 10 steps the task weighs only" in caplog.text


def saved(tmp_path, dtype=torch.float32):
    folder = tmp_path / "base"
    toy.model().to(dtype).save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_readable_base_is_recorded_instead_of_stored(tmp_path, dtype):
    folder, model = saved(tmp_path, dtype)
    run, method = FakeRun(model), RecAdam(anneal="none", pull=0.1)
    optimizer = run.build(method)
    method.begin_task(run)
    start = toy.flat(model)
    train(model, optimizer, 2)
    record = method.state_dict(run)
    assert record["base"] == str(folder) and len(record["fingerprint"]) == 64
    assert not any("anchor" in state for state in optimizer.state_dict()["state"].values())
    again, resumed = FakeRun(copy.deepcopy(model)), RecAdam(anneal="none", pull=0.1)
    second = again.build(resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors otherwise
    resumed.load_state_dict(record, again)
    got = torch.cat([second.state[p]["anchor"].float().flatten() for p in again.model.parameters()])
    assert torch.equal(got, start)
    train(model, optimizer, 2, seed=8)
    train(again.model, second, 2, seed=8)
    assert torch.equal(toy.flat(model), toy.flat(again.model))
    assert resumed.state_dict(again) == record  # a second save after the resume


def test_a_changed_or_vanished_base_is_refused(tmp_path):
    folder, model = saved(tmp_path)
    run, method = FakeRun(model), RecAdam(anneal="none", pull=0.1)
    optimizer = run.build(method)
    train(model, optimizer, 1)
    record = method.state_dict(run)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the ones that training started from"):
        method.load_state_dict(record, run)
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 of 39 parameters are missing"):
        method.load_state_dict(record, run)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="contains no safetensors"):
        method.load_state_dict(record, run)


@pytest.mark.parametrize("sharded", [False, True])
def test_anchors_are_stored_where_they_cannot_be_read_again(tmp_path, sharded):
    model = saved(tmp_path)[1] if sharded else toy.model()
    run, method = FakeRun(model), RecAdam(anneal="none", pull=0.1)
    run.is_sharded = sharded
    optimizer = run.build(method)
    train(model, optimizer, 1)
    assert method.state_dict(run) == {"stored": True}
    assert all("anchor" in state for state in optimizer.state_dict()["state"].values())


def test_named_anchors(tmp_path):
    """The weights to stay near may be another checkpoint than the one training starts from."""
    folder, _ = saved(tmp_path)
    model = toy.model(seed=5)
    run, method = FakeRun(model), RecAdam(anneal="none", pull=1.0, anchor=str(folder))
    optimizer = run.build(method)
    method.begin_task(run)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(toy.flat(model), toy.flat(toy.model()))
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a model"):
        RecAdam(anchor=str(tmp_path / "gone")).begin_task(run)


def test_adapter_anchors(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    run, method = FakeRun(model), RecAdam(anneal="none", pull=1.0)
    optimizer = run.build(method)
    method.begin_task(run)
    start = {n: p.detach().clone() for n, p in run.named_parameters().items()}
    for p in run.named_parameters().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p, start[n]) for n, p in run.named_parameters().items())
    assert method.state_dict(run) == {"stored": True}
    model.save_pretrained(tmp_path / "adapter")
    named = RecAdam(anneal="none", pull=1.0, anchor=str(tmp_path / "adapter"))
    run.build(named)
    named.begin_task(run)


def test_zero_strength_is_adam():
    a, b = toy.model(), toy.model()
    ours = RecAdamOptimizer(a.parameters(), lr=1e-3, anneal="none", anchor_strength=0.0, eps=1e-15)
    torchs = torch.optim.AdamW(b.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-15)
    train(a, ours, 5)
    train(b, torchs, 5)
    assert (toy.flat(a) - toy.flat(b)).abs().max() < ZERO_TOLERANCE


def test_a_closure_is_called():
    p, optimizer = one()

    def closure():
        p.grad = torch.zeros_like(p)
        return 3.5

    assert optimizer.step(closure) == 3.5 and math.isfinite(float(p.detach()[0]))


def test_a_step_that_the_gradient_scaler_skips_does_not_count():
    """An overflow in fp16: no Adam, no recall, no count."""
    p, optimizer = one(1.0, 0.5, torch.float32, lr=0.1, anchor_strength=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale((p * (float("inf") if overflow else 0.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert p.detach().tolist() == [1.0] * 3 and not optimizer.state
    assert int(optimizer.state[p]["step"]) == 1
    assert p.detach().tolist() == pytest.approx([0.95] * 3)


def test_a_run_from_a_folder_resumes_from_its_base(tmp_path):
    """End to end: no anchor in the checkpoint, the same weights after resuming, a changed base refused."""
    from trl import SFTConfig

    from hf_continual import ContinualTrainer, FreezeLayers

    folder, _ = saved(tmp_path)
    toy.tokenizer().save_pretrained(folder)

    def make():
        changes = {"save_strategy": "steps", "save_steps": 2, "model_init_kwargs": {"dtype": "float32"}}
        return ContinualTrainer(
            str(folder),
            SFTConfig(**toy.settings(tmp_path / "out", **changes)),
            train_dataset=toy.rows(),
            methods=[RecAdam(anneal="none", pull=0.1), FreezeLayers(bottom=1)],
        )

    straight = make()
    straight.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert state and not any("anchor" in entry for entry in state.values())
    record = json.loads((checkpoint / "continual" / "recadam.json").read_text())
    assert record["base"] == str(folder)
    resumed = make()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="The base checkpoint was changed"):
        make().train(resume_from_checkpoint=str(checkpoint))


def test_one_object_may_serve_two_runs(tmp_path):
    """The second run has its own anchors, and its checkpoints record them."""
    _, model = saved(tmp_path)
    method = RecAdam(anneal="none", pull=0.1)
    run = FakeRun(model)
    train(model, run.build(method), 1)
    first = method.state_dict(run)
    again = FakeRun(toy.model(seed=4))
    train(again.model, again.build(method), 1)
    assert "fingerprint" in first and method.state_dict(again) == {"stored": True}


def test_it_logs_its_distance_and_its_pull_when_the_trainer_logs(tmp_path, monkeypatch):
    """The names are stable, the numbers those of the weights, and nothing is measured at the steps between."""
    asked = []
    moved = RecAdam.measure
    monkeypatch.setattr(RecAdam, "measure", lambda self, run: (asked.append(run.step), moved(self, run))[1])
    start, model = toy.flat(toy.model()), toy.model()
    settings = toy.settings(tmp_path, max_steps=4, logging_steps=2, lr_scheduler_type="linear")
    trainer = ContinualTrainer(
        model,
        SFTConfig(**settings),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[RecAdam(anneal="none", pull=0.01)],
    )
    trainer.train()
    assert asked == [2, 4]
    far = [e["recadam/distance"] for e in trainer.state.log_history if "recadam/distance" in e]
    pulls = [e["recadam/pull"] for e in trainer.state.log_history if "recadam/pull" in e]
    assert len(far) == 2 and 0 < far[0]
    assert far[1] == pytest.approx(float((toy.flat(trainer.model) - start).norm()), rel=1e-5)
    # r follows the learning rate of the same entry of the log: half of its peak, and none after the last step.
    assert pulls == pytest.approx([0.005, 0.0])


def test_the_pull_is_that_of_the_formula():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    options = {"lr": 1e-2, "anneal": "sigmoid", "k": 1.0, "t0": 3, "anchor_strength": 50.0}
    optimizer = RecAdamOptimizer([{"params": [weights[0]]}, {"params": [weights[1]], "anneal_w": 0.0}], **options)
    assert pull_now(optimizer) == pytest.approx(0.5 * (1 - 1 / (1 + math.exp(2))))
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert pull_now(optimizer) == pytest.approx(0.5 * (1 - 1 / (1 + math.exp(1))))  # of update 2
