"""merge_with_recall(push_to_hub=...): pushed in one commit, pulled from an empty cache, the same bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_continual import HubPushError, kif_fuse, merge_linear, merge_with_recall, push_to_hub, scan_alpha
from hf_continual.hub.lint import lint_folder
from hf_continual.merging.errors import MergeError
from tests import toy
from tests.hub.plugin import HUB
from tests.merging import world


@pytest.fixture
def experts(hub, tmp_path):
    """Base and two experts, on the Hub and in folders."""
    base = world.build()
    for name, model in (("base", base), ("law", world.tuned(base, 1)), ("tax", world.tuned(base, 2))):
        model.save_pretrained(tmp_path / name)
        toy.tokenizer().save_pretrained(tmp_path / name)
        files = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        HUB.put(f"org/{name}", files | {"README.md": b"---\nlicense: mit\n---\n"})
    return tmp_path


def test_recall(experts):
    out, texts = experts / "merged", [row["text"] for row in toy.rows(number=24)]
    options = dict(base="org/base", calibration=texts, num_typical=4, device="cpu", progress=False)
    HUB.fault("POST", "/commit/", status=503)
    merge_with_recall(["org/law", "org/tax"], out, push_to_hub="me/merged", **options)
    repo = HUB.repos["me/merged"]
    assert len(repo.content_commits()) == 1 and not lint_folder(out)
    there = Path(snapshot_download("me/merged", cache_dir=experts / "empty"))
    ids = (torch.arange(1, 17) * 7 % 60).unsqueeze(0)
    with torch.no_grad():
        mine, theirs = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (out, there))
    assert torch.equal(mine, theirs)
    assert AutoTokenizer.from_pretrained(there).get_vocab() == toy.tokenizer().get_vocab()
    for file in there.rglob("*"):
        if file.is_file() and file.name != ".gitattributes":
            assert file.read_bytes() == (out / file.relative_to(there)).read_bytes(), file.name
    card = (there / "README.md").read_text()
    sha = HUB.repos["org/law"].head().sha
    for said in ("base_model:\n- org/base\n- org/law\n- org/tax\n", "base_model_relation: merge", "license: mit", "2510.20479",
                 f"({sha[:7]})", "(recall_weights.png)", "(recall_report.json)", "NOT_RUN"):  # fmt: skip
        assert said in card, said
    weights = json.loads((there / "continual_config.json").read_text())["merge"]["weights"]
    assert weights == json.loads((there / "recall_report.json").read_text())["weights"]
    assert push_to_hub(out, "me/merged").new is False and len(repo.content_commits()) == 1
    HUB.make("you/m")
    with pytest.raises(HubPushError, match="403"):
        merge_with_recall(["org/law", "org/tax"], experts / "other", push_to_hub="you/m", **options)
    assert not (experts / "other").exists()


def test_the_repository_is_checked_before_the_merge(experts):
    HUB.make("you/m")
    with pytest.raises(HubPushError, match="403"):
        merge_linear([experts / "law", experts / "tax"], experts / "out", push_to_hub="you/m", progress=False)
    assert not (experts / "out").exists()


def test_private_license_and_token(experts, monkeypatch):
    law, tax = experts / "law", experts / "tax"
    (law / "README.md").write_text("---\nlicense: mit\n---\n")
    (tax / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    call = {"push_to_hub": "me/secret", "progress": False}
    with pytest.raises(MergeError, match=r"to be published, and the parents have different licences \(.*license='...'"):
        merge_linear([law, tax], experts / "out", **call)
    with pytest.raises(ValueError, match="license='none' is not a licence id of the Hub"):
        merge_linear([law, tax], experts / "out", **call, license="none")
    with pytest.raises(ValueError, match="private=True applies only with push_to_hub="):
        merge_linear([law, tax], experts / "out", private=True)
    assert not (experts / "out").exists()
    token = os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubPushError, match="there is no access token"):
        merge_linear([law, tax], experts / "out", **call, license="apache-2.0")
    options = {"private": True, "token": token, "license": "apache-2.0"}
    result = merge_with_recall([law, tax], experts / "out", weights={"default": [0.5, 0.5]}, **call, **options)
    repo = HUB.repos["me/secret"]
    assert repo.private and len(repo.content_commits()) == 1
    assert result.url is not None and result.url.endswith(repo.content_commits()[0].sha)
    assert b"license: apache-2.0" in repo.head().tree["README.md"][0]
    assert not any(token.encode() in data for data, *_ in repo.head().tree.values())
    with pytest.raises(HubPushError, match="private=False was requested"):
        merge_linear([law, tax], experts / "other", **call, private=False, token=token, license="mit")
    assert not (experts / "other").exists()
    merge_linear([law, tax], experts / "local", license="mit", progress=False)
    assert "license: mit" in (experts / "local" / "README.md").read_text()


def test_a_scan_publishes_the_best_only(experts):
    _, scores = scan_alpha(
        experts / "base", experts / "law", experts / "best", lambda f: f.stat().st_mtime, alphas=(0.25, 0.75),
        push_to_hub="me/best", progress=False,
    )  # fmt: skip
    assert max(scores, key=scores.__getitem__) == 0.75 and len(HUB.repos["me/best"].content_commits()) == 1
    HUB.make("you/m")
    asked = []
    with pytest.raises(HubPushError, match="403"):
        scan_alpha(experts / "base", experts / "law", experts / "no", asked.append, push_to_hub="you/m")
    (experts / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (experts / "law" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with pytest.raises(MergeError, match="different licences"):
        scan_alpha(experts / "base", experts / "law", experts / "no", asked.append, push_to_hub="me/no")
    assert not asked and "me/no" not in HUB.repos


def test_nothing_is_made_for_a_merge_that_cannot_be(experts):
    law, tax = experts / "law", experts / "tax"
    (experts / "used").mkdir()
    (experts / "used" / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        merge_linear([law, tax], experts / "used", push_to_hub="me/used", progress=False)
    for place, name in (("p", "mit"), ("q", "apache-2.0")):
        shutil.copytree(law, experts / place / "final")
        (experts / place / "final" / "README.md").write_text(f"---\nlicense: {name}\n---\n")
    with pytest.warns(UserWarning, match="the same weights"), pytest.raises(MergeError, match="different licences"):
        merge_linear(
            [experts / "p" / "final", experts / "q" / "final"], experts / "o", push_to_hub="me/o", progress=False
        )
    base = AutoModelForCausalLM.from_pretrained(experts / "base")
    a = world.adapter(base, experts / "a", 1)
    config = json.loads((a / "adapter_config.json").read_text())
    (a / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(experts / "base")}))
    with pytest.raises(MergeError, match="the result is an adapter on .*base', which is not published"):
        merge_linear([a], experts / "o", base=experts / "base", push_to_hub="me/o", progress=False)
    assert not {"me/used", "me/o"} & HUB.repos.keys() and not (experts / "o").exists()


def test_an_adapter_of_adapters(experts):
    from peft import LoraConfig, get_peft_model

    for i in (1, 2):
        torch.manual_seed(i)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained("org/base"),
            LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
        model.save_pretrained(experts / f"a{i}")
        toy.tokenizer().save_pretrained(experts / f"a{i}")
    merge_linear([experts / "a1", experts / "a2"], experts / "out", base="org/base", push_to_hub="me/a", progress=False)
    model = AutoPeftModelForCausalLM.from_pretrained("me/a", cache_dir=str(experts / "empty"))
    own = AutoPeftModelForCausalLM.from_pretrained(experts / "out")
    ids = (torch.arange(1, 17) * 7 % 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own(ids).logits)
    card = HUB.repos["me/a"].head().tree["README.md"][0].decode()
    assert (
        "base_model: org/base\nbase_model_relation: adapter" in card and len(HUB.repos["me/a"].content_commits()) == 1
    )


def test_kif_fuse(experts):
    out, rows = experts / "fused", list(toy.rows(number=8))
    options = dict(calibration_new=rows, calibration_old=rows, device="cpu", progress=False)
    HUB.make("you/m")
    with pytest.raises(HubPushError, match="403"):
        kif_fuse("org/base", "org/tax", out, old="org/law", push_to_hub="you/m", **options)
    assert not out.exists()
    kif_fuse("org/base", "org/tax", out, old="org/law", push_to_hub="me/fused", **options)
    repo = HUB.repos["me/fused"]
    assert len(repo.content_commits()) == 1 and not lint_folder(out)
    there = Path(snapshot_download("me/fused", cache_dir=experts / "empty"))
    ids = (torch.arange(1, 17) * 7 % 60).unsqueeze(0)
    with torch.no_grad():
        mine, theirs = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (out, there))
    assert torch.equal(mine, theirs) and torch.isfinite(mine).all()
    for file in there.rglob("*"):
        if file.is_file() and file.name != ".gitattributes":
            assert file.read_bytes() == (out / file.relative_to(there)).read_bytes(), file.name
    card = (there / "README.md").read_text()
    for said in ("base_model:\n- org/base\n- org/tax\n- org/law\n", "base_model_relation: merge", "license: mit", "2502.17510",
                 "kif_report.json", "(kif_sides.png)"):  # fmt: skip
        assert said in card, said
