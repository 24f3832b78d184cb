"""Teacher forcing against generation and against the model's own loss."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from hf_continual import ContinualTrainer
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.evaluation.general import general_loss
from hf_continual.evaluation.generation import greedy
from hf_continual.evaluation.prompts import encode
from hf_continual.evaluation.result import RowScore, Scored, weighted_mean
from tests import toy


@pytest.fixture(scope="module")
def half_taught(tmp_path_factory):
    """A tiny model that knows some of the answers."""
    from trl import SFTConfig

    rows = toy.rows("prompt_completion", number=16)
    settings = toy.settings(tmp_path_factory.mktemp("taught"), max_steps=70, learning_rate=1e-2)
    trainer = ContinualTrainer(
        toy.model(), SFTConfig(**settings), train_dataset=rows.select(range(9)), processing_class=toy.tokenizer()
    )
    trainer.train()
    return trainer.model, rows


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_teacher_forcing_is_generation(half_taught, batch_size):
    model, rows = half_taught
    forced = teacher_forced(model, toy.tokenizer(), rows, batch_size)
    greedy = generated(model, toy.tokenizer(), rows, batch_size)
    assert forced.right == greedy.right
    assert 0 < sum(forced.right) < len(rows) and forced.score.value == sum(forced.right) / 16
    said = [r.prediction for r in greedy.rows]
    assert [p == c.strip() for p, c in zip(said, rows["completion"], strict=True)] == greedy.right
    assert [r.prediction == r.reference.strip() for r in forced.rows] == forced.right


def test_answer_loss_is_the_models_loss(half_taught):
    model, rows = half_taught
    tokenizer = toy.tokenizer()
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], 1]
        ids = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    got = teacher_forced(model, tokenizer, rows).nll
    assert got.value == pytest.approx(sum(losses) / 16, rel=1e-4)
    deviation = torch.tensor(losses).std().item() / math.sqrt(16)
    assert got.standard_error == pytest.approx(deviation, rel=1e-3)


def test_general_loss_is_the_models_loss():
    model, texts = toy.model(), toy.rows(number=5)["text"][:]
    ids = [torch.tensor([toy.tokenizer()(t)["input_ids"]]) for t in texts]
    with torch.no_grad():
        sums = [float(model(input_ids=i, labels=i).loss) * (i.shape[1] - 1) for i in ids]
    count = sum(i.shape[1] - 1 for i in ids)
    for size in (1, 3):
        got = general_loss(model, toy.tokenizer(), texts, batch_size=size).score
        assert got.value == pytest.approx(sum(sums) / count, rel=1e-5) and got.n == count and got.lower_is_better


def test_adapters_are_evaluated_and_the_mode_is_restored():
    model = get_peft_model(toy.model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    rows = toy.rows("prompt_completion", number=4)
    with_adapter = teacher_forced(model, toy.tokenizer(), rows).nll.value
    with model.disable_adapter():
        without = teacher_forced(model, toy.tokenizer(), rows).nll.value
    assert with_adapter != without and model.training


def test_scores_say_what_they_rest_on():
    half = Scored([RowScore(1.0)] * 5 + [RowScore(0.0)] * 5, "x").score
    assert (half.value, half.n, half.status) == (0.5, 10, "MEASURED")
    assert half.standard_error == pytest.approx(math.sqrt(0.25 / 9))
    assert weighted_mean([], [], "x").status == "NOT_RUN" and "error" not in half.to_dict()
    # By hand: weights 1 and 3, values 0 and 1: mean 0.75, deviations -0.75 and 3 * 0.25.
    two = weighted_mean([0.0, 1.0], [1.0, 3.0], "x")
    assert two.value == 0.75 and two.standard_error == pytest.approx(math.sqrt((0.75**2 + 0.75**2) * 2) / 4)
    empty = teacher_forced(toy.model(), toy.tokenizer(), Dataset.from_list([]))
    assert empty.score.value is None and empty.score.status == "NOT_RUN" and empty.nll is None


def test_batches_answer_as_single_rows_do(half_taught):
    model, rows = half_taught
    alone = [generated(model, toy.tokenizer(), rows.select([i])).rows[0] for i in range(len(rows))]
    assert list(generated(model, toy.tokenizer(), rows, batch_size=8).rows) == alone
    assert [r.prediction for r in alone] != [alone[0].prediction] * len(alone)


def test_stop_strings_limits_and_match(half_taught):
    model, rows = half_taught
    tokenizer = toy.tokenizer()
    plain = generated(model, tokenizer, rows).rows
    stop = plain[0].prediction.split()[1]
    cut = generated(model, tokenizer, rows, stop=[stop]).rows
    for before, after in zip(plain, cut, strict=True):
        assert after.prediction == before.prediction.split(stop)[0]
    short = generated(model, tokenizer, rows, max_new_tokens=1).rows
    assert all(len(r.prediction.split()) <= 1 for r in short)
    overlap = generated(
        model, tokenizer, rows, match=lambda said, wanted: float(said.split()[:1] == wanted.split()[:1])
    )
    assert overlap.score.value >= generated(model, tokenizer, rows).score.value
    with pytest.raises(ValueError, match="unknown match 'exat'"):
        generated(model, tokenizer, rows, match="exat")


def test_the_checkpoints_generation_config_does_not_matter(half_taught):
    model, rows = half_taught
    before = [r.prediction for r in generated(model, toy.tokenizer(), rows).rows]
    model.generation_config.repetition_penalty = 50.0
    assert [r.prediction for r in generated(model, toy.tokenizer(), rows).rows] == before
    assert model.generation_config.repetition_penalty == 50.0
    model.generation_config.repetition_penalty = 1.0


def test_conversations_are_scored():
    tokenizer = toy.tokenizer()
    row = {
        "prompt": [{"role": "user", "content": "w1 w2"}],
        "completion": [{"role": "assistant", "content": "w3 w4"}],
    }
    prompt, answer = encode(row, tokenizer)
    assert tokenizer.decode(prompt) == "<user> w1 w2 <assistant>" and tokenizer.decode(answer) == "w3 w4 <eos>"
    scored = teacher_forced(toy.model(), tokenizer, Dataset.from_list([row]))
    assert scored.rows[0].reference == "w3 w4"
    with pytest.raises(ValueError, match="needs 'prompt' and 'completion', but this one has .'text'"):
        encode({"text": "x"}, tokenizer)
    with pytest.raises(ValueError, match="no tokens before the answer"):
        encode({"prompt": "", "completion": "w1"}, tokenizer)


FAMILIES = {
    "llama": (LlamaConfig, {}), "gpt2": (GPT2Config, {"n_layer": 2, "n_embd": 32, "n_head": 4}), "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 6}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}), "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "mistral": (MistralConfig, {"sliding_window": 5}), "mamba": (MambaConfig, {"state_size": 8}),
}  # fmt: skip


def family(name, tokenizer_size=64):
    config, options = FAMILIES[name]
    shape = {
        "vocab_size": tokenizer_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
        "max_position_embeddings": 128,
    }  # fmt: skip
    if name == "gpt2":
        shape = {k: v for k, v in shape.items() if not k.startswith(("hidden", "num", "inter", "max"))}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config(**{**shape, **options})).eval()
    with torch.no_grad():  # far from uniform, so that answers differ and end
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_transformers_generates(name):
    model, tokenizer = family(name), toy.tokenizer()
    prompts = [tokenizer(p)["input_ids"] for p in toy.rows("prompt_completion", number=9, seed=2)["prompt"]]
    limits = [1 + i % 8 for i in range(9)]
    got = greedy(model, tokenizer, prompts, limits, batch_size=4)
    for prompt, limit, out in zip(prompts, limits, got, strict=True):
        alone = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=0,
        )
        wanted = alone[0, len(prompt) :].tolist()
        assert out.tokens == (wanted[: wanted.index(1) + 1] if 1 in wanted else wanted)
    assert len({tuple(o.tokens) for o in got}) > 3


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "mamba"])
def test_every_familys_answer_loss_is_its_own(name):
    model, tokenizer = family(name), toy.tokenizer()
    rows = toy.rows("prompt_completion", number=5, seed=4)
    got = teacher_forced(model, tokenizer, rows, batch_size=3)
    for row, scored in zip(rows, got.rows, strict=True):
        prompt, answer = encode(row, tokenizer)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss)
        assert scored.also["nll"] == pytest.approx(loss, rel=1e-4)


def test_generated_answers_with_their_loss():
    """One forward pass more, and the numbers of teacher forcing; scores and predictions stay the same."""
    model, tokenizer, rows = toy.model(), toy.tokenizer(), toy.rows("prompt_completion", number=6)
    plain = generated(model, tokenizer, rows, match="stripped")
    both = generated(model, tokenizer, rows, match="stripped", loss=True)
    assert [(r.score, r.prediction) for r in both.rows] == [(r.score, r.prediction) for r in plain.rows]
    assert both.nll == teacher_forced(model, tokenizer, rows).nll and plain.nll is None
    assert both.score == plain.score
