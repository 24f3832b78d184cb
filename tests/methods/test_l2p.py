"""L2P: the authors' selection and key term, the choice in training and at inference, and what cannot be trained with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_continual import EWC, L2P, ContinualConfig, ContinualTrainer, Replay, load_prompt_pool
from hf_continual.inference.base import question_mask
from hf_continual.inference.kinds import asked, tuner_of
from hf_continual.methods.l2p import mean_query, prompted, pull, select, similarities
from tests import toy

GOLDEN = Path(__file__).parents[1] / "golden" / "baselines" / "l2p_pool.safetensors"
ZERO_TOLERANCE = 0.0
SIZES = {"pool": 4, "length": 2, "top": 2}


def example(world):
    return L2P(**SIZES, weight=0.5)


def zero(world):
    return L2P(**SIZES, weight=0.0)


def train(start, folder, method=None, kind="prompt_completion", peft=None, **settings):
    methods = [method or example(None)] if not isinstance(method, list) else method
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **{"learning_rate": 1e-2, **settings})),
        train_dataset=toy.rows(kind), processing_class=toy.tokenizer(), peft_config=peft, methods=methods,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture
def base(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def golden():
    return {name.split("/")[1]: tensor for name, tensor in load_file(GOLDEN).items()}


def test_the_authors_numbers():
    """`Prompt.forward` with a pool of 6, length 3, top 2, key 'mean', the batch's vote."""
    told = golden()
    query = mean_query(told["x"])
    similar = similarities(query, told["key"])
    index = select(similar, 2, batchwise=True)
    torch.testing.assert_close(similar, told["similarity"], rtol=0, atol=1e-6)
    assert torch.equal(index, told["idx"])
    torch.testing.assert_close(pull(query, told["key"], index), told["reduce_sim"][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(prompted(told["prompt"], index, told["x"]), told["prompted"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_vote_of_a_batch_is_theirs(seed):
    """The authors' lines on ids, with `torch.unique`, against ours without a look at the device."""
    similar = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    top = 3
    ids, counts = torch.unique(similar.topk(top, dim=1).indices, return_counts=True, sorted=True)
    if len(ids) < 7:
        ids = torch.cat([ids, ids.min().expand(7 - len(ids))])
        counts = torch.cat([counts, torch.zeros(7 - len(counts), dtype=counts.dtype)])
    voted = ids[counts.topk(top).indices]
    assert torch.equal(select(similar, top, batchwise=True), voted.expand(5, -1))


def test_the_key_term_turns_keys_towards_their_queries(base, tmp_path):
    kept = train(base, tmp_path / "kept", L2P(**SIZES, weight=0.0))
    turned = train(base, tmp_path / "turned", L2P(**SIZES, weight=5.0), max_steps=16)
    start = train(base, tmp_path / "start", L2P(**SIZES), max_steps=1, learning_rate=1e-12)
    keys = [tuner_of(t.model).pool.keys["default"].detach() for t in (start, kept, turned)]
    torch.testing.assert_close(keys[0], keys[1], rtol=0, atol=1e-9)  # no term: as they were drawn
    assert (keys[2] - keys[0]).abs().max() > 1e-3
    words = turned.model.get_input_embeddings()
    query = torch.stack([words(torch.tensor(row)).mean(0) for row in [[5, 9, 12], [30, 8], [21, 7, 16, 4]]]).detach()
    near = [pull(query, k, select(similarities(query, k), 2)) for k in keys]
    assert near[2] > near[0] + 0.02
    assert not any("l2p/pull" in entry for entry in kept.state.log_history)


def test_the_term_is_minus_lambda_times_the_pull(base, tmp_path):
    """What is logged for the first micro-batch, computed again from its rows."""
    trainer = train(base, tmp_path, L2P(**SIZES, weight=0.7), max_steps=1, learning_rate=1e-12)
    batch = next(iter(trainer.get_train_dataloader()))
    pool = tuner_of(trainer.model).pool
    embeddings = trainer.model.get_input_embeddings()(batch["input_ids"])
    query = mean_query(embeddings, question_mask(batch["labels"], batch["attention_mask"]))
    keys = pool.keys["default"]
    term = -0.7 * pull(query, keys, select(similarities(query, keys), 2))
    assert len(query) == 4 and trainer.state.log_history[0]["l2p/pull"] < 0
    trainer.model.train()
    trainer.model(**{k: v for k, v in batch.items() if torch.is_tensor(v)})
    torch.testing.assert_close(-0.7 * pool.pull, term, rtol=1e-5, atol=1e-6)


def test_the_answer_has_no_say(base, tmp_path):
    """Training, teacher forcing and generation choose by the question alone; text without a question by all of it."""
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, 5, -100, 6, -100], [4, 5, 6, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert question_mask(labels, mask).tolist() == [
        [True, True, False, False, False], [True, False, False, False, False], [True, True, True, False, False],
    ]  # fmt: skip
    model = train(base, tmp_path).model.eval()
    question, answer = torch.tensor([[5, 9, 12]]), torch.tensor([[40, 41]])
    pool = tuner_of(model).pool
    chosen = []
    with torch.no_grad():
        model(input_ids=question)
        chosen.append(pool.chosen_BN.tolist())
        whole = torch.cat([question, answer], 1)
        model(input_ids=whole, labels=torch.where(torch.arange(5) < 3, -100, whole))
        chosen.append(pool.chosen_BN.tolist())
        with asked(model, torch.tensor([[True] * 3 + [False] * 2])):
            model(input_ids=whole)
        chosen.append(pool.chosen_BN.tolist())
    assert chosen[0] == chosen[1] == chosen[2]


def test_batchwise_votes_in_training_only(base, tmp_path):
    model = train(base, tmp_path, L2P(**SIZES, batchwise=True)).model
    pool = tuner_of(model).pool
    rows = torch.randint(4, 60, (6, 7), generator=torch.Generator().manual_seed(0))
    model.train()
    model(input_ids=rows)
    assert len({tuple(r) for r in pool.chosen_BN.tolist()}) == 1
    model.eval()
    with torch.no_grad():
        together = model(input_ids=rows).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_nothing_of_the_base_moves_and_without_the_pool_it_is_the_base(base, tmp_path):
    model = train(base, tmp_path).model.eval()
    plain, ids = toy.model().eval(), torch.tensor([[5, 9, 12, 30]])
    own = {n.replace("base_model.model.", ""): p for n, p in model.named_parameters() if "prompt_pool" not in n}
    assert all(torch.equal(own[n], p) for n, p in plain.named_parameters())
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_next_task_goes_on_with_the_same_pool(base, tmp_path):
    first = train(base, tmp_path / "1")
    first.save_model()
    saved = load_file(tmp_path / "1" / "adapter_model.safetensors")
    assert sorted(n.rpartition(".")[2] for n in saved) == ["keys", "prompts"]
    second = train(str(tmp_path / "1"), tmp_path / "2", L2P(**SIZES, weight=0.1, batchwise=True))
    second.save_model()
    loaded, ids = load_prompt_pool(tmp_path / "2"), torch.tensor([[5, 9, 12, 30]])
    assert torch.equal(loaded(input_ids=ids).logits, second.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("uniform", [False, True])
def test_prompts_begin_as_tokens_or_uniform(base, tmp_path, uniform):
    method = L2P(**SIZES, init="uniform" if uniform else "tokens")
    model = train(base, tmp_path, method, max_steps=1, learning_rate=1e-12).model
    prompts = tuner_of(model).pool.prompts["default"].detach().flatten(0, 1)
    words = model.get_input_embeddings().weight.detach()
    far = (prompts[:, None] - words).abs().amax(-1).amin(1)
    assert (far > 0.3).all() if uniform else (far < 1e-6).all()


def test_sentences_for_hyper_parameters():
    for wrong, error, said in (
        ({"pool": 0}, ValueError, "at least 1"),
        ({"length": 1.5}, TypeError, "whole number"),
        ({"pool": 3, "top": 4}, ValueError, "cannot take more prompts than the pool has"),
        ({"weight": -0.1}, ValueError, "at least 0"),
        ({"init": "zeros"}, ValueError, "must be one of tokens, uniform"),
    ):
        with pytest.raises(error, match=said):
            L2P(**wrong)


def test_sentences_for_models_and_rows(base, tmp_path):
    train(base, tmp_path / "1").save_model()
    pool = str(tmp_path / "1")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    train(base, tmp_path / "lora", [], peft=lora).save_model()
    for start, method, changes, said in (
        (base, None, {"peft": lora}, "L2P supplies the modules that it trains, but peft_config=LoraConfig"),
        (base, None, {"packing": True, "max_length": 32}, "several rows are one sequence. Set packing=False"),
        (base, None, {"padding_free": True, "max_length": None}, "Set padding_free=False"),
        (base, [L2P(), L2P(name="other")], {}, "both supply their own modules"),
        (pool, L2P(), {}, r"trained with different sizes \(pool was 4, is 10; length was 2"),
        (pool, [EWC(rows=4)], {}, "method 'l2p' trains, but this run is without it"),
        (pool, [], {}, r"methods: \{l2p: \{pool: 4, length: 2, top: 2\}\}"),
        (pool, None, {"from_adapter": "stack"}, "can only be trained further"),
        (str(tmp_path / "lora"), None, {}, "from_adapter='merge_then_new'"),
    ):
        with pytest.raises(ValueError, match=said):
            train(start, tmp_path / "refused", method, **changes)
    # The advice of the last sentence.
    train(str(tmp_path / "lora"), tmp_path / "merged", from_adapter="merge_then_new").save_model()
    assert load_prompt_pool(tmp_path / "merged").name_or_path == str(tmp_path / "merged" / "merged-base")


def test_with_replay_and_fisher(base, tmp_path):
    """Rows of text and rows of question and answer in one micro-batch; EWC holds the pool's own weights."""
    first = train(base, tmp_path / "1", [example(None), EWC(rows=8)])
    first.save_model()
    old = toy.rows("prompt_completion", seed=9, low=30, high=59)
    second = train(
        str(tmp_path / "1"), tmp_path / "2", [example(None), EWC(rows=8, weight=10.0), Replay(old, ratio=0.3)]
    )
    assert sorted(n.rpartition(".")[0].rpartition(".")[2] for n in second.run.named_parameters()) == ["keys", "prompts"]
    assert second.task_states["ewc"]
