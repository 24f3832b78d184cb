"""The evidence of a merge: report, heat map, plan; calibration that anyone can repeat."""

from __future__ import annotations

import hashlib
import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from matplotlib.image import imread
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_continual import interpolate, merge_linear, merge_with_recall
from hf_continual.merging import pipeline
from hf_continual.merging.inputs.members import open_members
from hf_continual.merging.inputs.run_model import Setting, loaded, representations, token_ids
from hf_continual.merging.methods.recall import weights as recall_weights
from hf_continual.merging.methods.recall.similarity import layer_weights
from hf_continual.merging.methods.recall.typical_samples import typical_samples
from tests import toy
from tests.merging.world import CONFIGS, adapter, build, digest, family, save, tensors, tuned

ROWS = [
    {"input_ids": torch.randint(4, 60, (4 + i % 7,), generator=torch.Generator().manual_seed(i)).tolist()}
    for i in range(30)
]
GROUPS = ("embed", "layer.0", "layer.1", "layer.2", "final")


@pytest.mark.parametrize("name", CONFIGS)
def test_recall_on_every_family_and_again_from_its_report(tmp_path, name):
    _, a, b = family(tmp_path, name)
    result = merge_with_recall([a, b], tmp_path / "out", calibration=ROWS, num_typical=6)
    assert result.groups == GROUPS and result.weights.shape == (2, 5) and result.anchor == 1
    np.testing.assert_allclose(result.weights.sum(axis=0), 1)
    assert (result.weights[1] >= 0.5).all() and (result.similarity[1] == 1).all()
    one, two = tensors(a), tensors(b)
    embedding = next(n for n in one if "embed_tokens" in n or "wte" in n)
    deep = next(n for n in one if ("layers.2." in n or "h.2." in n) and one[n].dim() == 2)
    for tensor, group in ((embedding, 0), (deep, 3)):
        weight = result.weights[1, group]
        merged = tensors(tmp_path / "out")[tensor].double()
        torch.testing.assert_close(
            merged, one[tensor].double() * (1 - weight) + two[tensor].double() * weight, rtol=0, atol=1e-6
        )
    again = merge_with_recall([a, b], tmp_path / "again", weights=tmp_path / "out" / "recall_report.json")
    assert digest(tmp_path / "out") == digest(tmp_path / "again")
    assert np.array_equal(again.weights, result.weights) and again.similarity is None


def test_the_report_is_complete_and_holds_no_paths_and_no_texts(tmp_path, as_users):
    base = build()
    save(base, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    a, b = adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2, use_rslora=True)
    texts = [r["text"] for r in toy.rows("text", number=12)]
    result = merge_with_recall([a, b], tmp_path / "out", base=tmp_path / "base", calibration=texts, num_typical=4)
    text = (tmp_path / "out" / "recall_report.json").read_text()
    report = json.loads(text)
    assert str(tmp_path) not in text and not any(t in text for t in texts)
    assert [m["role"] for m in report["models"]] == ["base", "model 0", "model 1"]
    assert report["models"][0]["license"] == "apache-2.0" and report["models"][2]["rslora"]
    assert len({m["fingerprint"] for m in report["models"]}) == 3
    assert report["anchor"] == "b" and report["mode"] == "joint" and report["options"]["bandwidth"] == "anchor_spread"
    assert list(report["weights"]) == list(GROUPS) and report["groups"] == list(GROUPS)
    assert len(report["typical_samples"]) == 4
    for sample in report["typical_samples"]:
        ids = toy.tokenizer()(texts[sample["index"]])["input_ids"]
        assert sample["ids_sha256"] == hashlib.sha256(json.dumps(ids).encode()).hexdigest() and sample["tokens"] == len(
            ids
        )
    assert report["files"] == {
        n: {"size": (tmp_path / "out" / n).stat().st_size, "xxh3_128": h} for n, h in digest(tmp_path / "out").items()
    }
    assert result.report["paper"]["url"] == "https://arxiv.org/abs/2510.20479"
    picture = imread(tmp_path / "out" / "recall_weights.png")
    assert picture.shape[0] > 100 and picture.std() > 0.05
    running = merge_with_recall([tmp_path / "out", b], tmp_path / "next", base=tmp_path / "base", calibration=texts)
    assert running.report["mode"] == "running" and running.rank == 12


def test_one_expert_is_merged_with_its_base_and_equals_interpolation(tmp_path):
    base, a, _ = family(tmp_path)
    result = merge_with_recall([a], tmp_path / "out", base=base, calibration=ROWS, nonblock="anchor")
    assert result.model_names == ("base", "m1") and result.anchor == 1
    assert result.weights[:, 0].tolist() == [0, 1] and result.weights[:, -1].tolist() == [0, 1]
    weights = {"default": [0.4, 0.6]}
    merge_with_recall([a], tmp_path / "recall", base=base, weights=weights)
    interpolate(base, a, tmp_path / "line", alpha=0.6)
    assert digest(tmp_path / "recall") == digest(tmp_path / "line")
    alone = merge_with_recall([a], tmp_path / "b", base=base, calibration=ROWS, nonblock="base")
    assert (
        alone.weights[:, 0].tolist() == [1, 0]
        and (tensors(tmp_path / "b")["model.norm.weight"] == tensors(base)["model.norm.weight"]).all()
    )


def test_representations_are_token_means_at_the_right_places(tmp_path):
    """Against transformers' own hidden states: before block 0, after each block, after the final norm."""
    base = build()
    texts = [r["input_ids"] for r in ROWS[:5]]
    found = representations(base, texts)
    for k, ids in enumerate(texts):
        with torch.no_grad():
            out = base(torch.tensor([ids]), output_hidden_states=True)
            states = [h[0].mean(0) for h in out.hidden_states]
        for group in range(3):  # embedding and the blocks before the last
            np.testing.assert_allclose(found[group, k], states[group], atol=1e-5)
        np.testing.assert_allclose(found[4, k], states[3], atol=1e-5)  # transformers' last state has passed the norm
        assert np.abs(found[3, k] - states[3].numpy()).max() > 1e-2
    together = representations(base, texts, batch_size=5)
    np.testing.assert_allclose(together, found, atol=1e-5)


def test_weights_are_those_of_the_representations(tmp_path):
    base = build()
    save(base, tmp_path / "base")
    folders = [adapter(base, tmp_path / n, i) for i, n in enumerate("ab", 1)] + [save(tuned(base, 3), tmp_path / "c")]
    result = merge_with_recall(
        folders,
        tmp_path / "out",
        base=tmp_path / "base",
        calibration=ROWS,
        num_typical=5,
        include_base=True,
        anchor="a",
    )
    assert result.model_names == ("base", "a", "b", "c") and result.anchor == 1
    load = AutoModelForCausalLM.from_pretrained
    models = [
        load(tmp_path / "base"),
        *(PeftModel.from_pretrained(load(tmp_path / "base"), f) for f in folders[:2]),
        load(folders[2]),
    ]
    texts, _ = token_ids(ROWS, toy.tokenizer(), 512, 512)
    picked = typical_samples(representations(models[1], texts)[-1].astype(float), 5)
    assert [s["index"] for s in result.report["typical_samples"]] == picked.tolist()
    reps = np.stack([representations(m, [texts[i] for i in picked]) for m in models])
    np.testing.assert_allclose(result.weights, layer_weights(reps, 1)["weights"], atol=1e-9)


def test_rows_of_every_form(tmp_path):
    tokenizer = toy.tokenizer()
    texts = [
        "w1 w2 w3",
        {"text": "w1 w2 w3"},
        {"prompt": "w1 w2", "completion": " w3"},
        {"input_ids": tokenizer("w1 w2 w3")["input_ids"]},
    ]
    ids, places = token_ids(texts, tokenizer, 10, 10)
    assert ids == [tokenizer("w1 w2 w3")["input_ids"]] * 4 and places == [0, 1, 2, 3]
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    chats = [{"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}]
    ids, _ = token_ids(chats, tokenizer, 10, 10)
    assert ids[0] == ids[1] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    many = Dataset.from_list(ROWS)
    ids, places = token_ids(many, tokenizer, 10, 3)
    assert places == list(range(0, 30, 3)) and max(map(len, ids)) == 3


def test_a_model_may_write_its_own_texts_and_a_seed_repeats_them(tmp_path):
    _, a, b = family(tmp_path, max_position_embeddings=256)
    options = {"calibration_mode": "self", "num_typical": 3, "max_length": 24}
    one = merge_with_recall([a, b], tmp_path / "one", seed=5, **options)
    two = merge_with_recall([a, b], tmp_path / "two", seed=5, **options)
    other = merge_with_recall([a, b], tmp_path / "other", seed=6, **options)
    assert np.array_equal(one.weights, two.weights) and not np.array_equal(one.weights, other.weights)
    assert len(one.report["typical_samples"]) == 3


def test_a_killed_calibration_goes_on_with_what_it_has(tmp_path, monkeypatch, caplog):
    _, a, b = family(tmp_path)
    merge_with_recall([a, b], tmp_path / "whole", calibration=ROWS, num_typical=5)
    warned = recall_weights._warn_degenerate
    monkeypatch.setattr(recall_weights, "_warn_degenerate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_with_recall([a, b], tmp_path / "out", calibration=ROWS, num_typical=5)
    with caplog.at_level(logging.INFO, logger="hf_continual.merging.inputs.run_model"):
        caplog.clear()
        monkeypatch.setattr(recall_weights, "_warn_degenerate", warned)
        merge_with_recall([a, b], tmp_path / "out", calibration=ROWS, num_typical=5)
        assert "representations of" not in caplog.text
    assert digest(tmp_path / "out") == digest(tmp_path / "whole") and not (tmp_path / ".out.merging").exists()


def test_low_memory_reads_blocks_from_the_disk_and_gives_the_same_numbers(tmp_path):
    base = save(build(), tmp_path / "base")
    member = open_members([base], None)[0][0]
    texts = [r["input_ids"] for r in ROWS[:4]]
    with loaded(member, Setting()) as model:
        usual = representations(model, texts)
    with loaded(member, Setting(low_memory=True)) as model:
        assert any(p.is_meta for p in model.parameters())
        np.testing.assert_allclose(representations(model, texts, batch_size=4), usual, atol=1e-5)


def test_on_a_cpu_nothing_runs_in_float16(tmp_path):
    member = open_members([save(build(dtype=torch.float16), tmp_path / "half")], None)[0][0]
    with loaded(member, Setting(device="cpu")) as model:
        assert model.dtype == torch.bfloat16


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path, capsys, monkeypatch):
    _, a, b = family(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(pipeline, "write_shards", None)
    result = merge_linear([a, b], tmp_path / "out", dry_run=True, weights=[1, 3])
    merge_with_recall([a, b], tmp_path / "out", dry_run=True)
    said = capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    for word in (
        "[0.25, 0.75]",
        "read",
        "write",
        "free disk",
        "MiB of buffers",
        "all passed: names, shapes",
        "anchor_spread",
    ):
        assert word in said
    assert result.bytes_read == 2 * result.report["models"][0]["bytes"] and result.report["method"] == "linear"


def test_the_bar_shows_bytes_and_time_left(tmp_path, capsys):
    _, a, b = family(tmp_path)
    merge_linear([a, b], tmp_path / "out", progress=True)
    said = capsys.readouterr().err
    assert ("linear -> out" in said and "kB/s" in said) or ("MB/s" in said and "0:00:0" in said)
    merge_linear([a, b], tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""


def test_longer_vocabularies_keep_their_further_rows(tmp_path):
    base = build()
    a = save(tuned(base, 1), tmp_path / "a")
    longer = tuned(base, 2)
    longer.resize_token_embeddings(len(toy.VOCABULARY) + 3, mean_resizing=False)
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["n0", "n1", "n2"])
    longer.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    result = merge_linear([a, tmp_path / "b"], tmp_path / "out", weights=[0.25, 0.75], vocab="extend")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one, two, merged = tensors(a)[name], tensors(tmp_path / "b")[name], tensors(tmp_path / "out")[name]
        assert torch.equal(merged[len(one) :], two[len(one) :])
        torch.testing.assert_close(merged[: len(one)], 0.25 * one + 0.75 * two[: len(one)], rtol=0, atol=1e-6)
        assert any(
            f"{name}: rows {len(one)} to {len(two) - 1} exist in b only" in note for note in result.report["notes"]
        )
    loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded_model.config.vocab_size == len(toy.VOCABULARY) + 3


def test_a_head_that_left_its_embedding_is_kept(tmp_path):
    from safetensors.torch import load_file, save_file

    _, a, b = family(tmp_path, "llama tied")
    stored = load_file(b / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": embedding.clone()}, b / "model.safetensors", {"format": "pt"})
    merge_linear([a, b], tmp_path / "tied")
    assert "lm_head.weight" not in tensors(tmp_path / "tied")
    save_file({**stored, "lm_head.weight": embedding + 1}, b / "model.safetensors", {"format": "pt"})
    merge_linear([a, b], tmp_path / "untied")
    merged = tensors(tmp_path / "untied")
    torch.testing.assert_close(merged["lm_head.weight"], merged["model.embed_tokens.weight"] + 0.5, rtol=0, atol=1e-6)
    loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert loaded_model.config.tie_word_embeddings is False
    assert not torch.equal(loaded_model.lm_head.weight, loaded_model.model.embed_tokens.weight)


def test_a_hub_id_is_fetched_at_its_revision_and_named_in_the_report(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    _, a, b = family(tmp_path)
    snapshot = tmp_path / "cache" / "0123abc"
    snapshot.parent.mkdir()
    a.rename(snapshot)
    asked, wanted = [], set()
    kept = ["model.safetensors", "tokenizer.json", "additional_chat_templates/rag.jinja", "tokenization_own.py"]
    left = ["onnx/config.json", "original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
    there = [*kept, *left]

    def download(repo_id, revision=None, **options):
        asked.append((repo_id, revision))
        wanted.update(filter_repo_objects(there, **options))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    result = merge_linear(["me/model@v2", b], tmp_path / "out")
    assert asked == [("me/model", "v2")] and wanted == set(kept)
    first, second = result.report["models"]
    assert (first["name"], first["hub_id"], first["revision"]) == ("me/model", "me/model", "0123abc")
    assert (second["name"], second["hub_id"]) == ("m2", None)
    merge_linear(["me/model", b], tmp_path / "main")
    assert asked[-1] == ("me/model", None) and digest(tmp_path / "main") == digest(tmp_path / "out")
