"""Offline fusion: equal to the functions on tensors and to a round of the trainer, bounded, resumable, with refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_continual import KIF, ContinualTrainer, kif_fuse
from hf_continual.merging.errors import MergeError
from hf_continual.merging.methods.kif import calibration as kif_calibration
from hf_continual.merging.methods.kif.scores import stored_name
from hf_continual.methods.kif.two_sides import TwoSides
from hf_continual.tensors.fusion import adaptive_weights, blend, fuse
from hf_continual.tensors.importance import scores, top_share_masks, update_importance_
from tests import toy
from tests.merging.world import adapter, build, digest, family, logits, save, tensors

GROUPS = ("both", "new_only", "old_only", "neither")


def write_scores(path: Path, like: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A score per element, with ties, in the file and back."""
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.rand(t.shape, generator=g).mul(1000).round().div(1000).pow(3) for n, t in like.items()}
    save_file(made, path)
    return made


@pytest.fixture
def world(tmp_path):
    """Base, new, old, and scores of both sides."""
    folders = family(tmp_path, number=2)
    like = tensors(folders[0])
    return *folders, {s: write_scores(tmp_path / f"{s}.safetensors", like, i) for i, s in enumerate(("new", "old"))}


def moved(start: Path, folder: Path, seed: int) -> Path:
    """An adapter that continued from another."""
    g = torch.Generator().manual_seed(seed)
    folder.mkdir()
    made = {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in tensors(start).items()}
    save_file(made, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((start / "adapter_config.json").read_text())
    return folder


def files(tmp_path):
    return tmp_path / "new.safetensors", tmp_path / "old.safetensors"


def in_memory(base, new, old, sides, rule, share=0.2, scope="global", dtype=torch.float32):
    """The functions of `hf_continual.tensors` on whole tensors."""
    m_in, m_out = (top_share_masks(sides[s], share, scope) for s in ("new", "old"))
    b, n, o = ({k: t.float() for k, t in tensors(f).items()} for f in (base, new, old))
    return {k: fuse(b[k], n[k] - b[k], o[k] - b[k], m_in[k], m_out[k], rule).to(dtype) for k in b}


# --- the same as on tensors


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("rule", ["code", "paper", "no_shared"])
def test_it_equals_fuse_on_tensors_bit_for_bit(tmp_path, world, rule, scope):
    base, new, old, sides = world
    result = kif_fuse(
        base, new, tmp_path / "out", old=old, importance=files(tmp_path), rule=rule, scope=scope, top_share=0.3,
        max_shard_size="40KB",
    )  # fmt: skip
    wanted, got = in_memory(base, new, old, sides, rule, 0.3, scope), tensors(tmp_path / "out")
    assert got.keys() == wanted.keys() and len(digest(tmp_path / "out")) > 2
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, wanted[n]) for n, p in loaded.named_parameters())
    assert torch.isfinite(logits(loaded)).all()
    assert result.kind == "model" and result.method == "kif" and result.paper.arxiv == "2502.17510"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(tmp_path, dtype):
    base, new, old = family(tmp_path, dtype=dtype)
    sides = {s: write_scores(tmp_path / f"{s}.safetensors", tensors(base), i) for i, s in enumerate(("new", "old"))}
    kif_fuse(base, new, tmp_path / "out", old=old, importance=files(tmp_path))
    wanted, got = in_memory(base, new, old, sides, "code", dtype=dtype), tensors(tmp_path / "out")
    assert all(got[n].dtype == dtype and torch.equal(got[n], wanted[n]) for n in wanted)
    kif_fuse(base, new, tmp_path / "wide", old=old, importance=files(tmp_path), dtype="float32")
    wide = in_memory(base, new, old, sides, "code")
    assert all(torch.equal(t, wide[n]) for n, t in tensors(tmp_path / "wide").items())


def test_without_old_only_the_masks_know_of_it(tmp_path, world):
    base, new, _, sides = world
    kif_fuse(base, new, tmp_path / "out", importance=files(tmp_path))
    kif_fuse(base, new, tmp_path / "same", old=base, importance=files(tmp_path))
    wanted = in_memory(base, new, base, sides, "code")
    assert all(torch.equal(t, wanted[n]) for n, t in tensors(tmp_path / "out").items())
    assert digest(tmp_path / "out") == digest(tmp_path / "same")


def test_soft_rules(tmp_path, world):
    base, new, old, sides = world
    b, n, o = (tensors(f) for f in (base, new, old))
    flat = {s: torch.cat([t.flatten() for t in sides[s].values()]) for s in sides}
    kif_fuse(base, new, tmp_path / "soft", old=old, importance=files(tmp_path), rule="adaptive", temperature=0.5)
    for name, got in tensors(tmp_path / "soft").items():
        z = [(sides[s][name] - flat[s].min()) / (flat[s].max() - flat[s].min()) for s in ("new", "old")]
        w = adaptive_weights(*z, 0.5)
        assert torch.equal(got, blend(b[name], n[name] - b[name], o[name] - b[name], *w)), name
    for scope in ("global", "tensor"):
        given = {"old": old, "importance": files(tmp_path), "rule": "weighted", "scope": scope}
        result = kif_fuse(base, new, tmp_path / scope, **given)
        for name, got in tensors(tmp_path / scope).items():
            sums = [(flat[s] if scope == "global" else sides[s][name]).double().sum() for s in ("new", "old")]
            share = (sums[0] / sum(sums)).float()
            wanted = blend(b[name], n[name] - b[name], o[name] - b[name], share, 1 - share)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
            assert result.report["tensors"][name]["new_weight"] == pytest.approx(float(share), rel=1e-6)
    report = json.loads((tmp_path / "soft" / "kif_report.json").read_text())
    assert 0 < report["layers"]["layer.0"]["new_weight"] < 1 and (tmp_path / "soft" / "kif_sides.png").is_file()


# --- the same as in the trainer


def one_round(tmp_path, monkeypatch, peft, dtype, rule):
    """A round of `KIF` in the trainer: where it started, passed and ended, and its averages, on disk."""
    taken = {}
    end_inner, fuse_sides = TwoSides.end_inner, TwoSides.fuse

    def before_outer(self):
        taken.update({k: self.flat.named(v, f"{k}/") for k, v in self.buffers().items() if k.startswith("inner")})
        end_inner(self)

    def before_fusion(self):
        taken.update({k: self.flat.named(v, f"{k}/") for k, v in self.buffers().items() if k.startswith("outer")})
        for name, buffer in (("base", self.anchor), ("new", self.middle)):
            now = {n: p.detach().clone() for n, p in self.flat.params.items()}
            with torch.no_grad():
                for n, view in self.flat.items(buffer):
                    self.flat.params[n].copy_(view)
                trainer.model.save_pretrained(tmp_path / name)
                for n, p in self.flat.params.items():
                    p.copy_(now[n])
        trainer.model.save_pretrained(tmp_path / "old")
        return fuse_sides(self)

    monkeypatch.setattr(TwoSides, "end_inner", before_outer)
    monkeypatch.setattr(TwoSides, "fuse", before_fusion)
    memory = toy.rows(seed=9, low=30, high=59)
    trainer = ContinualTrainer(
        toy.model().to(dtype),
        args=config(tmp_path / "run"),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=[KIF(memory, inner_steps=3, outer_steps=2, outer_learning_rate=1e-2, rule=rule, uncertainty=True)],
    )
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "fused")
    state = {n: t for part in taken.values() for n, t in part.items()}
    (tmp_path / "state" / "continual").mkdir(parents=True)
    save_file(state, tmp_path / "state" / "continual" / "kif.safetensors")
    return trainer


def config(folder, **changes):
    from trl import SFTConfig

    return SFTConfig(**toy.settings(folder, **{"max_steps": 3, "lr_scheduler_type": "constant", **changes}))


@pytest.mark.parametrize(
    "kind, rule",
    [("full", "code"), ("bfloat16", "code"), ("adapter", "code"), ("adapter", "paper"), ("adapter", "adaptive")],
)
def test_it_equals_a_round_of_the_trainer_bit_for_bit(tmp_path, monkeypatch, kind, rule):
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if kind == "adapter" else None
    one_round(tmp_path, monkeypatch, peft, torch.bfloat16 if kind == "bfloat16" else torch.float32, rule)
    result = kif_fuse(
        tmp_path / "base", tmp_path / "new", tmp_path / "out", old=tmp_path / "old", old_from="new",
        importance=tmp_path / "state", rule=rule,
    )  # fmt: skip
    wanted, got = tensors(tmp_path / "fused"), tensors(tmp_path / "out")
    assert wanted.keys() == got.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    assert not all(torch.equal(t, wanted[n]) for n, t in tensors(tmp_path / "new").items())
    assert result.kind == ("adapter" if kind == "adapter" else "model")
    if rule != "adaptive":
        assert sum(result.report["all"][g] for g in GROUPS) == result.report["all"]["elements"]


def test_a_checkpoint_of_a_run_gives_the_importance_but_right_after_a_fusion(tmp_path):
    base = toy.model()
    base.save_pretrained(tmp_path / "model")
    start = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    start.save_pretrained(tmp_path / "start")
    trainer = ContinualTrainer(
        start, config(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=1), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), methods=[KIF(toy.rows(seed=9), inner_steps=2, outer_steps=1, uncertainty=True)],
    )  # fmt: skip
    trainer.train()
    new, state = tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-3"
    kif_fuse(tmp_path / "start", new, tmp_path / "out", importance=state)
    held = load_file(state / "continual" / "kif.safetensors")
    sides = {}
    for side, learner in (("new", "inner"), ("old", "outer")):
        names = [n.removeprefix(f"{learner}.importance/") for n in held if n.startswith(f"{learner}.importance/")]
        assert len(names) == 16 and all(".default." in n for n in names)
        pairs = {n: [held[f"{learner}.{k}/{n}"] for k in ("importance", "uncertainty")] for n in names}
        sides[side] = {stored_name(n): scores(*pair) for n, pair in pairs.items()}
    wanted = in_memory(tmp_path / "start", new, tmp_path / "start", sides, "code")
    got = tensors(tmp_path / "out")
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path / "out")
    factor = loaded.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(factor, got["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    assert torch.isfinite(logits(loaded)).all()
    with pytest.raises(MergeError, match=r"no importance of the new side.*right after a fusion.*calibration_new=ROWS"):
        kif_fuse(tmp_path / "start", new, tmp_path / "no", importance=tmp_path / "run" / "checkpoint-2")
    mixed = kif_fuse(
        tmp_path / "start", new, tmp_path / "mixed", importance=tmp_path / "run" / "checkpoint-2",
        calibration_new=toy.rows(), base_model=save(toy.model(), tmp_path / "whole"),
    )  # fmt: skip
    told = mixed.report["options"]
    assert told["importance_new"]["from"] == "calibration" and told["importance_old"]["from"] == "state"
    assert told["importance_old"]["file"] == "checkpoint-2/continual/kif.safetensors"


# --- importance from rows


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_calibration_is_the_average_over_batches(tmp_path, kind):
    model = build()
    base = save(model, tmp_path / "whole")
    if kind == "full":
        _, new, old = family(tmp_path)
        start = base
    else:
        start = adapter(model, tmp_path / "start", 1)
        new, old = (moved(start, tmp_path / n, i) for i, n in enumerate(("new", "old")))
    rows = {"new": toy.rows("prompt_completion", 5), "old": toy.rows("text", 4, low=30, high=59)}
    given = {"calibration_new": rows["new"], "calibration_old": rows["old"]}
    result = kif_fuse(start, new, tmp_path / "out", old=old, batch_size=2, base_model=base, **given)
    sides = {}
    for side, folder in (("new", new), ("old", old)):
        loaded = AutoModelForCausalLM.from_pretrained(base if kind == "adapter" else folder)
        if kind == "adapter":
            loaded = PeftModel.from_pretrained(loaded, folder, is_trainable=True)
        loaded.eval()
        params = {n: p for n, p in loaded.named_parameters() if p.requires_grad}
        averages = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in params.items()}
        order = torch.randperm(len(rows[side]), generator=torch.Generator().manual_seed(0)).tolist()
        t = toy.tokenizer()
        for i in range(0, len(order), 2):
            picked, total, count = [rows[side][j] for j in order[i : i + 2]], 0.0, 0
            for row in picked:
                prompt = t(row["prompt"])["input_ids"] if side == "new" else []
                text = row["prompt"] + row["completion"] if side == "new" else row["text"]
                ids = torch.tensor([*t(text)["input_ids"], 1])
                log_probs = loaded(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
                nll = -log_probs.gather(-1, ids[1:, None])[max(len(prompt) - 1, 0) :]
                total, count = total + nll.sum(), count + len(nll)
            loaded.zero_grad()
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            for n, p in params.items():
                update_importance_(*averages[n], p.detach(), p.grad)
        sides[side] = {stored_name(n): scores(*pair) for n, pair in averages.items()}
    wanted = in_memory(start, new, old, sides, "code")
    got = tensors(tmp_path / "out")
    # Sums in another order may swap two elements at a threshold.
    differing = sum(int((got[n] - wanted[n]).abs().gt(1e-6).sum()) for n in wanted)
    assert got.keys() == wanted.keys() and differing <= 1e-3 * sum(t.numel() for t in wanted.values())
    told = result.report["options"]["importance_new"]
    assert (told["rows"], told["batches"], told["left_out"]) == (5, 3, 0) and told[
        "score"
    ] == "importance x uncertainty"


def test_only_what_changed_is_measured(tmp_path):
    base, new, _ = family(tmp_path)
    kept = [n for n in tensors(base) if "layers.0" in n or "embed" in n]
    changed = load_file(new / "model.safetensors") | {n: tensors(base)[n] for n in kept}
    save_file(changed, new / "model.safetensors", metadata={"format": "pt"})
    result = kif_fuse(base, new, tmp_path / "out", calibration_new=toy.rows(), calibration_old=toy.rows(seed=3))
    assert sorted(result.report["copied"]) == sorted(kept)
    assert not result.report["tensors"].keys() & set(kept)
    whole = tensors(tmp_path / "out")
    assert all(torch.equal(whole[n], tensors(base)[n]) for n in kept)
    share = result.report["all"]["both"] + result.report["all"]["new_only"]
    assert share == pytest.approx(0.2 * result.report["all"]["elements"], abs=2)


@pytest.mark.parametrize("kind", ["text", "messages", "prompt_completion", "tokenized"])
def test_rows_of_every_kind(kind):
    found = kif_calibration.encoded_rows(toy.rows(kind, 4), toy.tokenizer(), 6)
    assert len(found) == 4
    for ids, labels in found:
        assert len(ids) == len(labels) <= 6 and all(label in (i, -100) for i, label in zip(ids, labels, strict=True))
    if kind == "prompt_completion":
        assert all(labels[0] == -100 and labels[-1] == 1 for _, labels in found)


def test_broken_gradients_are_left_out(tmp_path, monkeypatch):
    base, new, _ = family(tmp_path)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def spoiled(params, *a):
        calls.append(1)
        params = list(params)
        if len(calls) == 2:
            params[0].grad[0] = float("nan")
        return clip(params, *a)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    result = kif_fuse(base, new, tmp_path / "out", calibration_new=toy.rows(), calibration_old=toy.rows(seed=3))
    assert result.report["options"]["importance_new"]["left_out"] == 1
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "out").values())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(float("nan")))
    with pytest.raises(MergeError, match="gradients of all 3 batches are not finite"):
        kif_fuse(base, new, tmp_path / "no", calibration_new=toy.rows(), calibration_old=toy.rows(seed=3))


# --- report, plan, memory, kills


def test_the_report_says_which_side_each_element_went_to(tmp_path, world):
    base, new, old, sides = world
    kif_fuse(base, new, tmp_path / "out", old=old, importance=files(tmp_path))
    text = (tmp_path / "out" / "kif_report.json").read_text()
    report = json.loads(text)
    assert str(tmp_path) not in text and "/" not in report["options"]["importance_new"]["file"]
    m_in, m_out = (top_share_masks(sides[s]) for s in ("new", "old"))
    for name, told in report["tensors"].items():
        a, b = m_in[name], m_out[name]
        wanted = [int(m.sum()) for m in (a & b, a & ~b, b & ~a, ~(a | b))]
        assert [told[g] for g in GROUPS] == wanted and told["elements"] == a.numel()
    for group in (*GROUPS, "elements"):
        assert report["all"][group] == sum(layer[group] for layer in report["layers"].values())
    assert list(report["layers"]) == ["embed", "layer.0", "layer.1", "layer.2", "final"]
    flat = torch.cat([t.flatten() for t in sides["new"].values()])
    assert report["thresholds"]["new"] == float(flat.kthvalue(int(0.8 * (len(flat) - 1)) + 1).values)
    assert [m["role"] for m in report["models"]] == ["base", "new", "old"]
    assert all(len(m["fingerprint"]) == 64 for m in report["models"])
    assert len({report["options"][f"importance_{s}"]["fingerprint"] for s in ("new", "old")}) == 2
    assert (tmp_path / "out" / "kif_sides.png").read_bytes()[:4] == b"\x89PNG"


def test_a_dry_run_states_the_memory_and_writes_nothing(tmp_path, world, capsys):
    base, new, old, _ = world
    before = sorted(tmp_path.iterdir())
    kif_fuse(base, new, tmp_path / "out", old=old, importance=files(tmp_path), dry_run=True)
    kif_fuse(base, new, tmp_path / "out", calibration_new=toy.rows(), calibration_old=toy.rows(), dry_run=True)
    said = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before and said.count("MiB of buffers") == 2 and "top_share" in said


CHILD = """
import json, sys
import matplotlib.figure, matplotlib.backends.backend_agg
import torch
torch.set_num_threads(1)
from hf_continual.merging import pipeline
from hf_continual.merging.methods.kif.fuse import kif_fuse
from hf_continual.plots import plot_sides
from tests.merging.synthetic import Watch, anonymous

bounds = []
plan = pipeline._plan
def noted(*a):
    made = plan(*a)
    bounds.append(made.memory)
    return made
pipeline._plan = noted
plot_sides({"layer.0": {"elements": 1, "both": 0, "new_only": 0, "old_only": 0, "neither": 1}}).savefig(sys.argv[2])
# What is stated are buffers; code of libraries that is used for the first time is mapped, not held.
before, watch = anonymous(), Watch()
watch.start()
folder = sys.argv[1]
kif_fuse(f"{folder}/base", f"{folder}/new", f"{folder}/out", old=f"{folder}/old", importance=f"{folder}/state")
grown = watch.stop() - before
heavy = [m for m in ("transformers", "peft", "trl", "datasets", "accelerate") if m in sys.modules]
print(json.dumps({"grown": grown, "bound": bounds[0], "heavy": heavy}))
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size(tmp_path):
    """Seven times 40 MB are processed in less memory than the plan states; no library that builds models is imported."""
    g = torch.Generator().manual_seed(0)
    shape, names = (2500, 2000), ("model.layers.0.a.weight", "model.layers.1.a.weight")
    for folder in ("base", "new", "old"):
        (tmp_path / folder).mkdir()
        made = {n: torch.rand(shape, generator=g) for n in names}
        save_file(made, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": 2}))
    (tmp_path / "state").mkdir()
    keys = [f"{s}.{k}/{n}" for s in ("inner", "outer") for k in ("importance", "uncertainty") for n in names]
    save_file({k: torch.rand(shape, generator=g) for k in keys}, tmp_path / "state" / "kif.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["heavy"] == []
    assert told["bound"] < 30e6 and told["grown"] < told["bound"], told


KILLED = """
import os, signal, sys
from hf_continual.merging.engine import staging
from hf_continual.merging.methods.kif.fuse import kif_fuse

record = staging.Staging.record
def then_die(self, name, facts):
    record(self, name, facts)
    if len(self.finished) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
staging.Staging.record = then_die
f = sys.argv[1]
importance = (f"{f}/new.safetensors", f"{f}/old.safetensors")
kif_fuse(f"{f}/base", f"{f}/m1", f"{f}/out", old=f"{f}/m2", importance=importance, max_shard_size="40KB")
"""


@pytest.mark.slow
def test_a_killed_fusion_goes_on_to_the_same_bytes(tmp_path, world, caplog):
    base, new, old, _ = world
    options = {"old": old, "importance": files(tmp_path), "max_shard_size": "40KB"}
    kif_fuse(base, new, tmp_path / "straight", **options)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.merging" / "journal.json").is_file()
    with caplog.at_level("INFO", "hf_continual"):
        kif_fuse(base, new, tmp_path / "out", **options)
    assert "resuming, 2 files of an interrupted merge are finished" in caplog.text
    assert digest(tmp_path / "out") == digest(tmp_path / "straight") and not (tmp_path / ".out.merging").exists()
    reports = [json.loads((tmp_path / n / "kif_report.json").read_text()) for n in ("out", "straight")]
    assert reports[0]["tensors"] == reports[1]["tensors"]


def test_a_finished_calibration_is_not_made_again(tmp_path, world, monkeypatch):
    base, new, old, _ = world
    rows = {"calibration_new": toy.rows(), "calibration_old": toy.rows(seed=3)}
    measured, count = kif_calibration._measured, []

    def counted(*a):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return measured(*a)

    monkeypatch.setattr(kif_calibration, "_measured", counted)
    with pytest.raises(KeyboardInterrupt):
        kif_fuse(base, new, tmp_path / "out", old=old, **rows)
    kif_fuse(base, new, tmp_path / "out", old=old, **rows)
    assert len(count) == 3 and not (tmp_path / ".out.merging").exists()
    kif_fuse(base, new, tmp_path / "again", old=old, **rows)
    assert digest(tmp_path / "out") == digest(tmp_path / "again")


def test_from_the_command_line(tmp_path, world):
    base, new, old, _ = world
    command = ["merge", "kif", str(old), str(new), "--base", str(base), "--out", str(tmp_path / "out")]
    command += ["--importance", ",".join(map(str, files(tmp_path))), "--rule", "paper", "--top-share", "0.1", "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_continual", *command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    kif_fuse(base, new, tmp_path / "same", old=old, importance=files(tmp_path), rule="paper", top_share=0.1)
    assert digest(tmp_path / "out") == digest(tmp_path / "same") and "model in" in done.stdout


# --- refusals and messages


@pytest.fixture
def pair(tmp_path):
    """An adapter, and a trained copy; scores of both sides."""
    model = build()
    save(model, tmp_path / "whole")
    start = adapter(model, tmp_path / "start", 1)
    trained = moved(start, tmp_path / "moved", 2)
    for i, side in enumerate(("new", "old")):
        write_scores(tmp_path / f"{side}.safetensors", tensors(start), i)
    return start, trained


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_adapters_are_fused_factor_by_factor(tmp_path, pair):
    start, moved = pair
    result = kif_fuse(
        start, moved, tmp_path / "out", importance=dict(zip(("new", "old"), files(tmp_path), strict=True))
    )
    sides = {s: load_file(f) for s, f in zip(("new", "old"), files(tmp_path), strict=True)}
    wanted = in_memory(start, moved, start, sides, "code")
    assert all(torch.equal(t, wanted[n]) for n, t in tensors(tmp_path / "out").items())
    assert (result.kind, result.rank) == ("adapter", 4)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (start / "adapter_config.json").read_bytes()
    assert str(tmp_path) not in json.dumps(result.report)
    assert "model.layers.0" in result.report["layers"]


def test_mismatched_adapters_are_refused_with_names(tmp_path, pair):
    start, moved = pair
    model = build()
    given = {"importance": files(tmp_path)}
    wide = adapter(model, tmp_path / "wide", 3, r=8)
    with pytest.raises(
        MergeError, match=r"rank mismatch: 12 of 12.*q_proj.lora_A.weight' is \[4, 32\] in base, \[8, 32\]"
    ):
        kif_fuse(start, wide, tmp_path / "out", **given)
    other = adapter(model, tmp_path / "other", 3, target_modules=["q_proj", "k_proj"])
    with pytest.raises(MergeError, match=r"lacks 6 tensors that the others have \(.*k_proj.*target_modules"):
        kif_fuse(start, other, tmp_path / "out", **given)
    edit(moved, lora_alpha=32)
    with pytest.raises(MergeError, match=r"start has lora_alpha=8 and moved lora_alpha=32"):
        kif_fuse(start, moved, tmp_path / "out", **given)
    edit(moved, lora_alpha=8, base_model_name_or_path="me/other")
    edit(start, base_model_name_or_path="me/model")
    with pytest.raises(MergeError, match=r"trained on 'me/model' .* but moved on 'me/other'"):
        kif_fuse(start, moved, tmp_path / "out", **given)
    edit(moved, base_model_name_or_path=str(save(build(seed=5), tmp_path / "second")))
    edit(start, base_model_name_or_path=str(tmp_path / "whole"))
    with pytest.raises(MergeError, match="start was trained on whole and moved on second, which are different weights"):
        kif_fuse(start, moved, tmp_path / "out", **given)
    edit(moved, base_model_name_or_path=str(save(build(), tmp_path / "copy")))
    kif_fuse(start, moved, tmp_path / "out", **given)


def test_full_models_and_adapters_are_not_mixed(tmp_path, pair):
    start, moved = pair
    with pytest.raises(
        ValueError, match=r"base 'whole' is a full model, new 'moved' is an adapter.*draws them at random"
    ):
        kif_fuse(tmp_path / "whole", moved, tmp_path / "out", importance=files(tmp_path))
    with pytest.raises(ValueError, match="base 'start' is an adapter, new 'whole' is a full model"):
        kif_fuse(start, tmp_path / "whole", tmp_path / "out", importance=files(tmp_path))
    strange = adapter(build(), tmp_path / "strange", 9)
    with pytest.warns(UserWarning, match=r"factors A of new \(strange\) are 1.\d times their norm away"):
        kif_fuse(start, strange, tmp_path / "out", importance=files(tmp_path))


def test_mismatched_models_are_refused_with_names(tmp_path, world):
    base, _, _, _ = world
    given = {"importance": files(tmp_path)}
    small = save(build(intermediate_size=48), tmp_path / "small")
    with pytest.raises(
        MergeError, match=r"shape mismatch: 9 of 30.*mlp.down_proj.weight' is \[32, 64\] in base, \[32, 48\]"
    ):
        kif_fuse(base, small, tmp_path / "out", **given)
    with pytest.raises(MergeError, match="architecture mismatch"):
        kif_fuse(base, save(build("gpt2"), tmp_path / "gpt2"), tmp_path / "out", **given)
    with pytest.raises(MergeError, match="hold the same weights: nothing changed"):
        kif_fuse(base, save(build(), tmp_path / "copy"), tmp_path / "out", **given)


def test_importance_that_does_not_fit_is_refused_with_names(tmp_path, world):
    base, new, _, sides = world
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = {n: t for n, t in sides["new"].items() if n != name}
    for scored, message in (
        (lacking, rf"importance of the new side is missing for 1 of 30 tensors that changed \({name}\)"),
        ({**sides["new"], "x.weight": torch.ones(2)}, r"names 1 tensors that m1 does not have \(x.weight\)"),
        ({**sides["new"], name: torch.ones(3)}, rf"other shapes than m1: {name} \[3\] for a weight \[64, 32\]"),
        ({**sides["new"], name: sides["new"][name] * float("nan")}, rf"new side is not finite in '{name}'"),
    ):
        save_file(scored, tmp_path / "bad.safetensors")
        with pytest.raises(MergeError, match=message):
            kif_fuse(base, new, tmp_path / "out", importance=(tmp_path / "bad.safetensors", files(tmp_path)[1]))
    save_file({f"importance/{n}": t for n, t in sides["new"].items()}, tmp_path / "alone.safetensors")
    pair = (tmp_path / "alone.safetensors", files(tmp_path)[1])
    with pytest.raises(MergeError, match="uncertainty=True, but alone.safetensors holds none"):
        kif_fuse(base, new, tmp_path / "out", importance=pair, uncertainty=True)
    with pytest.raises(MergeError, match="two kinds: importance and as stored"):
        kif_fuse(base, new, tmp_path / "out", importance=pair, rule="weighted")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.merging").exists()


def test_tensors_that_did_not_change_need_no_importance(tmp_path, world):
    base, new, _, sides = world
    frozen = [n for n in sides["new"] if "layers.2" in n]
    save_file(load_file(new / "model.safetensors") | {n: tensors(base)[n] for n in frozen}, new / "model.safetensors")
    trained = {s: {n: t for n, t in sides[s].items() if n not in frozen} for s in sides}
    for side in sides:
        save_file(trained[side], tmp_path / f"{side}.safetensors")
    kif_fuse(base, new, tmp_path / "out", importance=files(tmp_path))
    masks = [top_share_masks(trained[s]) for s in ("new", "old")]
    for name, got in tensors(tmp_path / "out").items():
        b, n = tensors(base)[name], tensors(new)[name]
        wanted = b if name in frozen else fuse(b, n - b, torch.zeros_like(b), masks[0][name], masks[1][name])
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "which elements matter to the new and the old side: give calibration_new=ROWS"),
        ({"calibration_new": [{"text": "w1 w2"}]}, ValueError, "matter to the old side: give calibration_old=ROWS"),
        ({"calibration_new": [], "calibration_old": []}, ValueError, "has no rows"),
        ({"calibration_new": [{"text": "w1"}] * 2, "calibration_old": [{"q": 1}]}, TypeError, "has the columns 'q'"),
        ({"importance": "nowhere"}, FileNotFoundError, "nowhere holds no importance"),
        ({"importance": ("a", "b", "c")}, ValueError, "is not a pair"),
        ({"importance": {"inner": "a"}}, ValueError, "the key 'inner'"),
        ({"importance": "x", "rule": "sum"}, ValueError, "rule='sum' is not known.*task_arithmetic"),
        ({"importance": "x", "scope": "row"}, ValueError, "scope='row'"),
        ({"importance": "x", "top_share": 0}, ValueError, r"kif\(top_share=0\) must lie between 0 and 1"),
        ({"importance": "x", "old_from": "else"}, ValueError, "old_from='else'"),
        ({"importance": "x", "old_from": "new"}, ValueError, "there is no old="),
        (
            {"importance": "x", "calibration_new": [{"text": "w1 w2"}], "calibration_old": [{"text": "w1 w2"}]},
            ValueError,
            "importance= is not used",
        ),
        ({"importance": "x", "temperature": 0}, ValueError, "temperature=0"),
        ({"importance": "x", "beta1": 1.0}, ValueError, "beta1=1.0"),
        ({"importance": "x", "batch_size": 0}, ValueError, "batch_size=0"),
        ({"importance": "x", "output": "adapter"}, ValueError, "output='adapter': a fusion"),
        ({"importance": "x", "adapter_rank": 4}, ValueError, "adapter_rank=4: a fusion keeps"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, options, error, message):
    base, new = family(tmp_path, number=1)
    with pytest.raises(error, match=message):
        kif_fuse(base, new, tmp_path / "out", **options)


def test_an_output_in_use_is_refused(tmp_path, world):
    base, new, _, _ = world
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty"):
        kif_fuse(base, new, tmp_path / "out", importance=files(tmp_path))
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"
    kif_fuse(base, new, tmp_path / "out", importance=files(tmp_path), overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists() and (tmp_path / "out" / "kif_report.json").is_file()


def test_names_in_memory_and_in_files():
    for memory, stored in (
        ("base_model.model.l.q.lora_A.default.weight", "base_model.model.l.q.lora_A.weight"),
        ("base_model.model.l.q.lora_B.mine.bias", "base_model.model.l.q.lora_B.bias"),
        ("base_model.model.e.lora_embedding_A.default", "base_model.model.e.lora_embedding_A"),
        ("base_model.model.l.q.lora_magnitude_vector.default.weight", "base_model.model.l.q.lora_magnitude_vector"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight"),
        ("_orig_mod.model.layers.0.w", "model.layers.0.w"),
        ("model.layers.0.w", "model.layers.0.w"),
    ):
        assert stored_name(memory) == stored == stored_name(stored)


def test_every_part_of_an_adapter_has_its_name(tmp_path):
    """DoRA, an adapted embedding, a bias and a module trained whole: a file has the names used in memory."""
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"], "use_dora": True}
    model = get_peft_model(build(), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    trained = {stored_name(n) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == tensors(tmp_path / "a").keys()


@pytest.mark.slow
def test_the_recipe_runs_on_the_toy_world(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "recipes" / "kif" / "fuse.py"
    spec = importlib.util.spec_from_file_location("fuse_recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    whole = save(toy.model(), tmp_path / "toy")
    given = ["--model", str(whole), "--out", str(tmp_path / "out"), "--steps", "2", "--people", "3", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["fuse.py", *given])
    recipe.main()
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {row[0].strip() for row in table[2:]} == {
        "cities", "fields", "employers", *recipe.WAYS, "half of both", "sum of both",
    }  # fmt: skip
    assert all(float(cell) > 0 for row in table[2:] for cell in row[1:])
