"""LFPT5: the loss worked by hand, the distillation against two models, a soft prompt from task to task."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PromptTuningConfig
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from hf_continual import LFPT5, ContinualConfig, ContinualTrainer, Forward
from hf_continual.methods.lfpt5 import predicting
from hf_continual.tensors.reference import own_logits
from tests import toy
from tests.methods.test_lamol import ANS, GEN, only, pairs

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True
EXTRA_FORWARDS = 49  # two batches of samples of 24 tokens each, and one that tries the head
SHORTER = {"gen_marker": "w57", "answer_marker": "w58"}  # the toy tokenizer has no tokens for the usual ones


def example(world):
    return LFPT5(
        gamma=0.5,
        lm_weight=0.5,
        top_k=0,
        repetition_penalty=1.0,
        max_new_tokens=24,
        batch_rows=8,
        distill=0.5,
        **SHORTER,
    )


def zero(world):
    return LFPT5(gamma=0, lm_weight=0, distill=0, **SHORTER)


def lfpt5(**options):
    return LFPT5(**{"top_k": 0, "repetition_penalty": 1.0, "batch_rows": 8, **SHORTER, **options})


def build(start, folder, rows, method, peft=None, **settings):
    return ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **settings)), train_dataset=rows, processing_class=toy.tokenizer(),
        peft_config=peft, methods=[method],
    )  # fmt: skip


PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
LEARNING = {"max_steps": 150, "learning_rate": 5e-3, "per_device_train_batch_size": 6, "logging_steps": 200}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A whole model that knows six questions and can write them."""
    folder = tmp_path_factory.mktemp("first")
    trainer = build(toy.model(), folder, pairs(0), lfpt5(lm_weight=1.0), **LEARNING)
    trainer.train()
    trainer.save_model()
    return str(folder)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, first):
    """A soft prompt on that model, which has learned with it again."""
    folder = tmp_path_factory.mktemp("prompted")
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(folder / "base")
    trainer = build(
        str(folder / "base"), folder / "one", pairs(0), lfpt5(lm_weight=1.0), PromptTuningConfig(**PROMPT),
        max_steps=100, learning_rate=0.1, per_device_train_batch_size=6, logging_steps=200,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder / "one"


def test_the_terms_by_hand():
    """Without samples L_QA + lambda L_LM; with some (1 - kd) of both, and kd of a KL that is known here."""
    loss = torch.tensor([[0.0, 2.0, 4.0], [1.0, 2.0, 6.0]])
    labels = torch.tensor([[-100, -100, 5, 1], [-100, 5, 5, 1]])
    source = torch.tensor([[-1] * 4, [0] * 4])
    nowhere = torch.full_like(source, -1)
    forward = Forward(
        inputs={"labels": labels}, token_loss_BS=loss, taps={}, source_BS=source, row_BS=nowhere, offset_BS=nowhere,
        sources=("lfpt5",), tokens=torch.tensor(2), scale=1.0,
    )  # fmt: skip
    method = LFPT5(lm_weight=0.25, distill=0.1)
    assert {k: float(v) for k, v in method.loss_terms(forward).items()} == {"lm": 0.75}
    method._heads = (lambda z: z, lambda z: z)
    method._divergence = lambda *args: torch.tensor(7.0)
    terms = {k: float(v) for k, v in method.loss_terms(forward).items()}
    # The trainer's own loss is L_QA = (2 + 4) / 2.
    assert 3.0 + sum(terms.values()) == pytest.approx(0.9 * (3.0 + 0.25 * 3.0) + 0.1 * 7.0)
    assert terms["distill"] == pytest.approx(0.7)


def test_positions_that_predict_an_answer():
    assert predicting([-100, -100, 7, 1]) == [1, 2]
    assert predicting([5, 6, 1]) == [0, 1]


def divergence_by_hand(before, now, rows):
    """Mean over answer tokens of KL(before || now), from the models' own logits, row by row."""
    found = []
    for row in rows:
        with torch.no_grad():
            p, q = (log_softmax(own_logits(m, row["input_ids"]).float(), -1) for m in (before, now))
        places = predicting(row["labels"])
        found.append((p[places].exp() * (p[places] - q[places])).sum(-1))
    return torch.cat(found).mean()


LAYOUTS = {
    "padded": {},
    "flattened": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 16},
}


def watch(trainer, before):
    """What the method finds in each micro-batch beside what two models say."""
    method, seen = only(trainer), []
    real = method._divergence

    def both(forward, *heads):
        found = real(forward, *heads)
        mine = forward.sources.index(method.name)
        places = [i - method._first for source, i, _ in forward.drawn if source == mine and i >= method._first]
        if places:
            rows = [method._pseudo[i] for i in places]
            training = trainer.model.training
            trainer.model.eval()
            seen.append((float(found.detach()), float(divergence_by_hand(before, trainer.model, rows))))
            trainer.model.train(training)
        else:
            assert float(found) == 0.0
        return found

    method._divergence = both
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_distillation_is_the_kl_of_two_models(tmp_path, first, layout):
    """All weights, so that the head moves too: the earlier one is the one at the start."""
    settings = {"max_steps": 6, "learning_rate": 3e-3, "task_index": 1, **LAYOUTS[layout]}
    trainer = build(first, tmp_path, pairs(30), lfpt5(gamma=1.0, distill=0.5), **settings)
    seen = watch(trainer, copy.deepcopy(AutoModelForCausalLM.from_pretrained(first)).eval())
    trainer.train()
    assert len(seen) >= 4 and seen[0][0] == pytest.approx(0.0, abs=2e-4) and seen[-1][0] > 2e-3
    for found, wanted in seen:
        assert found == pytest.approx(wanted, rel=2e-2, abs=2e-4)  # the copied head is bfloat16


def test_a_soft_prompt_is_held_to_what_it_said(tmp_path, prompted):
    """The head is frozen and not copied; the prompt is all that moves, and its earlier values are not kept."""
    settings = {"max_steps": 8, "learning_rate": 0.1, "task_index": 1}
    trainer = build(str(prompted), tmp_path, pairs(30), lfpt5(gamma=1.0, distill=0.5, tries=2), **settings)
    trained = {n: p.shape for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert list(trained.values()) == [torch.Size([5, 32])]
    before = AutoPeftModelForCausalLM.from_pretrained(prompted).eval()
    torch.testing.assert_close(toy.flat(trainer.model), toy.flat(before), rtol=0, atol=0)
    seen = watch(trainer, before)
    trainer.train()
    report = trainer.task_states["lfpt5"]["reports"][0]
    assert report["kept"] >= 3 and report["kept"] + report["malformed"] == report["written"]
    assert len(seen) >= 4 and seen[0][0] == pytest.approx(0.0, abs=1e-6) and seen[-1][0] > 1e-3
    for found, wanted in seen:
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    method = only(trainer)
    assert method._heads[0] is method._heads[1]
    assert [len(h) for h in method._before] == [len(predicting(row["labels"])) for row in method._pseudo]


def test_the_prompt_is_saved_as_a_plain_adapter_and_goes_on(tmp_path, prompted):
    trainer = build(str(prompted), tmp_path / "two", pairs(30), lfpt5(), task_index=1, max_steps=2, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "two")
    torch.testing.assert_close(toy.flat(loaded), toy.flat(trainer.model), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        said = loaded.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)[0].tolist()
    assert said[2:] == [int(own_logits(loaded, said[:n])[-1].argmax()) for n in (2, 3)]
    card = (tmp_path / "two" / "README.md").read_text()
    assert "A prompt tuning adapter that" in card and "- prompt tuning: virtual_tokens=5" in card and "LoRA" not in card
    again = build(str(tmp_path / "two"), tmp_path / "three", pairs(20), lfpt5(), task_index=2, max_steps=1)
    again.train()
    assert again.task_states["lfpt5"]["tasks"] == ["task"] * 3


def test_a_prompt_resumes_bit_for_bit(tmp_path, prompted):
    settings = {"task_index": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    straight = build(str(prompted), tmp_path, pairs(30), lfpt5(gamma=1.0, distill=0.5), **settings)
    straight.train()
    resumed = build(str(prompted), tmp_path, pairs(30), lfpt5(gamma=1.0, distill=0.5), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))


def test_distilling_keeps_what_the_model_said(tmp_path, first):
    """The same samples with and without: with it the model stays nearer to what it said about them."""
    far = {}
    before = AutoModelForCausalLM.from_pretrained(first).eval()
    for distill in (0.0, 0.9):
        trainer = build(
            first, tmp_path / str(distill), pairs(30), lfpt5(gamma=1.0, distill=distill), task_index=1, max_steps=40,
            learning_rate=3e-3, per_device_train_batch_size=6, logging_steps=200,
        )  # fmt: skip
        trainer.train()
        far[distill] = float(divergence_by_hand(before, trainer.model.eval(), only(trainer)._pseudo))
    assert far[0.9] < far[0.0]


def test_without_a_soft_prompt_it_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build(toy.model(), tmp_path, pairs(0), lfpt5())
    assert "here the model is trained: the loss is the same, the method is not the published one" in caplog.text
    caplog.clear()
    build(toy.model(), tmp_path, pairs(0), lfpt5(), PromptTuningConfig(**PROMPT))
    assert "published" not in caplog.text


def test_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match=r"LFPT5\(distill=1\) must lie between 0 and 1, 1 excluded"):
        LFPT5(distill=1)
    with pytest.raises(ValueError, match=r"LFPT5\(gamma=0.2, lm_weight=0\)"):
        LFPT5(lm_weight=0)
    with pytest.raises(ValueError, match="before the first row of a pack only.*Set packing=False"):
        build(toy.model(), tmp_path, pairs(0), lfpt5(), PromptTuningConfig(**PROMPT), packing=True, max_length=16)


def test_samples_are_written_behind_the_prompt(tmp_path, prompted):
    """The text format is learned with the prompt before it, and written so."""
    trainer = build(str(prompted), tmp_path, pairs(30), lfpt5(gamma=1.0, tries=2), task_index=1, max_steps=1)
    trainer.train()
    method = only(trainer)
    for row in method._pseudo:
        text = method._pairs(row["input_ids"], row["labels"])["input_ids"]
        assert text[0] == GEN and text.count(ANS) == 1 and text[-1] == 1
