"""Models whose inference is not plain: saved, loaded and generated as others; known to plans and cards, refused by merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import hf_continual
from hf_continual import (
    L2P,
    ContinualConfig,
    ContinualTrainer,
    MoELoRA,
    SAPTLoRA,
    load_prompt_pool,
    merge,
    train_stream,
)
from hf_continual.atomic_files import read_json
from hf_continual.evaluation.choices import log_likelihoods
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.evaluation.generation import greedy
from hf_continual.hub.lint import lint_card
from hf_continual.inference.kinds import KINDS, asked, kind_of, tuner_of
from hf_continual.inference.loading import load_kind
from hf_continual.inference.names import NAMES, kind_in
from hf_continual.merging.errors import MergeError
from hf_continual.merging.methods.table import MERGES as MERGES
from hf_continual.stream.plan_lines import PlanError
from tests import toy
from tests.first_hour.typed import typed
from tests.stream import world

# A kind's method, as the toy world trains it: a new kind is tested by a line here.
TRAINED = {
    "PROMPT_POOL": lambda: L2P(pool=4, length=2, top=2, weight=0.5),
    "MOE_LORA": lambda: MoELoRA(experts=2, gate="token", r=4, top_k=1),
    "SAPT_LORA": lambda: SAPTLoRA(r=2, hidden=6, kept=4),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """Folder of a base, and of what was trained on it."""
    folder = tmp_path_factory.mktemp(request.param.lower())
    toy.model().save_pretrained(folder / "base")
    toy.tokenizer().save_pretrained(folder / "base")
    trainer = ContinualTrainer(
        str(folder / "base"), ContinualConfig(**toy.settings(folder / "out", max_steps=20, learning_rate=3e-2)),
        train_dataset=toy.rows("prompt_completion", number=8), processing_class=toy.tokenizer(),
        methods=[TRAINED[request.param]()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return request.param, folder, trainer


def loaded(made):
    kind, folder, _ = made
    return getattr(hf_continual, NAMES[kind].loader)(folder / "out")


def ran(capsys, *words):
    code, out, err = typed(" ".join(map(str, words)), capsys)
    assert code == 0, err
    return json.loads(out)


def padded(rows, left=True):
    width = max(map(len, rows))
    fill = [[0] * (width - len(r)) for r in rows]
    ids = [f + r if left else r + f for f, r in zip(fill, rows, strict=True)]
    mask = [f + [1] * len(r) if left else [1] * len(r) + f for f, r in zip(fill, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


ROWS = [[5, 9, 12], [30, 8, 41, 7, 22, 19, 4], [11, 45, 33, 27, 6, 50, 13, 29, 38, 16, 52, 21]]


def test_the_registry_and_the_names_agree(made):
    kind, folder, trainer = made
    assert set(NAMES) == set(KINDS) == set(TRAINED)
    assert kind_in(folder / "out") == kind == kind_of(trainer.model) and kind_in(folder / "base") is None
    assert all(callable(getattr(hf_continual, named.loader)) for named in NAMES.values())


def test_the_folder_holds_one_json_and_only_what_was_trained(made):
    kind, folder, trainer = made
    config = read_json(folder / "out" / "adapter_config.json")
    assert config["peft_type"] == kind and config["base_model_name_or_path"] == str(folder / "base")
    assert len(config["base_sample"]) == 32
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trainer.run.named_parameters().values())
    assert not list((folder / "out").glob("model*.safetensors")) and not (folder / "out" / ".parts").exists()


def test_loaded_is_what_was_trained(made):
    _, _, trainer = made
    model, (ids, mask) = loaded(made), padded(ROWS, left=False)
    with torch.no_grad():
        ours, live = (m.eval()(input_ids=ids, attention_mask=mask).logits for m in (model, trainer.model))
    assert torch.equal(ours, live) and ours.shape[:2] == ids.shape
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
def test_a_batch_padded_on_the_left_gives_each_row_its_own_answer(made, how):
    model, (ids, mask) = loaded(made), padded(ROWS)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)
    each = how.get("num_return_sequences", 1)
    for b, row in enumerate(ROWS):
        alone = model.generate(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)).long(), **options)
        assert torch.equal(together[b * each : (b + 1) * each, ids.shape[1] :], alone[:, len(row) :])
        if not how:  # step by step, all tokens anew, the question alone choosing
            tokens = torch.tensor([row])
            for _ in range(8):
                with asked(model, torch.arange(tokens.shape[1])[None] < len(row)), torch.no_grad():
                    chosen = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, chosen], 1)
            assert torch.equal(tokens, alone)


def test_evaluation_agrees_with_generation(made):
    """The library's own loop, teacher forcing and likelihoods go through parts of the model and not through its forward."""
    model, tokenizer = loaded(made), toy.tokenizer()
    rows = toy.rows("prompt_completion", number=8)
    outs = greedy(model, tokenizer, ROWS, [6, 2, 8], batch_size=3, ends=[])
    for row, limit, out in zip(ROWS, (6, 2, 8), outs, strict=True):
        ids = torch.tensor([row])
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        assert out.tokens == alone[0, len(row) :].tolist()
    forced, said = teacher_forced(model, tokenizer, rows), generated(model, tokenizer, rows)
    assert [r.score for r in forced.rows] == [r.score for r in said.rows]
    pairs = [[([5, 9, 12], [7, 8]), ([5, 9, 12], [40])], [([30, 8], [9, 9, 9]), ([30, 8], [4])]]
    shared, whole = (log_likelihoods(model, tokenizer, pairs, share_prompt=s) for s in (True, False))
    assert [v for r in shared for v, _ in r] == pytest.approx([v for r in whole for v, _ in r], abs=1e-4)


def test_sentences(made, tmp_path):
    kind, folder, _ = made
    model = loaded(made)
    ids = torch.tensor([[5, 9, 12]])
    with pytest.raises(ValueError, match="has different weights: the modules are useless there"):
        load_kind(folder / "out", toy.model(seed=5))
    with pytest.raises(ValueError, match="does not hold .*its adapter_config.json says None"):
        load_kind(folder / "base", kind=kind)
    with pytest.raises(FileNotFoundError, match="the folder ./gone does not exist"):
        load_prompt_pool("./gone")
    with pytest.raises(ValueError, match="cannot be merged into weights"):
        model.merge_and_unload()
    cache = DynamicCache(config=model.config)
    model.get_base_model()(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"a cache with \d+ tokens .*Leave past_key_values out"):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("place", ["member", "base"])
def test_every_merge_refuses_it(made, tmp_path, method, place):
    kind, folder, _ = made
    models, base = [str(folder / "base"), str(folder / "out")], str(folder / "base")
    if place == "base":
        models, base = [str(folder / "base")] * 2, str(folder / "out")
    if method == "interpolate":  # of a base and one model
        models = models[1:]
    needed = {
        "recall": {"calibration": toy.rows()},
        "kif": {"calibration_old": toy.rows(), "calibration_new": toy.rows()},
    }
    needed["interpolate"] = {"alpha": 0.5}
    with pytest.raises(
        MergeError, match=rf"out is {NAMES[kind].title} \({kind}\), .*cannot be merged.*{NAMES[kind].loader}"
    ):
        merge(method, models, tmp_path / "merged", base=base, **needed.get(method, {}))
    assert not (tmp_path / "merged").exists()


def test_score_and_chat(made, tmp_path, capsys):
    _, folder, trainer = made
    toy.rows("prompt_completion", number=8).to_json(tmp_path / "test.jsonl")
    said = ran(capsys, "score", folder / "out", "--test", tmp_path / "test.jsonl", "--json")
    ours = teacher_forced(trainer.model, toy.tokenizer(), toy.rows("prompt_completion", number=8))
    assert said["value"] == pytest.approx(sum(r.score for r in ours.rows) / 8)
    said = ran(capsys, "chat", folder / "out", "--prompt", "'w1 w2'", "--max-new-tokens", 4, "--json")
    assert said["prompt"] == "w1 w2" and isinstance(said["answer"], str)


def test_the_card_of_a_saved_run(made):
    kind, folder, _ = made
    text = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert f"from hf_continual import {NAMES[kind].loader}" in text and "AutoPeft" not in text
    # A base in a folder is what its findings may be about; nothing else is.
    assert all("base_model" in str(f) or "path" in str(f) for f in lint_card(text)), lint_card(text)


def test_a_plan_trains_hands_over_scores_and_resumes(made, tmp_path, monkeypatch):
    kind, _, _ = made
    method = {NAMES[kind].method: {k: v for k, v in TRAINED[kind]().describe().items() if k != "name"}}
    plan = world.make(tmp_path, methods=[method], sft={**world.SFT, "max_steps": 6})
    straight = train_stream({**plan, "output_dir": str(tmp_path / "straight")})
    folders = [f"task-0{i}-t{i}" for i in range(3)]
    assert [kind_in(tmp_path / "straight" / f) for f in folders] == [kind] * 3
    save = ContinualTrainer._save_checkpoint

    class Killed(Exception):
        pass

    def dies(self, *args):
        save(self, *args)
        if self.run.task.name == "t1" and self.state.global_step == 4:
            raise Killed

    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", dies)
    with pytest.raises(Killed):
        train_stream(plan)
    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", save)
    resumed = train_stream(plan)
    assert resumed.matrix == straight.matrix
    for name in folders:
        one, two = (world.adapter(tmp_path / run / name) for run in ("straight", "out"))
        assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
    last = tmp_path / "out" / folders[2]
    base = AutoModelForCausalLM.from_pretrained(plan["model"])
    ours = teacher_forced(load_kind(last, base), toy.tokenizer(), toy.rows("prompt_completion", number=8, seed=2))
    assert straight.matrix.score(2, 2) == pytest.approx(sum(r.score for r in ours.rows) / 8)
    config = json.loads((last / "continual_config.json").read_text())
    assert config["adapter"]["kind"] == kind and config["kind"] == "adapter"


def test_what_a_plan_cannot_combine_with_it(made, tmp_path):
    kind, _, _ = made
    name = NAMES[kind].method
    for changes, said in (
        ({"peft": {"r": 2}}, f"the method '{name}' supplies the modules that it trains, but peft asks for others"),
        ({"between_tasks": "new_adapter"}, "trains them further in each task. Say between_tasks: continue"),
        ({"between_tasks": {"merge": "linear"}}, "cannot be merged. Say between_tasks: continue"),
    ):
        with pytest.raises(PlanError, match=said):
            train_stream(world.make(tmp_path, methods=[name], **changes))


def test_a_dry_run_counts_the_pool_and_not_the_model(made, tmp_path, capsys):
    kind, _, trainer = made
    method = {NAMES[kind].method: {k: v for k, v in TRAINED[kind]().describe().items() if k != "name"}}
    file = world.write(tmp_path, world.make(tmp_path, methods=[method]))
    said = ran(capsys, "run", file, "--dry-run", "--json")["runs"][0]
    trained = sum(p.numel() for p in trainer.run.named_parameters().values())
    assert {t["trainable"] for t in said["tasks"]} == {trained}
    assert {t["disk_bytes"] for t in said["tasks"]} == {4.0 * trained}


def test_one_forward_tells_the_tuner_of_every_wrapper(made):
    _, _, trainer = made
    assert tuner_of(trainer.model) is not None and tuner_of(toy.model()) is None
    assert Path(trainer.args.output_dir).is_dir()
