"""Recurrent-KIF against the authors' trainer, and in ours: rounds, buffer, resume, and refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_continual import KIF, ContinualTrainer, FreezeLayers
from hf_continual.methods.base import Method
from hf_continual.methods.kif import PUBLISHED, fuse, top_share_masks, update_importance_
from hf_continual.methods.kif.two_sides import TwoSides
from hf_continual.paper import Paper
from hf_continual.tensors.flat import Flat
from hf_continual.tensors.fusion import adaptive_weights, mask_weights
from hf_continual.tensors.importance import scores, sensitivity, share_threshold
from hf_continual.tensors.selection import key_value, kth_smallest, ordered_keys
from tests import toy
from tests.methods.fake_run import FakeRun

GOLDEN = Path(__file__).parents[1] / "golden" / "kif"
TRACE = load_file(GOLDEN / "trace.safetensors")
UNITS = load_file(GOLDEN / "units_param_first.safetensors")
EDGES = load_file(GOLDEN / "quantile_edges.safetensors")


def memory(number=24):
    return toy.rows(seed=9, low=30, high=59, number=number)


def example(world=None):
    return KIF(memory(), inner_steps=2, outer_steps=2, outer_learning_rate=3e-3)


def zero(world=None):
    return KIF(memory(), inner_steps=2, outer_steps=2, rule="sum", outer_optimizer="none")


ZERO_TOLERANCE = 0.0
EXTRA_FORWARDS = 4  # two outer steps of two micro-batches after two inner steps


def build(folder, *methods, model=None, kind="text", peft=None, **settings):
    return ContinualTrainer(
        toy.model() if model is None else model,
        SFTConfig(**toy.settings(folder, **settings)),
        train_dataset=toy.rows(kind),
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=methods,
    )


# --- the authors' numbers


class Recorded(FakeRun):
    """A run that feeds the recorded batches in the recorded order."""

    def __init__(self, model, rates):
        super().__init__(model, lr=1e-2)
        self.optimizer = torch.optim.AdamW(list(self.named_parameters().values()), lr=0.0, weight_decay=0.0)
        self.rates, self.next, self.notes = rates, 0, {}
        self.schedule, self.is_main_process = 1.0, True

    def prepare(self, rows, row_type="same", name="x"):
        return rows

    def micro_batches(self, rows, step, batch_size=None):
        return [self.batch()]

    def batch(self):
        self.next += 1
        return {k: TRACE[f"batch/{self.next - 1}/{k}"].long() for k in ("input_ids", "attention_mask", "labels")}

    def gradients(self, batches, scale=1.0):
        total = sum(self.model(**b).loss for b in batches) / len(batches)
        (total * scale).backward()
        torch.nn.utils.clip_grad_norm_(self.named_parameters().values(), 1.0)
        return total.detach()

    def update(self, change=None):
        self.optimizer.step()
        return True

    def zero_grad(self):
        self.optimizer.zero_grad()

    def note(self, name, total, count=1.0):
        self.notes[name] = float(total)


def recorded_model():
    config = json.loads((GOLDEN / "events.json").read_text())["config"]
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    made = LlamaForCausalLM(
        LlamaConfig(**{k: config[k] for k in wanted}, rms_norm_eps=1e-6, tie_word_embeddings=False, pad_token_id=0)
    )
    made.load_state_dict(load_file(GOLDEN / "base_model.safetensors"), strict=False)
    lora = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(made, lora)
    adapter = load_file(GOLDEN / "adapter_init.safetensors")
    missing = model.load_state_dict(adapter, strict=False).unexpected_keys
    assert not missing and len(adapter) == 8
    return model


def named(prefix):
    return {k.removeprefix(prefix): v for k, v in TRACE.items() if k.startswith(prefix)}


def test_it_equals_the_authors_trainer_step_by_step():
    """Nine inner steps in three rounds of the fp32 path: weights, averages, masks and the fused result."""
    run = Recorded(recorded_model(), None)
    method = KIF(
        [{"x": 1}],
        inner_steps=3,
        outer_steps=2,
        outer_optimizer="shared",
        outer_loss_scale=0.5,
        rule="code",
        uncertainty=True,
    )
    method.replay(run)
    method.begin_task(run)
    sides = method._sides
    params = run.named_parameters()
    masks, taken = [], []
    original, begin = TwoSides.fuse, TwoSides._mask_out

    def watched_masks(self):
        mask = begin(self)
        masks.append((self.mask_in.clone(), mask.clone()))
        return mask

    def watched_fuse(self):
        before = {n: p.detach().clone() for n, p in params.items()}
        taken.append((self.anchor.clone(), self.middle.clone(), before))
        return original(self)

    sides._mask_out = watched_masks.__get__(sides)
    sides.fuse = watched_fuse.__get__(sides)
    for step in range(9):
        # The schedule of the recording: two warm-up steps, then linear to zero.
        run.optimizer.param_groups[0]["lr"] = 1e-2 * (step / 2 if step < 2 else (9 - step) / 7)
        for batch in (run.batch(), run.batch()):
            (run.model(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for name, wanted in named(f"inner/{step}/grad_clipped/").items():
            torch.testing.assert_close(params[name].grad, wanted, rtol=1e-5, atol=5e-7)
        run.optimizer.step()
        method.after_step(run)
        for name, wanted in named(f"inner/{step}/param_after_step/").items():
            torch.testing.assert_close(params[name].detach(), wanted, rtol=1e-5, atol=1e-6)
        for buffer, key in zip(sides.inner, ("exp_avg_ipt", "exp_avg_unc"), strict=True):
            got = dict(sides.flat.items(buffer))
            for name, wanted in named(f"inner/{step}/{key}/").items():
                torch.testing.assert_close(got[name], wanted, rtol=1e-5, atol=1e-9)
        run.zero_grad()
        # Outer steps use the rate of the next inner step.
        run.optimizer.param_groups[0]["lr"] = 1e-2 * ((step + 1) / 2 if step + 1 < 2 else (9 - step - 1) / 7)
        run.step += 1
        method.end_step(run)
    assert len(masks) == 3 and run.next == 24
    for n in range(3):
        for mask, key in zip(masks[n], ("mask_in_raw", "mask_out_raw"), strict=True):
            got = dict(sides.flat.items(mask))
            for name, wanted in named(f"fuse/{n}/{key}/").items():
                assert torch.equal(got[name], wanted.bool()), (n, key, name)
        anchor, middle, before = taken[n]
        for name, wanted in named(f"fuse/{n}/tau_out/").items():
            tau = before[name] - dict(sides.flat.items(middle))[name]
            torch.testing.assert_close(tau, wanted, rtol=1e-4, atol=1e-6)
        for name, wanted in named(f"fuse/{n}/theta_b/").items():
            torch.testing.assert_close(dict(sides.flat.items(anchor))[name], wanted, rtol=1e-5, atol=1e-6)
    for buffer, key in zip(sides.outer, ("exp_avg_ipt", "exp_avg_unc"), strict=True):
        got = dict(sides.flat.items(buffer))
        for name, wanted in named(f"outer/5/{key}/").items():
            torch.testing.assert_close(got[name], wanted, rtol=1e-5, atol=1e-9)
    finals = named("final/")
    assert len(finals) == 8
    for name, wanted in finals.items():
        torch.testing.assert_close(params[name].detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side, steps", [("inner", 5), ("outer", 3)])
def test_averages_equal_the_recorded_units(side, steps):
    names = sorted(k.removeprefix(f"{side}/0/param/") for k in UNITS if k.startswith(f"{side}/0/param/"))
    averages = {n: [torch.zeros_like(UNITS[f"{side}/0/param/{n}"]) for _ in range(2)] for n in names}
    for t in range(steps):
        for n in names:
            update_importance_(*averages[n], UNITS[f"{side}/{t}/param/{n}"], UNITS[f"{side}/{t}/grad/{n}"])
            torch.testing.assert_close(averages[n][0], UNITS[f"{side}/{t}/I/{n}"], rtol=1e-6, atol=0)
            torch.testing.assert_close(averages[n][1], UNITS[f"{side}/{t}/U/{n}"], rtol=1e-5, atol=1e-12)
    found = {n: scores(*averages[n]) for n in names}
    for scope, key in (("global", "global"), ("tensor", "local")):
        for n, mask in top_share_masks(found, 0.2, scope).items():
            assert torch.equal(mask, UNITS[f"mask_{'in' if side == 'inner' else 'out'}_{key}/{n}"].bool()), (scope, n)


def test_fusion_equals_the_recorded_units():
    names = [k.removeprefix("fused/") for k in UNITS if k.startswith("fused/")]
    assert len(names) == 4
    for n in names:
        masks = [UNITS[f"mask_{side}_global/{n}"].bool() for side in ("in", "out")]
        fused = fuse(UNITS[f"theta_b/{n}"], UNITS[f"tau_in/{n}"], UNITS[f"tau_out/{n}"], *masks)
        torch.testing.assert_close(fused, UNITS[f"fused/{n}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", range(6))
def test_the_quantile_at_its_edges(case):
    x = EDGES[f"x/{case}"]
    assert torch.equal(top_share_masks({"x": x}, 0.2)["x"], EDGES[f"mask/{case}"].bool())


# --- the pure functions


@pytest.mark.parametrize("share", [0.2, 0.5, 0.01, 0.9, 1.0])
@pytest.mark.parametrize("number", [1, 2, 5, 6, 11, 1000, 4097])
def test_masks_are_those_of_the_interpolated_quantile(share, number):
    x = torch.rand(number, generator=torch.Generator().manual_seed(number)).round(decimals=3)
    wanted = x.double() > torch.quantile(x.double(), 1 - share)
    assert torch.equal(top_share_masks({"x": x}, share)["x"], wanted)
    counted = share_threshold(x, share, number, lambda counts: counts)
    assert torch.equal(x > counted, wanted)


def test_more_scores_than_a_quantile_of_torch_takes():
    x = torch.arange(2**24 + 5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.8)
    assert abs(int(top_share_masks({"x": x}, 0.2)["x"].sum()) - 0.2 * len(x)) <= 2


def test_the_kth_smallest_by_counting_is_exact():
    g = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.randn(5000, generator=g), torch.zeros(50), -torch.zeros(50), 1e-30 * torch.randn(500, generator=g)]
    )
    wanted = x.sort().values
    for k in (0, 1, 2499, 2800, len(x) - 1):
        assert kth_smallest(lambda: x.split(777), k) == wanted[k]
    assert torch.equal(key_value(ordered_keys(x)), x + 0.0)
    with pytest.raises(ValueError, match=f"among {len(x)} values"):
        kth_smallest(lambda: [x], len(x))


def test_tensors_have_quantiles_of_their_own_or_one():
    given = {"small": torch.arange(10.0), "large": 100 + torch.arange(10.0), "none": torch.zeros(0)}
    together = top_share_masks(given, 0.2)
    apart = top_share_masks(given, 0.2, "tensor")
    assert [int(m.sum()) for m in together.values()] == [0, 4, 0]
    assert [int(m.sum()) for m in apart.values()] == [2, 2, 0]
    with pytest.raises(ValueError, match="not all finite"):
        top_share_masks({"x": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ValueError, match="no scores"):
        top_share_masks({})
    with pytest.raises(ValueError, match=r"share=0 must lie in \(0, 1\]"):
        top_share_masks(given, 0)


def test_sensitivities_worked_by_hand():
    w, g = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 0.1])
    assert sensitivity(w, g).tolist() == pytest.approx([1.0, 0.3])
    assert sensitivity(w, g, "second").tolist() == pytest.approx([1.0, 0.09])
    assert sensitivity(w, g, "mixed").tolist() == pytest.approx([0.5, 0.345])
    importance, uncertainty = torch.zeros(2), torch.zeros(2)
    update_importance_(importance, uncertainty, w, g, 0.5, 0.5)
    assert importance.tolist() == pytest.approx([0.5, 0.15]) and uncertainty.tolist() == pytest.approx([0.25, 0.075])
    kept = importance.clone(), uncertainty.clone()
    update_importance_(importance, uncertainty, w, g * float("nan"), valid=torch.tensor(False))
    assert torch.equal(importance, kept[0]) and torch.equal(uncertainty, kept[1])


def test_small_scores_keep_their_order():
    tiny = torch.tensor([1e-24, 2e-24, 3e-24])
    assert (tiny * tiny == 0).all()
    assert scores(tiny, tiny).diff().gt(0).all()


@pytest.mark.parametrize(
    "rule, wanted",
    [("code", [1.6, 1.0, 2.0, 1.5]), ("paper", [3.0, 1.0, 2.0, 0.0]), ("no_shared", [0.0, 1.0, 2.0, 1.5])],
)
def test_rules_worked_by_hand(rule, wanted):
    m_in, m_out = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    fused = fuse(torch.zeros(4), torch.ones(4), 2 * torch.ones(4), m_in, m_out, rule)
    assert fused.tolist() == pytest.approx(wanted)
    low = fuse(torch.zeros(4).bfloat16(), torch.ones(4), 2 * torch.ones(4), m_in, m_out, rule)
    assert low.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="there are code, paper, no_shared"):
        mask_weights(m_in, m_out, "other")


def test_adaptive_weights_are_a_sigmoid():
    w_in, w_out = adaptive_weights(torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.1]), 0.5)
    assert w_in.tolist() == pytest.approx([0.8320184, 0.5]) and torch.equal(w_in + w_out, torch.ones(2))


# --- in the trainer


class Watch(Method):
    """Counts what the methods see of forward passes."""

    name, paper = "watch", Paper("x", "y", 2020)

    def __init__(self):
        self.forwards = 0

    def loss_terms(self, forward):
        self.forwards += 1
        return {}


def test_memory_is_in_no_metric_and_steps_are_counted_as_without(tmp_path):
    settings = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "max_steps": 4}
    plain = SFTTrainer(
        toy.model(), SFTConfig(**toy.settings(tmp_path, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
    )  # fmt: skip
    plain.train()
    watch = Watch()
    ours = build(tmp_path, watch, KIF(memory(), inner_steps=4, outer_steps=3), **settings)
    ours.train()
    assert watch.forwards == 8 and ours.state.global_step == 4
    # Before the first fusion nothing differs; after it the log still counts only the task's tokens.
    for a, b in zip(toy.logs(plain)[:4], toy.logs(ours)[:4], strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "mean_token_accuracy"):
            assert a[key] == b[key], key
    last = toy.logs(ours)[3]
    assert last["kif/memory_loss"] > 0
    shares = [last[f"kif/{k}"] for k in ("both", "in_only", "out_only", "neither")]
    assert sum(shares) == pytest.approx(1) and shares[0] + shares[1] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["separate", "shared", "none"])
def test_the_outer_learner_learns_the_memory_unless_told_not_to(tmp_path, optimizer):
    settings = {"lr_scheduler_type": "constant", "max_steps": 24, "learning_rate": 3e-3}
    trainer = build(tmp_path, KIF(memory(), inner_steps=2, outer_steps=4, outer_optimizer=optimizer), **settings)
    trainer.train()
    losses = [entry["kif/memory_loss"] for entry in toy.logs(trainer) if "kif/memory_loss" in entry]
    assert len(losses) == 12
    if optimizer == "none":
        assert losses[-1] > losses[0]  # forgotten: the task uses different words
    else:
        assert losses[-1] < losses[0] - 0.5


def test_a_rate_of_zero_moves_nothing(tmp_path):
    """The rate follows the schedule: after the last step of a linear one the outer learner does not move."""
    method = KIF(memory(), inner_steps=4, outer_steps=2, outer_learning_rate=1.0)
    trainer = build(tmp_path, method, lr_scheduler_type="linear", max_steps=4)
    seen = []
    original = TwoSides.fuse

    def watched(self):
        now = self.flat.zeros()
        self.flat.copy_weights(now)
        seen.append(torch.equal(now, self.middle))
        return original(self)

    TwoSides.fuse = watched
    try:
        trainer.train()
    finally:
        TwoSides.fuse = original
    assert seen == [True]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_state_is_at_most_six_values_a_weight(tmp_path, peft):
    lora = LoraConfig(r=4, target_modules="all-linear") if peft else None
    for uncertainty, values in ((True, 5), (False, 3)):
        method = KIF(memory(), inner_steps=2, outer_steps=1, outer_optimizer="shared", uncertainty=uncertainty)
        seen = []
        trainer = build(tmp_path, method, peft=lora)
        outer_step = method._outer_step
        method._outer_step = lambda *a, seen=seen, step=outer_step: (step(*a), seen.append(method.memory_bytes()))
        trainer.train()
        number = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        assert method._sides.flat.size == number
        assert method.memory_bytes() == values * 4 * number and max(seen) == (values * 4 + 1) * number <= 6 * 4 * number


RULES = {
    "code": {"rule": "code", "uncertainty": True},
    "uncertainty": {"uncertainty": True},
    "no_shared": {"rule": "no_shared"},
    "adaptive": {"rule": "adaptive", "temperature": 0.5},
    "weighted": {"rule": "weighted"},
    "weighted-tensor": {"rule": "weighted", "scope": "tensor"},
    "weighted-uncertainty": {"rule": "weighted", "uncertainty": True},
    "sum": {"rule": "sum"},
    "static": {"old_importance": "static"},
    "tensor": {"scope": "tensor"},
    "second": {"order": "second"},
    "mixed": {"order": "mixed"},
    "every-second": {"importance_every": 2},
    "shared": {"outer_optimizer": "shared"},
    "none": {"outer_optimizer": "none"},
}


@pytest.mark.parametrize("name", RULES)
def test_each_option_trains_resumes_and_changes_something(tmp_path, name):
    def run(folder, resume=None, **options):
        trainer = build(
            tmp_path / folder, KIF(memory(), inner_steps=2, outer_steps=2, **options),
            max_steps=6, save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return toy.flat(trainer.model)

    plain, straight = run("plain"), run(name, **RULES[name])
    assert torch.isfinite(straight).all()
    # |w g| is so small here that its square does not change the order.
    assert torch.equal(plain, straight) == (name == "mixed")
    assert torch.equal(straight, run(name, str(tmp_path / name / "checkpoint-3"), **RULES[name]))


def test_static_importance_is_measured_in_the_first_round_only(tmp_path):
    method = KIF(memory(), inner_steps=1, outer_steps=2, old_importance="static")
    trainer = build(tmp_path, method, max_steps=1)
    trainer.train()
    first = [b.clone() for b in method._sides.outer]
    again = KIF(memory(), inner_steps=1, outer_steps=2, old_importance="static")
    build(tmp_path, again, max_steps=3).train()
    # Three steps have a different schedule than one; the point is that two more rounds did not add to its mass.
    assert all((b > 0).any() for b in first)
    state = KIF(memory(), inner_steps=1, outer_steps=2)
    build(tmp_path, state, max_steps=3).train()
    assert again._sides.outer[0].sum() != state._sides.outer[0].sum()


def test_low_precision_weights_have_float32_state(tmp_path):
    def run(resume=None):
        method = KIF(memory(), inner_steps=2, outer_steps=2)
        trainer = build(
            tmp_path, method, model=toy.model().to(torch.bfloat16), max_steps=6, save_strategy="steps", save_steps=3
        )
        trainer.train(resume_from_checkpoint=resume)
        assert all(b.dtype == torch.float32 for b in [*method._sides.buffers().values(), *method._learner.moments])
        assert all(p.dtype == torch.bfloat16 for p in trainer.model.parameters())
        return toy.flat(trainer.model)

    assert torch.equal(run(), run(str(tmp_path / "checkpoint-3")))


@pytest.mark.parametrize("layout", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_memory_goes_through_the_trainers_collator(tmp_path, layout):
    trainer = build(tmp_path, example(), **layout)
    trainer.train()
    assert torch.isfinite(toy.flat(trainer.model)).all()
    assert any("kif/memory_loss" in entry for entry in toy.logs(trainer))


def test_gradients_of_memory_are_those_of_a_training_step(tmp_path):
    """The task's own rows give exactly the gradient that the trainer computes for them."""
    trainer = build(tmp_path, KIF(memory(), inner_steps=9), gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    rows = trainer.run.prepare(toy.rows(seed=3, number=6))
    batches = list(trainer.run.batches(rows, 3))
    trainer.run.zero_grad()
    loss = trainer.run.gradients(batches)
    got = {n: p.grad.clone() for n, p in trainer.run.named_parameters().items()}
    trainer.run.zero_grad()
    items = trainer._get_num_items_in_batch(batches, trainer.args.device)
    wanted = sum(SFTTrainer.compute_loss(trainer, trainer.model, dict(b), num_items_in_batch=items) for b in batches)
    wanted.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for name, p in trainer.run.named_parameters().items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_on_a_quantised_base(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    toy.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    method = example()
    trainer = build(
        tmp_path / "out", method, model=quantised, peft=LoraConfig(r=2, target_modules="all-linear"),
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    assert all("lora_" in name for name in method._sides.flat.params)
    assert torch.isfinite(method._sides.anchor).all()
    assert (tmp_path / "out" / "checkpoint-3" / "continual" / "kif.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_run_resumes_as_exactly_as_without(tmp_path):
    """Plain SFTTrainer does not resume QLoRA bit for bit: adapters are bfloat16 when new and float32 when loaded."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    toy.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def run(folder, methods, resume=None):
        trainer = build(
            tmp_path / folder, *methods,
            model=AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=four_bit, device_map="cpu"
            ),
            peft=LoraConfig(r=2, target_modules="all-linear"), save_strategy="steps", save_steps=3, max_steps=6,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().float().flatten() for p in trainer.model.parameters() if p.requires_grad])

    far = []
    for folder, methods in (("plain", list), ("kif", lambda: [example()])):
        straight = run(folder, methods())
        resumed = run(folder, methods(), str(tmp_path / folder / "checkpoint-3"))
        far.append((straight - resumed).norm() / straight.norm())
    assert 0 < far[0] < 0.02 and far[1] < 2 * far[0]


class Spoil(Method):
    """Writes a NaN into the gradients of one step, and keeps the weights unchanged."""

    name, paper = "spoil", Paper("x", "y", 2020)

    def __init__(self, step):
        self.step, self.count = step, 0

    def edit_gradients(self, params):
        self.count += 1
        for p in params.values():
            if self.count == self.step:
                p.grad.zero_()

    def after_step(self, run):
        if self.count == self.step:
            next(iter(run.named_parameters().values())).grad[0] = float("nan")


def test_gradients_that_are_not_finite_are_left_out_counted_and_said(tmp_path, caplog):
    method = KIF(memory(), inner_steps=4, outer_steps=1)
    with caplog.at_level(logging.WARNING, "hf_continual"):
        trainer = build(tmp_path, Spoil(2), method, max_steps=4)
        trainer.train()
    assert float(method._sides.left_out) == 1
    assert "1 steps had gradients that were not finite" in caplog.text
    assert torch.isfinite(toy.flat(trainer.model)).all()
    assert all(torch.isfinite(b).all() for b in method._sides.buffers().values())


def test_a_gradient_scaler_skips_the_outer_step(tmp_path, monkeypatch):
    """As under fp16: gradients are unscaled, an overflow moves no weight, and the scaler forgets both."""
    trainer = build(tmp_path, KIF(memory(), inner_steps=9), max_steps=1, max_grad_norm=1e9)
    trainer.train()
    run, accelerator = trainer.run, trainer.accelerator
    batch = list(run.batches(run.prepare(toy.rows(seed=3, number=4)), 4))
    run.zero_grad()
    run.gradients(batch)
    wanted = {n: p.grad.clone() for n, p in run.named_parameters().items()}
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    accelerator.native_amp = True
    monkeypatch.setattr(type(accelerator), "mixed_precision", property(lambda self: "fp16"))
    called = []
    for _ in range(2):  # twice: a scaler refuses to unscale twice without an update in between
        run.zero_grad()
        run.gradients(batch)
        for name, p in run.named_parameters().items():
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-7)
        assert run.update(lambda: called.append(1))
    run.gradients(batch)
    next(iter(run.named_parameters().values())).grad.fill_(float("inf"))
    assert not run.update(lambda: called.append(1)) and len(called) == 2


def test_an_object_that_serves_a_second_run_starts_over(tmp_path):
    method = example()
    build(tmp_path / "a", method).train()
    again = build(tmp_path / "b", method)
    again.train()
    fresh = build(tmp_path / "c", example())
    fresh.train()
    assert torch.equal(toy.flat(again.model), toy.flat(fresh.model))


def test_only_what_is_trained_is_laid_out(tmp_path):
    method = example()
    trainer = build(tmp_path, FreezeLayers(bottom=2), method)
    trainer.train()
    assert method._sides.flat.size == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


# --- what is refused or logged


def test_the_first_task_needs_no_memory_and_later_ones_do(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_continual"):
        first = build(tmp_path, KIF())
    assert "first task has no rows of earlier tasks" in caplog.text
    plain = build(tmp_path)
    plain.train()
    first.train()
    assert torch.equal(toy.flat(plain.model), toy.flat(first.model))
    from hf_continual import ContinualConfig

    for nothing in (None, [], Dataset.from_list([])):
        with pytest.raises(ValueError, match="task 2 .'law'. has no rows of earlier tasks"):
            ContinualTrainer(
                toy.model(),
                ContinualConfig(**toy.settings(tmp_path), task_name="law", task_index=2),
                train_dataset=toy.rows(),
                processing_class=toy.tokenizer(),
                methods=[KIF(nothing)],
            )


def test_steps_that_do_not_make_a_full_round_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_continual"):
        build(tmp_path, KIF(memory(), inner_steps=3), max_steps=4).train()
    assert "the last 1 steps do not make a full round of 3" in caplog.text


def test_everything_frozen_is_refused(tmp_path):
    class All(Method):
        name, paper = "all", Paper("x", "y", 2020)

        def prepare_model(self, model, task):
            model.requires_grad_(False)

    with pytest.raises(ValueError, match="no parameter is trainable"):
        build(tmp_path, KIF(memory()), All()).train()


def test_a_state_of_another_adapter_is_refused(tmp_path):
    def make(rank):
        return build(
            tmp_path, example(), peft=LoraConfig(r=rank, target_modules=["q_proj"]), save_strategy="steps", save_steps=3
        )

    trainer = make(2)
    trainer.train()
    state = trainer.methods.methods[0].state_dict(trainer.run)
    other = make(3)
    other.create_optimizer()
    with pytest.raises(ValueError, match=r"8 differ, first .*lora_A.* there, \(3, 32\) here"):
        other.methods.methods[0].load_state_dict(state, other.run)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rule": "best"}, ValueError, "must be one of code, paper"),
        ({"inner_steps": 0}, ValueError, "must be at least 1"),
        ({"outer_steps": 2.5}, TypeError, "must be a whole number"),
        ({"top_share": 0}, ValueError, "must lie between 0 and 1"),
        ({"beta1": 1.0}, ValueError, "must lie between 0 and 1"),
        ({"beta2": "x"}, TypeError, "must be a number"),
        ({"outer_optimizer": "shared", "outer_learning_rate": 1e-3}, ValueError, "has no separate rate"),
        ({"importance_every": 9}, ValueError, "more than the 8 inner steps"),
        ({"memory": "nowhere.jsonl"}, FileNotFoundError, "does not exist"),
    ],
)
def test_hyper_parameters_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        KIF(**options)


def test_published_settings_by_name_and_as_recipes():
    import yaml

    for name, wanted in PUBLISHED.items():
        made = KIF.published(name, memory())
        assert {k: getattr(made, k) for k in wanted} == wanted
        recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "kif" / f"{name}.yaml").read_text())
        given = {**KIF().describe(), **recipe["methods"]["kif"]}
        assert {k: given[k] for k in wanted} == wanted, name
    assert KIF.published("llama", memory(), inner_steps=4).inner_steps == 4
    with pytest.raises(ValueError, match="there are paper, t5, llama"):
        KIF.published("gpt")


def test_the_adapter_alone_is_laid_out_in_its_own_order():
    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    flat = Flat({n: p for n, p in model.named_parameters() if p.requires_grad})
    buffer = flat.zeros()
    flat.copy_weights(buffer)
    for name, view in flat.items(buffer):
        assert torch.equal(view, flat.params[name].detach())
    assert sum(b.stop - b.start for b in flat.buckets) == flat.size


def test_weights_on_several_devices_are_refused():
    with pytest.raises(ValueError, match="are on cpu, meta"):
        Flat({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")})
