"""SAPT-LoRA: the published attention and reflection, frozen pairs, one mixture per row, and what is handed over."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualConfig, ContinualTrainer, SAPTLoRA, load_sapt_lora
from hf_continual.data.replay import shuffled
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.inference.kinds import asked, tuner_of
from hf_continual.methods.sapt_lora import attention, pooled, query, reflection_loss
from hf_continual.tensors.rank_gates import mixed_delta
from tests import toy

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "baselines" / "sapt_attention.safetensors")

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True
PLAIN_ADAPTER = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def example(world):
    return SAPTLoRA(r=2, lora_alpha=4, hidden=6, weight=0.5, kept=4)


def zero(world):
    return SAPTLoRA(r=2, lora_alpha=4, hidden=6, weight=0.0)


def train(start, folder, method=None, *, seed=1, kind="prompt_completion", **settings):
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **{"learning_rate": 1e-2, **settings})),
        train_dataset=toy.rows(kind, seed=seed), processing_class=toy.tokenizer(), methods=[method or example(None)],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture
def base(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def three(tmp_path, base):
    """Three tasks, each from the folder before; their trainers."""
    found, folder = [], base
    for i, name in enumerate(("law", "tax", "fun")):
        found.append(train(folder, tmp_path / name, seed=i, task_name=name, max_steps=8))
        folder = str(tmp_path / name)
    return found


IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def golden_weights():
    g = GOLDEN
    query_BD = query(pooled(g["emb"][g["ids"]]), g["trans0"], g["trans1"], g["ln_w"], g["ln_b"])
    return attention(query_BD, torch.cat([g["key_new"], g["keys_prev"]]))


def test_the_published_attention_and_reflection():
    weights = golden_weights()
    torch.testing.assert_close(weights, GOLDEN["attention_weights"][..., 0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        reflection_loss(weights, GOLDEN["replay_label"]), GOLDEN["kl_loss"][0], rtol=1e-6, atol=1e-7
    )


def test_reflection_is_0_where_nothing_moved_and_finite_where_a_weight_vanished():
    label = torch.tensor([0.3, 0.7, 0.0])
    assert float(reflection_loss(label.expand(4, 3), label)) == pytest.approx(0, abs=1e-7)
    assert torch.isfinite(reflection_loss(torch.tensor([[0.0, 0.0, 1.0]]), label))
    draw = torch.Generator().manual_seed(0)
    assert all(reflection_loss(torch.rand(4, 3, generator=draw).softmax(-1), label) > 0 for _ in range(5))


def test_padding_and_the_answer_are_not_pooled():
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    torch.testing.assert_close(pooled(x, mask), torch.stack([x[0, 2:].amax(0), x[1, :3].amax(0)]))


def test_a_layer_is_the_weighted_sum_of_its_pairs(three):
    model = three[-1].model.eval()
    tuner = tuner_of(model)
    assert tuner.tasks == ["law", "tax", "fun"]
    pairs = next(iter(tuner.pairs.values()))
    layer = pairs.layer
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    tuner._weights_BT = weights = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.1, 0.9]])
    A = torch.cat([pairs.A, layer.lora_A["default"].weight])
    B = torch.cat([pairs.B, layer.lora_B["default"].weight], dim=1)
    expected = layer.base_layer(x) + mixed_delta(x, A, B, weights[:, None], [2, 2, 2], layer.scaling["default"])
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_pairs_and_keys_of_earlier_tasks_stay(three, tmp_path):
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("law", "tax", "fun")]
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    stack = states[2][f"{layer}.lora_earlier.A"]
    assert stack.shape[0] == 4 and len(states[0]) < len(states[1])
    assert torch.equal(stack[:2], states[0][f"{layer}.lora_A.weight"])
    assert torch.equal(stack[2:], states[1][f"{layer}.lora_A.weight"])
    own = [{n.partition(".default.")[2]: t for n, t in state.items() if "lora_attention" in n} for state in states]
    for i in range(2):
        assert torch.equal(own[i][f"keys.{i}"], own[2][f"keys.{i}"])
    assert not torch.equal(own[1]["down.weight"], own[2]["down.weight"])


def test_labels_are_the_attention_when_the_task_was_learned(three, tmp_path):
    state = load_file(tmp_path / "fun" / "continual" / "sapt_lora.safetensors")
    assert [state[f"label/{i}"].shape[0] for i in range(3)] == [1, 2, 3]
    assert all(state[f"inputs/{i}"].shape == (4, 32) for i in range(3))
    assert all(float(state[f"label/{i}"].sum()) == pytest.approx(1) for i in range(3))
    rows = toy.rows("prompt_completion", seed=2)  # of "fun"
    ids = [toy.tokenizer()(row["prompt"])["input_ids"] for row in rows]
    embedding = three[-1].model.get_input_embeddings()
    found = torch.cat([three[-1].model.base_model.shared(pooled(embedding(torch.tensor([i])))) for i in ids]).mean(0)
    torch.testing.assert_close(found.detach(), state["label/2"], rtol=1e-4, atol=1e-5)


def test_reflection_holds_the_attention_of_earlier_rows(tmp_path, base):
    train(base, tmp_path / "0", SAPTLoRA(r=2, hidden=6), task_name="law")
    train(str(tmp_path / "0"), tmp_path / "1", SAPTLoRA(r=2, hidden=6), task_name="tax", max_steps=10)

    def moved(weight):
        method = SAPTLoRA(r=2, hidden=6, weight=weight)
        trained = train(str(tmp_path / "1"), tmp_path / "2", method, seed=5, task_name="fun", max_steps=20)
        tuner = tuner_of(trained.model)
        state = load_file(tmp_path / "1" / "continual" / "sapt_lora.safetensors")
        label = torch.cat([state["label/1"], torch.zeros(1)])
        return float(reflection_loss(tuner.shared(state["inputs/1"]), label).detach()), toy.logs(trained)

    free, logs = moved(1e-9)
    held, held_logs = moved(20.0)
    assert held < 0.7 * free
    assert (
        "sapt_lora/reflection" in logs[0]
        and held_logs[-2]["sapt_lora/reflection"] < held_logs[0]["sapt_lora/reflection"]
    )


def test_rows_in_place_of_pooled_embeddings(three, tmp_path):
    """The pooled embeddings of rows and the rows themselves give the same run."""
    rows = toy.rows("prompt_completion", seed=2)
    kept = [{**rows[shuffled(0, len(rows), i)], "memory_task": "fun"} for i in range(4)]
    runs = []
    for i, method in enumerate((SAPTLoRA(r=2, lora_alpha=4, hidden=6, weight=0.5, memory=kept), example(None))):
        trained = train(str(tmp_path / "fun"), tmp_path / f"more-{i}", method, seed=7, task_name="more", max_steps=1)
        tuner = tuner_of(trained.model)
        runs.append(trained)
        assert not tuner.reflection  # released
    one, other = (toy.logs(run)[0]["sapt_lora/reflection"] for run in runs)
    assert one == pytest.approx(other, rel=1e-5) and one > 0
    with pytest.raises(ValueError, match="rows are of the task 'sea', and learned before 'more' were law, tax, fun"):
        strange = [{**kept[0], "memory_task": "sea"}]
        train(
            str(tmp_path / "fun"), tmp_path / "x", SAPTLoRA(r=2, lora_alpha=4, hidden=6, memory=strange),
            task_name="more",
        )  # fmt: skip
    with pytest.raises(ValueError, match="do not say which task they are from"):
        SAPTLoRA(memory=[{"prompt": "w1", "completion": "w2"}])


def test_one_task_is_plain_lora(tmp_path):
    plain = SFTTrainer(
        toy.model(), SFTConfig(**toy.settings(tmp_path)), train_dataset=toy.rows(), processing_class=toy.tokenizer(),
        peft_config=copy.deepcopy(PLAIN_ADAPTER),
    )  # fmt: skip
    plain.train()
    ours = train(toy.model(), tmp_path, kind="text", learning_rate=1e-3).model
    own = dict(plain.model.named_parameters())
    factors = [(n, p) for n, p in ours.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    assert len(factors) == 56 and all(torch.equal(p, own[n]) for n, p in factors)


def test_loaded_again_it_answers_and_generates_the_same(three, tmp_path):
    loaded = load_sapt_lora(tmp_path / "fun")
    trained = three[-1].model.eval()
    assert torch.equal(loaded(IDS).logits, trained(IDS).logits)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 11, 12, 13]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = loaded.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)[:, 4:]
    for row, found in zip(ids, together, strict=True):
        alone = loaded.generate(input_ids=row[row > 0][None], attention_mask=row[row > 0][None].clamp(max=1), **options)
        assert torch.equal(alone[0, -6:], found)
    beams = loaded.generate(input_ids=ids, attention_mask=(ids > 0).long(), **{**options, "num_beams": 3})
    assert beams.shape == (3, 10)
    with pytest.raises(ValueError, match="cannot be merged"):
        loaded.merge_and_unload()
    assert json.loads((tmp_path / "fun" / "adapter_config.json").read_text())["peft_type"] == "SAPT_LORA"


def test_the_mixture_of_the_question_is_kept_for_the_answer(three):
    """Token by token from a cache, all at once with the question named, and in training: the same."""
    model = three[-1].model.eval()
    tuner = tuner_of(model)
    question, answer = IDS[:, :3], IDS[:, 3:]
    first = model(input_ids=question, use_cache=True)
    mixed = tuner._weights_BT
    second = model(input_ids=answer, past_key_values=first.past_key_values, use_cache=True)
    stepwise = torch.cat([first.logits, second.logits], dim=1)
    with asked(model, (torch.arange(5) < 3).expand(2, -1)):
        forced = model(input_ids=IDS).logits
    torch.testing.assert_close(stepwise, forced, rtol=1e-4, atol=1e-5)
    labels = torch.where(torch.arange(5) < 3, -100, IDS)
    torch.testing.assert_close(model(input_ids=IDS, labels=labels).logits, forced)
    assert torch.equal(tuner._weights_BT, mixed)
    assert (model(input_ids=IDS).logits - forced).abs().max() > 1e-6  # without a question named, all of it is
    with pytest.raises(ValueError, match="weighed 2 rows in the first pass over their questions, and 1 are continued"):
        cache = model(input_ids=question, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        model(input_ids=answer[:1], past_key_values=cache)


def test_scores_are_those_of_generation(three):
    model = three[-1].model.eval()
    rows = toy.rows("prompt_completion", seed=2, number=12)
    forced = teacher_forced(model, toy.tokenizer(), rows, batch_size=5)
    said = generated(model, toy.tokenizer(), rows, batch_size=5)
    alone = generated(model, toy.tokenizer(), rows, batch_size=1)
    assert [r.score for r in forced.rows] == [r.score for r in said.rows]
    assert [r.prediction for r in said.rows] == [r.prediction for r in alone.rows]


def test_checkpointing_changes_nothing(tmp_path, base):
    train(base, tmp_path / "0", task_name="law")
    runs = [
        train(str(tmp_path / "0"), tmp_path / str(on), max_steps=3, task_name="tax", gradient_checkpointing=on,
              gradient_checkpointing_kwargs={"use_reentrant": False} if on else None)
        for on in (False, True)
    ]  # fmt: skip
    torch.testing.assert_close(toy.flat(runs[0].model), toy.flat(runs[1].model), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="reentrant gradient checkpointing keeps no gradient"):
        train(str(tmp_path / "0"), tmp_path / "x", gradient_checkpointing=True,
              gradient_checkpointing_kwargs={"use_reentrant": True}, task_name="tax")  # fmt: skip


def test_sentences(three, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"SAPTLoRA\(kept=0\) must be at least 1"):
        SAPTLoRA(kept=0)
    with pytest.raises(ValueError, match="model is a Linear without them"):
        example(None).prepare_model(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="learned the task 'law' before 'fun', and its pair is frozen"):
        train(str(tmp_path / "fun"), tmp_path / "x", task_name="law")
    with pytest.raises(ValueError, match="trained with different sizes"):
        train(str(tmp_path / "fun"), tmp_path / "x", SAPTLoRA(r=4), task_name="more")
    with pytest.raises(ValueError, match="several rows are one sequence"):
        train(str(tmp_path / "fun"), tmp_path / "x", packing=True, max_length=32, task_name="more")
    state = {"tasks": ["law"], "inputs/0": torch.ones(2, 5), "label/0": torch.ones(1)}
    method = three[-1].methods.methods[0]
    with pytest.raises(ValueError, match=r"kept of the task 'law' \(5 channels\) does not belong"):
        method.load_task_state(state, three[-1].run)
    train(str(tmp_path / "fun"), tmp_path / "x", task_name="more", max_steps=1, fresh_methods=True)
    assert "what the attention of law, tax, fun was is not known" in caplog.text
