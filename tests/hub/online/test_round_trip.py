"""Push, then pull into an empty cache with plain transformers and PEFT: tensors, tokenizer and logits bit for bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_continual import (
    L2P,
    AccuracyMatrix,
    ContinualConfig,
    ContinualTrainer,
    FreezeLayers,
    HubPushError,
    Replay,
    load_prompt_pool,
    push_to_hub,
    render_card,
)
from hf_continual.hub.facts import CardFacts, Evaluation, GaugeFacts, MergeFacts
from hf_continual.hub.files import write_card
from hf_continual.hub.lint import lint_folder
from hf_continual.hub.refs import ModelRef
from tests import toy
from tests.hub.plugin import HUB
from tests.hub.server import TOKEN

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
MEASURED = Evaluation(("law",), ((0.625,),), (0.25,), "exact match", rows={"law": 8})


@pytest.fixture
def base(hub, tmp_path):
    """A base model on the Hub, and in a folder."""
    toy.model().save_pretrained(tmp_path / "base")
    toy.tokenizer().save_pretrained(tmp_path / "base")
    HUB.make("org/base")
    files = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    HUB.put("org/base", {**files, "README.md": b"---\nlicense: mit\n---\n"})
    return "org/base"


def trainer(model, out, peft=False, methods=(), **settings):
    return ContinualTrainer(
        model, ContinualConfig(**toy.settings(out, push_to_hub=True, hub_model_id="me/m", task_name="law", **settings)),
        train_dataset=toy.rows("prompt_completion"), processing_class=toy.tokenizer(),
        peft_config=LoraConfig(**LORA) if peft else None, methods=methods,
    )  # fmt: skip


def ids():
    return (torch.arange(1, 17) * 7 % 60).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return (
            type(model).forward(model.eval(), input_ids=ids()).logits
            if not isinstance(model, PeftModel)
            else model.eval()(ids()).logits
        )


def pulled(tmp_path, repo_id="me/m"):
    """A snapshot in an empty cache."""
    return snapshot_download(repo_id, cache_dir=tmp_path / "empty")


def content(repo_id="me/m"):
    return HUB.repos[repo_id].content_commits()


def same_bytes(folder, there):
    for file in Path(there).iterdir():
        if file.is_file() and file.name != ".gitattributes":
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def text(there, name):
    return (Path(there) / name).read_text(encoding="utf-8")


def run_snippet(card, tmp_path):
    """The card's own code, in a process with an empty cache and without this library's test plugin."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN",)}
    env |= {"HF_HOME": str(tmp_path / "clean"), "HF_ENDPOINT": HUB.url, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def nothing_leaked(repo_id="me/m"):
    for commit in HUB.repos[repo_id].commits.values():
        for name, (data, _) in commit.tree.items():
            assert TOKEN.encode() not in data, name
            assert not name.endswith((".bin", ".pt", ".pth")), name
    assert len(HUB.uploaded()) == len(set(HUB.uploaded()))


def test_a_full_model(base, tmp_path):
    t = trainer(
        base,
        tmp_path / "out",
        methods=[FreezeLayers(bottom=1), Replay(toy.rows("prompt_completion", seed=9), ratio=0.1)],
        hub_token=TOKEN,
    )
    t.train()
    done = t.push_to_hub(evaluation=MEASURED, tag="task-1")
    assert len(content()) == 1 and HUB.repos["me/m"].tags == {"task-1": done.oid}
    live, there = t.accelerator.unwrap_model(t.model), pulled(tmp_path)
    model, tok = AutoModelForCausalLM.from_pretrained(there), AutoTokenizer.from_pretrained(there)
    assert all(torch.equal(p, dict(live.named_parameters())[n].detach()) for n, p in model.named_parameters())
    assert torch.equal(logits(model), logits(live))
    own = toy.tokenizer()
    assert (
        tok.get_vocab() == own.get_vocab()
        and tok.chat_template == own.chat_template
        and tok("w1 w5 w9") == own("w1 w5 w9")
    )
    same_bytes(tmp_path / "out", there)
    nothing_leaked()
    card = text(there, "README.md")
    for said in ("base_model: org/base", "base_model_relation: finetune", "library_name: transformers", "license: mit",
                 "- freeze", "- replay", "arxiv.org/abs/2501.13453", "**freeze**", "bottom=1", "0.6250"):  # fmt: skip
        assert said in card, said
    assert not lint_folder(tmp_path / "out")
    assert (tmp_path / "out" / "training_args.bin").is_file()
    again = t.push_to_hub(evaluation=MEASURED)
    assert not again.new and len(content()) == 1
    run_snippet(card, tmp_path)


def test_an_adapter(base, tmp_path):
    t = trainer(base, tmp_path / "out", peft=True)
    t.train()
    t.push_to_hub(evaluation=MEASURED)
    assert len(content()) == 1
    there = pulled(tmp_path)
    config = json.loads(text(there, "adapter_config.json"))
    assert config["base_model_name_or_path"] == "org/base" and config["revision"] == HUB.repos["org/base"].head().sha
    model = AutoPeftModelForCausalLM.from_pretrained("me/m", cache_dir=str(tmp_path / "empty2"))
    live = t.accelerator.unwrap_model(t.model)
    del live.get_base_model().forward  # TRL's fused head answers without logits
    assert torch.equal(logits(model), logits(live))
    saved = load_file(os.path.join(there, "adapter_model.safetensors"))
    own = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved.keys() == own.keys() and all(torch.equal(saved[k], own[k]) for k in own)
    same_bytes(tmp_path / "out", there)
    nothing_leaked()
    card = text(there, "README.md")
    for said in (
        "base_model: org/base",
        "base_model_relation: adapter",
        "library_name: peft",
        "license: mit",
        "- lora",
    ):
        assert said in card, said
    run_snippet(card, tmp_path)


def test_a_prompt_pool(base, tmp_path):
    """What changes inference, loaded by the loader that its card names, from the Hub and onto the base of the Hub."""
    with pytest.raises(
        HubPushError, match=r"not published: nobody could load it\. Publish that model first .*hub_base_model"
    ):
        trainer(str(tmp_path / "base"), tmp_path / "local", methods=[L2P(pool=4, length=2, top=2)])
    t = trainer(base, tmp_path / "out", methods=[L2P(pool=4, length=2, top=2)])
    t.train()
    t.push_to_hub(evaluation=MEASURED)
    assert len(content()) == 1
    there = pulled(tmp_path)
    assert json.loads(text(there, "adapter_config.json"))["base_model_name_or_path"] == "org/base"
    live = t.accelerator.unwrap_model(t.model)
    del live.get_base_model().forward  # TRL's fused head answers without logits
    assert torch.equal(logits(load_prompt_pool("me/m")), logits(live))
    same_bytes(tmp_path / "out", there)
    nothing_leaked()
    card = text(there, "README.md")
    for said in (
        "base_model: org/base",
        "base_model_relation: adapter",
        "A prompt pool for a frozen",
        "load_prompt_pool",
    ):
        assert said in card, said
    assert "LoRA" not in card and "- lora" not in card and not lint_folder(tmp_path / "out")
    run_snippet(card, tmp_path)


def test_refusals_come_before_the_first_step(base, tmp_path):
    local = str(tmp_path / "base")
    with pytest.raises(
        HubPushError, match="adapter on base, which is not published.*push the full model.*hub_base_model"
    ):
        trainer(local, tmp_path / "a", peft=True)
    with pytest.raises(HubPushError, match="org/gone is named as a base"):
        trainer(local, tmp_path / "b", peft=True, hub_base_model="org/gone")
    HUB.make("me/m")
    with pytest.raises(HubPushError, match="private=True was requested"):
        trainer(base, tmp_path / "c", hub_private_repo=True)
    HUB.fault("GET", "/auth-check", status=403, times=10)
    with pytest.raises(HubPushError, match="403"):
        trainer(base, tmp_path / "e")
    HUB.faults.clear()
    with pytest.raises(HubPushError, match="401.*the token given as an argument"):
        trainer(base, tmp_path / "f", hub_token="hf_" + "y" * 30)
    with pytest.raises(ValueError, match="hub_strategy='checkpoint' publishes optimizer and random states"):
        trainer(base, tmp_path / "g", hub_strategy="checkpoint")
    assert not content()
    t = trainer(local, tmp_path / "h", peft=True, hub_base_model="org/base")
    t.train()
    t.push_to_hub()
    assert AutoPeftModelForCausalLM.from_pretrained("me/m", cache_dir=str(tmp_path / "empty"))


@pytest.mark.parametrize("fault", ["403", "429", "cut", "lost"])
def test_a_push_after_training_that_fails_can_be_made_again(base, tmp_path, fault):
    t = trainer(base, tmp_path / "out")
    t.train()
    options = {
        "403": dict(status=403),
        "429": dict(status=429),
        "cut": dict(kind="cut"),
        "lost": dict(kind="lost", times=1),
    }[fault]
    broken = HUB.fault(
        "PUT" if fault == "cut" else "POST",
        "/lfs-storage" if fault == "cut" else "/commit/",
        **{"times": 999, **options},
    )
    if fault == "lost":
        t.push_to_hub()
    else:
        with pytest.raises(HubPushError) as raised:
            t.push_to_hub()
        assert str(tmp_path / "out") in str(raised.value) and raised.value.resume.startswith("hf-continual push")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(t.model))
        broken.times = 0
        push_to_hub(tmp_path / "out", "me/m")
    assert len(content()) == 1
    nothing_leaked()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(pulled(tmp_path))), logits(t.model))


def test_checkpoints(base, tmp_path, caplog):
    t = trainer(
        base,
        tmp_path / "out",
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        hub_always_push=True,
        save_total_limit=1,
    )
    t.train()
    messages = [c.message for c in content()]
    assert messages[-1] == "End of training" and 2 <= len(messages) <= 4
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(pulled(tmp_path))), logits(t.model))
    assert not list((tmp_path / "out").glob(".push-*")) and not t.publisher.pushes.failures
    t.push_to_hub()
    assert len(content()) == len(messages)
    nothing_leaked()


def test_failed_checkpoint_pushes_are_told(base, tmp_path, caplog):
    t = trainer(base, tmp_path / "out", save_strategy="steps", save_steps=2, max_steps=4)
    broken = HUB.fault("POST", "/commit/", status=403, error="protected", times=999)
    with pytest.raises(HubPushError, match="403.*protected"):
        t.train()
    assert t.state.global_step == 4 and "the push of step 2 failed: me/m was not pushed: 403" in caplog.text
    assert [step for step, _ in t.publisher.pushes.failures] == [2] and not content()
    broken.times = 0
    t.push_to_hub()
    assert len(content()) == 1


def test_stages_are_lineage(base, tmp_path):
    """A second stage trained from the first's folder names the first's repository as its parent."""
    first = trainer(base, tmp_path / "one")
    first.train()
    first.push_to_hub()
    sha = HUB.repos["me/m"].head().sha
    config = ContinualConfig(**toy.settings(tmp_path / "two", push_to_hub=True, hub_model_id="me/two", task_name="tax"))
    second = ContinualTrainer(
        str(tmp_path / "one"),
        config,
        train_dataset=toy.rows("prompt_completion", seed=3),
        processing_class=toy.tokenizer(),
    )
    second.train()
    second.push_to_hub()
    card = HUB.repos["me/two"].head().tree["README.md"][0].decode()
    assert "base_model: me/m\nbase_model_relation: finetune" in card
    assert "learnt 2 tasks one after the other (law, tax), starting from [org/base]" in card
    assert f"[me/m](https://huggingface.co/me/m) ({sha[:7]})" in card and "the licence of org/base and me/m" in card


def test_a_merge(base, tmp_path):
    models = []
    for i in (1, 2):
        toy.model(i).save_pretrained(tmp_path / f"m{i}")
        HUB.put(
            f"org/m{i}",
            {p.name: p.read_bytes() for p in (tmp_path / f"m{i}").iterdir()}
            | {"README.md": b"---\nlicense: mit\n---\n"},
        )
        models.append(load_file(tmp_path / f"m{i}" / "model.safetensors"))
    merged = tmp_path / "merged"
    toy.model().save_pretrained(merged)
    toy.tokenizer().save_pretrained(merged)
    save_file(
        {k: 0.25 * models[0][k] + 0.75 * models[1][k] for k in models[0]},
        merged / "model.safetensors",
        metadata={"format": "pt"},
    )
    inputs = (ModelRef("org/m1"), ModelRef("org/m2"), ModelRef(name="mine"))
    facts = CardFacts(
        "merged", base=ModelRef("org/base"), merge=MergeFacts("recall", inputs, {"seed": 0}, weights={"layer.0": [0.25, 0.75, 0.0]}),
        evaluation=Evaluation(("law", "tax"), ((0.5, 0.75),), (0.25, 0.125), "exact match", row_names=("merged",),
                              gauges=(GaugeFacts("general text", 3.5, 3.625, True, "nats per token", 100),)),
    )  # fmt: skip
    write_card(merged, facts)
    with pytest.raises(HubPushError, match="license='none' is not a licence id of the Hub"):
        push_to_hub(merged, "me/merged", license="none")
    push_to_hub(merged, "me/merged")
    assert len(content("me/merged")) == 1
    there = pulled(tmp_path, "me/merged")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(there)), logits(AutoModelForCausalLM.from_pretrained(merged))
    )
    card = text(there, "README.md")
    for said in ("base_model:\n- org/base\n- org/m1\n- org/m2\n", "base_model_relation: merge", "- merge\n- recall", "mine (local, not published)",
                 "| merged | 0.5000 | 0.7500 |", "+0.1250", "the licence of mine is not stated"):  # fmt: skip
        assert said in card, said
    broken = load_file(merged / "model.safetensors")
    broken["model.norm.weight"][0] = float("nan")
    save_file(broken, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubPushError, match=r"holds NaN or infinity in model.norm.weight"):
        push_to_hub(merged, "me/merged")
    del broken["model.norm.weight"]
    save_file(broken, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubPushError, match=r"missing keys: model.norm.weight"):
        push_to_hub(merged, "me/merged")
    assert len(content("me/merged")) == 1


def test_the_figures_are_those_of_the_matrix(base, tmp_path):
    folder = tmp_path / "base"
    evaluation = Evaluation(
        ("a", "b", "c"), ((0.8, 0.1), (0.6, 0.9, None), (0.5, 0.7, 2 / 3)), (0.0, 0.1, 0.2), "accuracy"
    )
    write_card(folder, CardFacts("x", base=ModelRef("org/base"), evaluation=evaluation))
    push_to_hub(folder, "me/m")
    there = pulled(tmp_path)
    results = json.loads(text(there, "continual_results.json"))
    m = AccuracyMatrix(results["matrix"], results["base_row"])
    assert (
        results["op"] == m.overall_performance
        and results["bwt"] == m.backward_transfer
        and results["forgetting"] == m.forgetting
    )
    assert results["fwt"] is None and "| FWT | NOT_RUN |" in render_card(folder)
    index = HfApi().model_info("me/m").card_data.eval_results
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in index}
    assert found["c", "accuracy"] == 2 / 3 and found["a, b, c", "bwt"] == m.backward_transfer
