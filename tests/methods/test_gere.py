"""GeRe against numbers recorded from the authors' code, and in the trainer: states, cache, reference, log."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from trl import SFTConfig

from hf_continual import ContinualTrainer, FreezeLayers, GeRe
from hf_continual.data.self_generated import degenerate, own_words
from hf_continual.methods.gere import activation_states, hidden_statistics, imitation, mixed_ce, tm_loss
from hf_continual.methods.gere.states import open_recorded, record
from hf_continual.methods.gere.ternary import pack_states, unpack_states
from hf_continual.tensors.imitation import logit_divergence
from hf_continual.tensors.reference import as_reference, last_hidden, weights_fingerprint
from hf_continual.trainer import hand_over
from tests import toy

GOLDEN = Path(__file__).parents[1] / "golden" / "gere"
CASES = load_file(GOLDEN / "tm_cases.safetensors")
FACTS = json.loads((GOLDEN / "golden.json").read_text())
CACHE = "build/test-gere"


def example(world=None):
    return GeRe(toy.rows(seed=9, low=30, high=59), ratio=0.3, cache_dir=CACHE)


def zero(world=None):
    return GeRe(
        toy.rows(seed=9, low=30, high=59), ratio=0.3, weight=0.0, ce_mix="tokens", ce_weight=0.0, cache_dir=CACHE
    )


ZERO_TOLERANCE = 1e-6  # the task's rows are computed in a batch with others


def build(folder, *methods, model=None, kind="text", peft=None, **settings):
    """A trainer whose methods have made their preliminary passes, as in `train`."""
    trainer = ContinualTrainer(
        toy.model() if model is None else model,
        SFTConfig(**toy.settings(folder, **settings)),
        train_dataset=toy.rows(kind),
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=methods,
    )
    hand_over.before_training(trainer)
    return trainer


def gere(folder, **changes):
    options = {"per_batch": 2, "cache_dir": str(folder / "cache"), **changes}
    return GeRe(options.pop("rows", toy.rows(seed=9, low=30, high=59)), **options)


def golden(case):
    return {k.split(".", 1)[1]: v for k, v in CASES.items() if k.startswith(f"{case}.")}


@pytest.mark.parametrize("case", FACTS["tm"])
def test_the_authors_numbers(case):
    t, facts = golden(case), FACTS["tm"][case]
    mask, low, high = t["attention_mask"].bool(), t["neg_thr"], t["pos_thr"]
    states = activation_states(t["ref_hidden"], low, high)
    assert torch.equal(states[mask], t["state"].to(torch.int8)[mask])
    hidden = t["pred_hidden"].clone().requires_grad_()
    loss = tm_loss(hidden, states, low, high, mask)
    assert float(loss.detach()) == pytest.approx(facts["margin_loss"], rel=1e-6, abs=1e-9)
    loss.backward()
    assert torch.allclose(
        hidden.grad.float(), t["grad_pred"].float(), atol=1e-6 if hidden.dtype == torch.float32 else 1e-3
    )
    entries = tm_loss(t["pred_hidden"], states, low, high, mask, reduction="entries")
    assert float(entries) == pytest.approx(facts["mean_over_all_real_entries_would_be"], rel=1e-5, abs=1e-12)
    per_token = tm_loss(t["pred_hidden"], states, low, high, mask, reduction="tokens")
    assert float(per_token) == pytest.approx(float(entries) * hidden.shape[-1], rel=1e-5, abs=1e-12)
    logits, labels = t["logits"][:, :-1], t["labels"][:, 1:]
    loss_BS = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    ce = mixed_ce(loss_BS, labels != -100, torch.zeros_like(labels, dtype=torch.bool))
    assert float(ce) == pytest.approx(facts["gere_ce_loss"], rel=1e-5)


def test_the_authors_statistics():
    stats = load_file(GOLDEN / "stats.safetensors")
    mean, std = hidden_statistics([stats[f"hidden.{i}"] for i in range(4)])
    assert torch.allclose(mean, stats["mean"], atol=1e-6) and torch.allclose(std, stats["std"], atol=1e-6)
    torch.manual_seed(0)
    far = 300 + 1e-3 * torch.randn(20, 50, 1)
    _, std = hidden_statistics(far)
    assert float(std) == pytest.approx(float(far.double().std(correction=0)), rel=1e-6), (
        "the official formula gives 0.125"
    )
    with pytest.raises(ValueError, match="no token"):
        hidden_statistics([torch.zeros(0, 3)])


@pytest.mark.parametrize(
    "case", FACTS["composition"], ids=lambda c: f"{c['w_strategy']}-{c['gere_ce']}-{c['gere_margin']}-{c['ori_ce']}"
)
def test_the_authors_composition(case):
    """Total and derivatives of the loss of a micro-batch, by weight strategy and batch content."""
    parts = {
        k: None if case[k] is None else torch.tensor(case[k], requires_grad=True)
        for k in ("gere_ce", "gere_margin", "ori_ce")
    }
    losses = torch.stack([torch.zeros(()) if parts[k] is None else parts[k] for k in ("gere_ce", "ori_ce")])[None]
    there = [parts["gere_ce"] is not None, parts["ori_ce"] is not None]
    total = mixed_ce(losses, torch.tensor([[there[0], False]]), torch.tensor([[False, there[1]]]))
    margin = parts["gere_margin"]
    if margin is not None:
        dynamic = (total.detach() / (margin.detach() + 1e-8)).clamp(max=1e4)
        total = total + (dynamic if case["w_strategy"] == "dy" else float(case["w_strategy"])) * margin
    clamped = case["w_strategy"] == "dy" and margin is not None and float(margin.detach()) < 1e-4
    if not clamped:  # the official dynamic weight has no limit; ours stops at 1e4
        assert float(total.detach()) == pytest.approx(case["total"], rel=1e-6)
    total.backward()
    for key, wanted in case["d_total_d"].items():
        if wanted is not None and not (clamped and key == "gere_margin"):
            assert float(parts[key].grad) == pytest.approx(wanted, rel=1e-5)


def test_the_backward_is_autograds():
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 9, dtype=torch.float32, requires_grad=True)
    low, high = -torch.rand(9), torch.rand(9)
    states = activation_states(torch.randn(3, 5, 9), low, high)
    mask = torch.rand(3, 5) < 0.7
    for reduction in ("violations", "entries", "tokens"):
        (ours,) = torch.autograd.grad(tm_loss(hidden, states, low, high, mask, reduction), hidden)
        upper = torch.where(states < 0, low, torch.where(states > 0, torch.inf, high))
        lower = torch.where(states > 0, high, torch.where(states < 0, -torch.inf, low))
        distance = (torch.relu(hidden - upper) + torch.relu(lower - hidden)) * mask[..., None]
        count = {"violations": (distance != 0).sum(), "entries": mask.sum() * 9, "tokens": mask.sum()}[reduction]
        (wanted,) = torch.autograd.grad(distance.sum() / count, hidden)
        assert torch.allclose(ours, wanted, atol=1e-7)
    assert tm_loss(hidden, states, low, high, mask, dead_band=100.0) == 0
    with pytest.raises(ValueError, match="must be 'violations', 'entries' or 'tokens'"):
        tm_loss(hidden, states, low, high, mask, "mean")


@pytest.mark.parametrize("channels", [1, 4, 6, 31])
def test_two_bits_per_unit(channels):
    states = torch.randint(-1, 2, (7, channels), dtype=torch.int8)
    packed = pack_states(states)
    assert packed.shape == (7, -(-channels // 4)) and torch.equal(unpack_states(packed, channels), states)


LAYOUTS = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 32},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_at_step_0_nothing_is_violated(tmp_path, layout, checkpointing):
    method = gere(tmp_path, ce_mix="tokens", dead_band=1e-5)
    trainer = build(tmp_path, method, max_steps=3, gradient_checkpointing=checkpointing, **LAYOUTS[layout])
    trainer.train()
    first, *_, last = [e for e in toy.logs(trainer) if "gere/tm" in e]
    assert first["gere/tm"] == first["gere/violations"] == 0 < last["gere/tm"]
    assert 0 < last["gere/violations"] < 1 and last["gere/weight"] == 100
    assert {"gere/loss", "task/loss", "gere/share"} <= set(first)


def test_it_is_exactly_0_in_the_shape_of_the_offline_pass(tmp_path):
    model, rows = toy.model(), [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]]
    made = record(tmp_path / "x.safetensors", {}, rows, lambda ids: last_hidden(model, ids), 1.0)
    for i, ids in enumerate(rows):
        hidden = last_hidden(model, ids)[None]
        states = unpack_states(made.row(i, len(ids)), 32)[None]
        assert tm_loss(hidden, states, made.low_D, made.high_D, torch.ones(1, len(ids))) == 0


@pytest.mark.parametrize("weight", [100.0, "dynamic"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_forward_equals_the_authors_two(tmp_path, weight, accumulation):
    """The loss of a micro-batch with task and general rows, against separate forward passes as in the authors' code."""
    method = gere(tmp_path, weight=weight)
    trainer = build(
        tmp_path,
        method,
        kind="prompt_completion",
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
    )
    with torch.no_grad():  # away from the reference, so that something is violated
        for parameter in trainer.model.parameters():
            parameter.mul_(1.0 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    seen = []
    compute = trainer.compute_loss

    def both(model, inputs, *args, **kwargs):
        origin, batch = inputs["replay_origin"], {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
        loss = compute(model, inputs, *args, **kwargs)
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
        seen.append((float(loss.detach()) * accumulation, grads, batch, origin))
        return loss

    trainer.compute_loss = both
    trainer.train()
    model, recorded = trainer.model.eval(), method._recorded
    for value, grads, batch, origin in seen:
        means = {}
        for source in (-1, 0):
            row = (origin["source"] == source).any(1)
            out = model(
                input_ids=batch["input_ids"][row],
                attention_mask=batch["attention_mask"][row],
                output_hidden_states=True,
            )
            labels = batch["labels"][row]
            loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            means[source] = (loss, out.hidden_states[-1], batch["attention_mask"][row])
        packed = [unpack_states(recorded.row(r, n), 32) for _, r, n in origin["drawn"]]
        states = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True)
        hidden, mask = (t[:, : states.shape[1]] for t in means[0][1:])
        margin = tm_loss(hidden, states, recorded.low_D, recorded.high_D, mask)
        ce = (means[-1][0] + means[0][0]) / 2
        wanted = ce + (ce.detach() / (margin.detach() + 1e-8) if weight == "dynamic" else weight) * margin
        assert float(margin.detach()) > 0 and value == pytest.approx(float(wanted.detach()), rel=1e-5)
        theirs = torch.autograd.grad(wanted / accumulation, [p for p in model.parameters() if p.requires_grad])
        for a, b in zip(grads, theirs, strict=True):
            assert torch.allclose(a, b, atol=2e-5 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("constraint", ["none", "l1", "l2", "kl", "tm"])
def test_every_constraint_trains_and_holds(tmp_path, constraint):
    runs = {}
    strong = 3000.0 if constraint == "kl" else 30.0
    for weight in (0.0, strong):
        method = gere(tmp_path, constraint=constraint, weight=weight, ce_mix="tokens", reduction="entries")
        trainer = build(tmp_path, method, max_steps=12, learning_rate=1e-2)
        before = weights_fingerprint(trainer.model, "base")
        trainer.train()
        general = toy.rows(seed=9, low=30, high=59)["text"][:8]
        ids = [toy.tokenizer()(t)["input_ids"] for t in general]
        start = toy.model()
        far = [float((last_hidden(trainer.model, i) - last_hidden(start, i)).detach().abs().mean()) for i in ids]
        runs[weight] = sum(far)
        assert before != weights_fingerprint(trainer.model, "base")
    if constraint == "none":
        assert runs[0.0] == runs[strong]
    else:
        assert runs[strong] < 0.97 * runs[0.0]


def test_imitation_by_hand():
    z, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert imitation(z, h, "l1") == 1.5 and imitation(z, h, "l2") == 2.5
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11, bias=False)
    z, h = torch.randn(600, 8), torch.randn(600, 8)
    p, q = ((x @ head.weight.T / 2).log_softmax(-1) for x in (h, z))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    got = logit_divergence(z, h, head, head.weight.detach()).detach()
    assert float(got) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_adapters_are_off_for_the_base(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(toy.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert (
        weights_fingerprint(model, "base")
        == weights_fingerprint(toy.model(), "base")
        != weights_fingerprint(model, "task_start")
    )
    ids = [5, 6, 7, 8]
    with as_reference(model, "base"):
        base = last_hidden(model, ids)
    assert torch.equal(base, last_hidden(toy.model(), ids)) and model.training
    with as_reference(model, "task_start"):
        assert not torch.equal(last_hidden(model, ids), base)
    for reference, files in (("base", 1), ("base", 1), ("task_start", 2)):
        trainer = build(tmp_path, gere(tmp_path, reference=reference), model=model, max_steps=1)
        trainer.train()
        assert len(list((tmp_path / "cache").glob("*.safetensors"))) == files


def test_the_base_is_found_again_by_a_later_task(tmp_path):
    from hf_continual import ContinualConfig

    def task(index, model, **changes):
        return ContinualTrainer(
            model,
            ContinualConfig(**toy.settings(tmp_path, max_steps=2, learning_rate=1e-2), task_index=index),
            train_dataset=toy.rows(),
            processing_class=toy.tokenizer(),
            methods=[gere(tmp_path, **changes)],
        )

    with pytest.raises(ValueError, match="starts from fine-tuned weights, and no GeRe of an earlier task recorded"):
        task(1, toy.model()).train()
    first = task(0, toy.model())
    first.train()
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    before = file.read_bytes()
    second = task(1, first.model)
    second.train()
    assert file.read_bytes() == before and len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert next(e["gere/violations"] for e in toy.logs(second) if "gere/violations" in e) > 0, "measured from the base"
    own = task(1, first.model, reference="task_start")
    own.train()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2 and own.methods


def test_the_cache_is_keyed_checked_and_made_again(tmp_path, caplog):
    def made(**changes):
        build(tmp_path, gere(tmp_path, **changes), max_steps=1)
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.safetensors")}

    one = made()
    assert made() == one, "used again"
    for change in (
        {"max_length": 5},
        {"threshold": 2.0},
        {"num_samples": 7},
        {"constraint": "l2"},
        {"rows": toy.rows(seed=3)},
    ):
        assert len(made(**change)) == len(one) + 1, change
        one = made()
    build(tmp_path, gere(tmp_path), model=toy.model(seed=1), max_steps=1)
    assert len(made()) == len(one) + 1, "other weights"
    (tmp_path / "again").mkdir()
    file = next(iter(made(cache_dir=str(tmp_path / "again"))), None)
    (file,) = (tmp_path / "again").glob("*.safetensors")
    whole = file.read_bytes()
    for damage in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"\xff" * 50):
        file.write_bytes(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build(tmp_path, gere(tmp_path, cache_dir=str(tmp_path / "again")), max_steps=1)
        assert "is not used" in caplog.text and "made again" in caplog.text
        assert file.read_bytes() == whole
    assert not list((tmp_path / "again").glob("*.part"))


def test_storage_and_reading(tmp_path):
    channels, rows = 64, [list(range(5, 45))] * 50
    made = record(tmp_path / "x.safetensors", {"a": 1}, rows, lambda ids: torch.randn(len(ids), channels), 1.0)
    official = sum(len(r) for r in rows) * channels * 4
    assert official / made.file.stat().st_size > 15
    with safe_open(made.file, "pt") as opened:
        assert opened.get_slice("states").get_shape() == [2000, 16]
    assert torch.equal(made.row(3, 40), made.tensor("states")[120:160])
    assert open_recorded(made.file, {"a": 1}).offsets == made.offsets and open_recorded(made.file, {"a": 2}) is None
    with pytest.raises(ValueError, match="holds 40 tokens of general row 0 and the run has 41"):
        made.row(0, 41)


def _record_slowly(file):
    torch.set_num_threads(1)

    def hidden(ids):
        return torch.arange(len(ids) * 8, dtype=torch.float32).view(len(ids), 8).sin()

    record(Path(file), {"a": 1}, [[1, 2, 3]] * 200, hidden, 1.0)


def test_two_processes_make_one_valid_file(tmp_path):
    file = tmp_path / "x.safetensors"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_record_slowly, args=(str(file),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0] and open_recorded(file, {"a": 1}) is not None
    assert not list(tmp_path.glob("*.part"))


def test_killed_in_the_offline_pass(tmp_path, monkeypatch):
    import hf_continual.methods.gere.method as module

    original, calls = module.last_hidden, []

    def killed(model, ids):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(model, ids)

    monkeypatch.setattr(module, "last_hidden", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, gere(tmp_path), max_steps=3)
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    monkeypatch.undo()
    resumed = build(tmp_path, gere(tmp_path), max_steps=3)
    resumed.train()
    straight = build(tmp_path, gere(tmp_path / "straight"), max_steps=3)
    straight.train()
    assert torch.equal(toy.flat(resumed.model), toy.flat(straight.model))


def test_resuming_never_records_fine_tuned_weights(tmp_path):
    """The states are those of the weights that the run started with, even if the cache is gone on resume."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
    straight = build(tmp_path / "a", gere(tmp_path / "a"), **settings)
    straight.train()
    (file,) = (tmp_path / "a" / "cache").glob("*.safetensors")
    whole = file.read_bytes()
    file.unlink()
    resumed = build(tmp_path / "a", gere(tmp_path / "a"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert file.read_bytes() == whole and torch.equal(toy.flat(straight.model), toy.flat(resumed.model))


def test_texts_of_its_own(tmp_path):
    torch.manual_seed(5)
    model, tokenizer = toy.model(), toy.tokenizer()
    state = torch.random.get_rng_state()
    texts = own_words(model, tokenizer, 6, 24, seed=1)
    assert texts == own_words(model, tokenizer, 6, 24, seed=1) != own_words(model, tokenizer, 6, 24, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state) and len(texts) == 6
    trainer = build(tmp_path, gere(tmp_path, rows="self", num_samples=6, max_length=24), max_steps=2)
    (file,) = (tmp_path / "cache").glob("own-words-*.jsonl")
    written = file.read_text()
    trainer.train()
    build(tmp_path, gere(tmp_path, rows="self", num_samples=6, max_length=24), max_steps=2)
    assert file.read_text() == written
    assert (
        degenerate([1] * 40)
        and degenerate(list(range(5)))
        and degenerate([1, 2, 3] * 20)
        and not degenerate(list(range(40)))
    )

    class Mute(torch.nn.Module):
        def get_input_embeddings(self):
            return model.get_input_embeddings()

        def generate(self, input_ids, **kwargs):
            return input_ids

    with pytest.raises(ValueError, match='rows="self": of .* texts that the model wrote, only 0 were longer'):
        own_words(Mute(), tokenizer, 3, 24, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraint": "l3"}, "constraint='l3'.* must be one of tm, none, l1, l2, kl"),
        ({"reduction": "sum"}, "reduction='sum'"),
        ({"ce_mix": "half"}, "ce_mix='half'"),
        ({"reference": "last"}, "reference='last'"),
        ({"per_batch": None}, "needs either per_batch .* or ratio"),
        ({"ratio": 0.5}, "needs either per_batch .* or ratio"),
        ({"per_batch": 0}, "per_batch=0"),
        ({"per_batch": None, "ratio": 1.5}, "strictly between 0 and 1"),
        ({"weight": -1.0}, "weight=-1.0.* at least 0"),
        ({"ce_weight": 0.5}, 'belongs to ce_mix="tokens"'),
        ({"max_length": 1}, "max_length=1"),
        ({"rows": []}, "has no rows"),
        ({"rows": [{"body": "x"}]}, "needs rows with a column 'text'; these have"),
    ],
)
def test_bad_hyper_parameters(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        gere(tmp_path, **options)


def test_rows_that_are_too_short(tmp_path):
    with pytest.raises(ValueError, match="none of the general rows has two tokens"):
        build(tmp_path, gere(tmp_path, rows=[{"text": "w1"}, {"text": ""}]))
    mixed = gere(tmp_path, rows=Dataset.from_list([{"text": "w1"}, {"text": "w1 w2 w3"}]))
    assert build(tmp_path, mixed).mixer.draws[0].lengths == [3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_4_bit_base(tmp_path):
    """The states are those of the quantised base, whatever the adapter has learned."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    toy.model(hidden_size=128, intermediate_size=128, num_key_value_heads=4).save_pretrained(tmp_path / "wide")

    def base():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=config)

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    first = build(tmp_path, gere(tmp_path), model=base(), peft=lora, max_steps=3, learning_rate=1e-2)
    first.train()
    entries = [e for e in toy.logs(first) if "gere/tm" in e]
    assert entries[0]["gere/violations"] < 0.02 < entries[-1]["gere/violations"]
    first.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    build(tmp_path, gere(tmp_path), model=again, max_steps=1)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1, "the same reference, with another adapter on"


def test_frozen_bottom_and_gere(tmp_path):
    trainer = build(tmp_path, gere(tmp_path), FreezeLayers(bottom=2), max_steps=3, kind="prompt_completion")
    trainer.train()
    assert any(e.get("gere/tm", 0) > 0 for e in toy.logs(trainer))
