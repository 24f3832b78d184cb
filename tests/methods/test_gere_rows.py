"""GeRe's rows: their first token, comparison with their own states, the model's positions, the KL."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
import transformers as t
from peft import PrefixTuningConfig, PromptTuningConfig
from tokenizers import processors

from hf_continual.data.self_generated import own_words
from hf_continual.methods.gere.general_rows import general_tokens
from hf_continual.methods.gere.ternary import unpack_states
from hf_continual.tensors.reference import last_hidden, most_tokens, virtual_tokens, weights_fingerprint
from tests import toy
from tests.methods.test_gere import build, gere
from tests.tensors.test_head import FAMILIES, SMALL

pytestmark = pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")

BEGINS = {"<user> $A": [2], "<user> <assistant> $A": [2, 3], "$A": []}


def tokenizer(template):
    made = toy.tokenizer()
    special = [(w, toy.VOCABULARY.index(w)) for w in template.split() if w != "$A"]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return made


@pytest.mark.parametrize("template", BEGINS)
def test_rows_begin_as_the_tasks_do(template):
    rows = general_tokens(["w1 w2 w3", "w4 w5"], tokenizer(template), 100, None)
    assert rows == [[*BEGINS[template], 5, 6, 7], [*BEGINS[template], 8, 9]]


def test_texts_of_its_own_begin_once():
    model, made = toy.model(), tokenizer("<user> $A")
    made.add_special_tokens({"bos_token": "<user>"})
    texts = own_words(model, made, 3, 24, seed=1)
    assert not any("<user>" in text for text in texts)
    rows = general_tokens(texts, made, 100, None)
    assert all(row[0] == 2 and row[1] != 2 for row in rows)


CUTS = {
    "shuffled": {"shuffle_dataset": True},
    "from the end": {"max_length": 6, "truncation_mode": "keep_end"},
    "from the start": {"max_length": 6},
    "packed and shuffled": {"packing": True, "max_length": 8, "shuffle_dataset": True},
}


@pytest.mark.parametrize("cut", CUTS)
def test_each_row_is_compared_with_its_own_states(tmp_path, cut):
    """Before any update nothing is violated, and the recorded states of a row are those of the row that is drawn."""
    method = gere(tmp_path, rows=toy.rows(seed=9, number=12, low=30, high=59), dead_band=1e-5)
    trainer = build(tmp_path, method, max_steps=1, **CUTS[cut])
    model, made = toy.model(), method._recorded
    for i, row in enumerate(trainer.mixer.rows[0]["input_ids"]):
        assert len(row) <= CUTS[cut].get("max_length", 99)
        hidden = last_hidden(model, row).detach()
        states = unpack_states(made.row(i, len(row)), 32)
        inside = (hidden >= made.low_D - 1e-5) & (hidden <= made.high_D + 1e-5)
        assert ((states == 0) <= inside).all() and ((states == 1) <= (hidden >= made.high_D - 1e-5)).all()
    trainer.train()
    assert trainer.state.log_history[0]["gere/violations"] == 0


def test_rows_are_cut_where_the_model_has_no_positions(tmp_path, caplog):
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, gere(tmp_path), model=model, max_steps=1, max_length=8)
        trainer.train()
    assert max(trainer.mixer.draws[0].lengths) == most_tokens(model) == 8
    assert "max_length=563 was requested, but the model has positions for 8 tokens; 4 of 24" in caplog.text


def test_rows_that_are_left_out_are_counted(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(general_tokens(["w1", "w1 w2", ""], toy.tokenizer(), 9, None)) == 1
    assert "2 of 3 general rows have fewer than two tokens" in caplog.text
    with pytest.raises(ValueError, match="1 of 2 general rows hold None or a number in 'text'.*row 1"):
        general_tokens(["w1 w2", None], toy.tokenizer(), 9, None)


SOFT = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("soft", SOFT)
def test_virtual_tokens_belong_to_the_model_at_task_start(tmp_path, soft):
    """With them nothing is violated at the start; the base has none and keeps its file."""
    method = gere(tmp_path, reference="task_start", dead_band=1e-4)
    trainer = build(tmp_path, method, peft=SOFT[soft], max_steps=1, learning_rate=0.5)
    assert virtual_tokens(trainer.run.model) == SOFT[soft].num_virtual_tokens
    before = weights_fingerprint(trainer.model, "base")
    assert before == weights_fingerprint(toy.model(), "base")
    trainer.train()
    assert trainer.state.log_history[0]["gere/violations"] == 0
    assert weights_fingerprint(trainer.model, "base") == before
    based = build(tmp_path, gere(tmp_path), model=trainer.model, max_steps=1)
    based.train()
    assert based.state.log_history[0]["gere/violations"] > 0, "what the virtual tokens changed"
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2", "phi"])
def test_the_kl_is_that_of_the_models_own_distributions(tmp_path, family):
    cls, config, more, _ = FAMILIES[family]
    more = {**SMALL, "vocab_size": 64, **more}
    torch.manual_seed(0)
    model = cls(config(**more))
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias, std=2.0)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = build(tmp_path, gere(tmp_path, constraint="kl", weight=1.0), model=model, max_steps=1, learning_rate=0.0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved, drawn = {k: v.clone() for k, v in trainer.model.state_dict().items()}, []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda m, inputs, *a, **k: (
        drawn.extend(inputs["replay_origin"]["drawn"]) or compute(m, inputs, *a, **k)
    )
    trainer.train()
    other = cls(config(**more)).eval()
    values = []
    with torch.no_grad():
        for _, row, _ in drawn:
            ids = torch.tensor([trainer.mixer.rows[0][row]["input_ids"]])
            logs = []
            for weights in (start, moved):
                other.load_state_dict(weights)
                logs.append((other(ids).logits[0] / 2).log_softmax(-1))
            values.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    wanted = float(torch.cat(values).mean())
    assert wanted > 1e-3 and trainer.state.log_history[0]["gere/kl"] == pytest.approx(wanted, rel=0.05)


def test_a_head_that_is_not_known_is_refused(tmp_path, monkeypatch):
    forward = t.LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = None if out.logits is None else out.logits * 3
        return out

    doubled.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(t.LlamaForCausalLM, "forward", doubled)
    with pytest.raises(
        ValueError, match=r"constraint='kl'\): those of LlamaForCausalLM differ .* Use 'tm', 'l1' or 'l2'"
    ):
        build(tmp_path, gere(tmp_path, constraint="kl"))
    build(tmp_path, gere(tmp_path, constraint="tm"))


def test_a_dynamic_weight_is_logged_where_it_weighs_something(tmp_path):
    trainer = build(tmp_path, gere(tmp_path, weight="dynamic", dead_band=1e-5), max_steps=3, learning_rate=1e-2)
    trainer.train()
    first, *later = [e for e in toy.logs(trainer) if "gere/tm" in e]
    assert first["gere/tm"] == 0 and "gere/weight" not in first
    for entry in later:
        assert entry["gere/weight"] < 1e4


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_compiled_after_another_run_in_the_same_process(tmp_path):
    """Code that was compiled for a run with other hooks is not used again."""
    from hf_continual import Replay

    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    plain = build(tmp_path, gere(tmp_path), max_steps=2)
    plain.train()
    build(tmp_path, Replay(toy.rows(seed=3), ratio=0.3), **compiled).train()
    again = build(tmp_path, gere(tmp_path), **compiled)
    again.train()
    for a, b in zip(toy.logs(plain)[:2], toy.logs(again)[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["gere/tm"] == pytest.approx(b["gere/tm"], abs=1e-5)
