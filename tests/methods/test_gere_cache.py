"""GeRe's cache under faults: other tokenizers, full disks, lost bases, two processes, changed weights."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import resource
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError

from hf_continual import ContinualConfig, ContinualTrainer, FreezeLayers
from hf_continual.data import handover
from hf_continual.data.handover import HandOverError
from hf_continual.data.self_generated import kept_texts
from hf_continual.methods.gere.states import open_recorded, record
from hf_continual.tensors.reference import as_reference, untrained, weights_fingerprint
from hf_continual.trainer import hand_over
from tests import toy
from tests.methods.test_gere import build, gere


def files(tmp_path, ending="safetensors"):
    return sorted((tmp_path / "cache").glob(f"*.{ending}"))


def other_tokenizer():
    """One word that is in no row differs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(toy, "VOCABULARY", [*toy.VOCABULARY[:-1], "other"])
        return toy.tokenizer()


def task(tmp_path, index, model, *, tokenizer=None, peft=None, **changes):
    """One task as in a script, with the preliminary pass made."""
    trainer = ContinualTrainer(
        model,
        ContinualConfig(**toy.settings(tmp_path / str(index), max_steps=2, learning_rate=1e-2), task_index=index),
        train_dataset=toy.rows(),
        processing_class=tokenizer or toy.tokenizer(),
        peft_config=peft,
        methods=[gere(tmp_path, **changes)],
    )
    hand_over.before_training(trainer)
    return trainer


def recorded(trainer):
    return next(iter(trainer.methods))._recorded


def test_what_else_states_depend_on_is_in_the_key(tmp_path):
    """Tokenizer, configuration (rotary base), attention and precision: each has its own file."""
    build(tmp_path, gere(tmp_path))
    changes = [
        {"model": toy.model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})},
        {"model": toy.model(attn_implementation="eager")},
        {"model": toy.model().to(torch.bfloat16)},
        {"bf16": True},
    ]
    for number, change in enumerate(changes, start=2):
        build(tmp_path, gere(tmp_path), **change)
        assert len(files(tmp_path)) == number, change
    task(tmp_path, 0, toy.model(), tokenizer=other_tokenizer())
    assert len(files(tmp_path)) == len(changes) + 2
    toy.model().save_pretrained(tmp_path / "saved")
    build(tmp_path, gere(tmp_path), model=str(tmp_path / "saved"), model_init_kwargs={"dtype": "float32"})
    assert len(files(tmp_path)) == len(changes) + 2, "saved and loaded, it is the same model"


def test_another_tokenizer_than_the_first_tasks(tmp_path):
    first = task(tmp_path, 0, toy.model())
    first.train()
    with pytest.raises(
        ValueError, match="came with states for other texts?, tokenizer.* with|states for other .*tokenizer"
    ):
        task(tmp_path, 1, first.model, tokenizer=other_tokenizer())


def test_two_bases_in_one_folder_are_not_mixed_up(tmp_path):
    """Each later task is held to its own base, even if labelled a first task, and in any order."""
    used = {}
    for seed in (0, 1):
        first = task(tmp_path, 0, toy.model(seed=seed))
        first.train()
        used[seed] = (recorded(first).file, first.model)
    for seed, (file, model) in used.items():
        for index in (1, 0):
            later = task(tmp_path, index, model)
            assert recorded(later).file == file, seed
    later.train()
    third = task(tmp_path, 2, later.model)
    assert recorded(third).file == used[1][0]
    assert len(files(tmp_path)) == 2


def test_weights_that_were_changed_since_are_not_a_task_of_this_sequence(tmp_path):
    first = task(tmp_path, 0, toy.model())
    first.train()
    torch.nn.init.normal_(first.model.lm_head.weight)
    with pytest.raises(
        HandOverError, match="weights of this model were changed since task 'task' ended in this process"
    ):
        task(tmp_path, 1, first.model)


def test_a_later_task_without_word_of_its_base(tmp_path):
    with pytest.raises(
        ValueError, match=r"index 1\) starts from fine-tuned weights, and no GeRe of an earlier task recorded"
    ):
        task(tmp_path, 1, toy.model())
    trainer = ContinualTrainer(
        toy.model(),
        ContinualConfig(**toy.settings(tmp_path), task_index=1, fresh_methods=True),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[gere(tmp_path)],
    )
    trainer.train()
    assert len(files(tmp_path)) == 1, "the weights of now are the base, on purpose"


def test_states_go_with_the_model_to_another_machine(tmp_path):
    """With full weights the base's states cannot be recorded again: the folder contains them, byte for byte."""
    first = task(tmp_path, 0, toy.model())
    first.train()
    first.save_model()
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for gone in (file, file.with_suffix(".sha256")):
        gone.unlink()
    second = task(tmp_path, 1, str(tmp_path / "0"))
    assert recorded(second).file == file and file.read_bytes() == whole
    file.unlink()
    with pytest.raises(ValueError, match="came with states for other texts, and the base is not available"):
        task(tmp_path, 1, str(tmp_path / "0"), rows=toy.rows(seed=3))


def test_hidden_states_stay_in_the_cache(tmp_path):
    first = task(tmp_path, 0, toy.model(), constraint="l2")
    first.train()
    first.save_model()
    assert not list((tmp_path / "0" / "continual").glob("gere.safetensors"))
    assert recorded(task(tmp_path, 1, str(tmp_path / "0"), constraint="l2")).file == files(tmp_path)[0]
    files(tmp_path)[0].unlink()
    with pytest.raises(ValueError, match="the model came without any, and the base is not available"):
        task(tmp_path, 1, str(tmp_path / "0"), constraint="l2")


def test_a_task_may_go_without(tmp_path, caplog):
    first = task(tmp_path, 0, toy.model())
    first.train()
    first.save_model()
    plain = ContinualTrainer(
        str(tmp_path / "0"), ContinualConfig(**toy.settings(tmp_path / "1")), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), methods=[FreezeLayers(bottom=1)],
    )  # fmt: skip
    plain.train()
    assert "comes with what method 'gere' learned, and this run does not use that method: it is dropped" in caplog.text


def test_construction_makes_no_pass(tmp_path, monkeypatch):
    import hf_continual.methods.gere.method as module

    calls = []
    original = module.last_hidden
    monkeypatch.setattr(module, "last_hidden", lambda *a: (calls.append(1), original(*a))[1])
    trainer = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), methods=[gere(tmp_path)],
    )  # fmt: skip
    assert not calls and not files(tmp_path)
    trainer.train()
    assert len(calls) == 24
    trainer.train()
    assert len(calls) == 24 and len(files(tmp_path)) == 1, "a second call of train keeps to the states of the first"


def test_a_damaged_file_of_a_base_that_is_gone(tmp_path):
    """The states saved with the model repair it."""
    first = task(tmp_path, 0, toy.model())
    first.train()
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + b"xyz")
    task(tmp_path, 1, first.model)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("damage", ["", "0" * 64, "abc", None, "bytes"])
def test_a_damaged_checksum_loses_no_states(tmp_path, caplog, damage):
    """The states carry their own digest: the checksum is reported and repaired, even if the base is gone."""
    first = task(tmp_path, 0, toy.model())
    first.train()
    (file,) = files(tmp_path)
    sums, whole = file.with_suffix(".sha256"), file.read_bytes()
    before = sums.read_text()
    if damage is None:
        sums.unlink()
    elif damage == "bytes":
        sums.write_bytes(b"\xff\xfe")
    else:
        sums.write_text(damage)
    with caplog.at_level(logging.WARNING):
        second = task(tmp_path, 1, first.model)
    assert f"{sums} is damaged" in caplog.text and "the checksum is written again" in caplog.text
    assert sums.read_text() == before and file.read_bytes() == whole
    assert recorded(second).file == file
    sums.unlink()
    for place in (len(whole) // 2, len(whole) - 1, 12):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        task(tmp_path, 1, first.model)
        assert file.read_bytes() == whole, "what came with the model mends it"


def test_an_adapter_merged_into_the_base_is_not_a_reference(tmp_path):
    """A fresh adapter on weights that have moved: the base's states, or an error; a trained one is switched off."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)
    first = task(tmp_path, 0, toy.model(), peft=lora)
    first.train()
    first.save_model()
    assert not untrained(first.model) and untrained(toy.model()) and untrained(get_peft_model(toy.model(), lora))
    (file,) = files(tmp_path)
    again = task(tmp_path, 1, first.model)
    assert recorded(again).file == file
    merged = first.model.merge_and_unload()
    with pytest.raises(ValueError, match="starts from fine-tuned weights, and no GeRe"):
        task(tmp_path, 1, merged, peft=lora)
    merged.save_pretrained(tmp_path / "merged")
    handover.bring_along(tmp_path / "0", tmp_path / "merged")
    second = task(tmp_path, 1, str(tmp_path / "merged"), peft=lora)
    assert recorded(second).file == file
    file.unlink()
    with pytest.raises(ValueError, match="the model came without any"):
        task(tmp_path, 1, str(tmp_path / "merged"), peft=lora)


def test_frozen_adapters_stay_frozen(tmp_path):
    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3" in name and "lora_" in name)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with as_reference(model, "base"):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before and any(before.values())


def test_resuming_on_a_checkpoints_weights_is_refused(tmp_path):
    """A trainer built with fine-tuned weights would record their states; its checkpoint prevents that."""
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "learning_rate": 1e-2}
    build(tmp_path, gere(tmp_path), **settings).train()
    wrong = build(tmp_path, gere(tmp_path), model=str(tmp_path / "checkpoint-4"), **settings)
    with pytest.raises(ValueError, match="states of different weights than the ones that the run to resume began with"):
        wrong.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_continual.data.recording.save_file", full)
    with pytest.raises(OSError, match="could not be written: .*No space left on device.*Free space or choose another"):
        build(tmp_path, gere(tmp_path))
    assert not files(tmp_path, "part") and not files(tmp_path)
    monkeypatch.undo()
    build(tmp_path, gere(tmp_path), max_steps=1).train()


def _on_a_small_disk(file, limit, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        record(Path(file), {}, [[1]] * 50, lambda ids: torch.randn(len(ids), 4), 1.0)
        queue.put("it fits")
    except OSError as error:
        queue.put(str(error))


@pytest.mark.parametrize("limit", [700, 1500], ids=["hidden-states", "states"])
def test_the_system_refuses_to_write(tmp_path, limit):
    """The hidden states take 800 bytes, the states of 50 rows with their names more than 2,000."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_on_a_small_disk, args=(str(tmp_path / "x.safetensors"), limit, queue))
    child.start()
    assert "could not be written: " in (said := queue.get(timeout=60)) and "File too large" in said
    child.join()
    assert {p.name for p in tmp_path.iterdir()} <= {"x.lock"}


def test_a_cache_that_cannot_be_read_or_made(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written: .*Free space or choose another cache_dir"):
        build(tmp_path, gere(tmp_path, cache_dir=str(tmp_path / "file")))
    with pytest.raises(OSError, match="could not be written: .*Free space or choose another cache_dir"):
        build(tmp_path, gere(tmp_path, cache_dir=str(tmp_path / "file"), rows="self", num_samples=2, max_length=20))
    build(tmp_path, gere(tmp_path))
    (file,) = files(tmp_path)
    file.with_suffix(".sha256").unlink()
    with caplog.at_level(logging.WARNING):
        build(tmp_path, gere(tmp_path))
    assert "it cannot be read (FileNotFoundError" in caplog.text and file.with_suffix(".sha256").is_file()


def test_hidden_states_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match=r"not finite \(1 of 4 channels\).*bfloat16"):
        record(tmp_path / "x.safetensors", {}, [[1, 2]], lambda ids: torch.tensor([[1.0, 2, 3, torch.inf]] * 2), 1.0)
    assert not list(tmp_path.glob("*.part"))


def test_rows_without_a_text(tmp_path):
    with pytest.raises(ValueError, match="1 of 2 general rows hold None or a number in 'text'"):
        build(tmp_path, gere(tmp_path, rows=[{"text": "w1 w2 w3"}, {"text": None}]))


def _write_texts(file):
    kept_texts(Path(file), 20, lambda: [f"text {i}" for i in range(20)])


def test_own_words_by_two_processes_and_damaged(tmp_path, caplog):
    file = tmp_path / "own.jsonl"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_write_texts, args=(str(file),)) for _ in range(4)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0] * 4
    whole = file.read_text()
    for damage in (whole[:50], "", "[1]\n" * 20):
        file.write_text(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _write_texts(file)
        assert "is not used" in caplog.text and file.read_text() == whole
    file.write_text("{}")
    with pytest.raises(ValueError, match="is damaged .* and the base model that wrote it is not available"):
        kept_texts(file, 20, None)


def test_own_words_are_the_bases_also_in_a_later_task(tmp_path):
    """With full weights the model that wrote them is gone; its texts and their states are still found."""
    own = {"rows": "self", "num_samples": 6, "max_length": 24}
    first = task(tmp_path, 0, toy.model(), **own)
    first.train()
    written = files(tmp_path, "jsonl")
    second = task(tmp_path, 1, first.model, **own)
    assert files(tmp_path, "jsonl") == written and len(written) == len(files(tmp_path)) == 1
    second.train()
    third = task(tmp_path, 2, second.model, **own, reference="task_start")
    assert files(tmp_path, "jsonl") == written and len(files(tmp_path)) == 2
    assert weights_fingerprint(third.model, "base") != weights_fingerprint(toy.model(), "base")


@pytest.mark.parametrize("weight", [100.0, "dynamic"])
def test_terms_ask_the_accelerator_for_nothing(tmp_path, monkeypatch, weight):
    """No value of a tensor is read on the host: on an accelerator each such read is a wait."""
    method = gere(tmp_path, weight=weight, dead_band=1e-6)
    trainer = build(tmp_path, method, max_steps=2)
    terms, calls = method.loss_terms, []

    def refused(*args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    def watched(forward):
        with monkeypatch.context() as patched:
            for name in ("item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
                patched.setattr(torch.Tensor, name, refused)
            calls.append(1)
            return terms(forward)

    monkeypatch.setattr(method, "loss_terms", watched)
    trainer.train()
    assert len(calls) == 2


def test_every_micro_batch_enters_the_same_names(tmp_path):
    """Processes add up their logs by position: one without general rows must not have fewer."""
    method = gere(tmp_path, per_batch=None, ratio=0.05)
    trainer = build(tmp_path, method, max_steps=12, per_device_train_batch_size=2)
    terms, seen = method.loss_terms, []

    def watched(forward):
        made = terms(forward)
        seen.append((bool(forward.drawn), (frozenset(made), frozenset(forward.notes))))
        return made

    method.loss_terms = watched
    trainer.train()
    assert {drawn for drawn, _ in seen} == {True, False} and len({names for _, names in seen}) == 1
    logged = [e for e in toy.logs(trainer) if "loss" in e]
    assert any("gere/tm" in e for e in logged) and not all("gere/tm" in e for e in logged)


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_bfloat16(tmp_path, precision):
    """Rounding moves few units at the start; afterwards the constraint works as in float32."""
    model = toy.model() if precision == "autocast" else toy.model().to(torch.bfloat16)
    method = gere(tmp_path)
    trainer = build(tmp_path, method, model=model, max_steps=4, bf16=precision == "autocast", learning_rate=1e-2)
    trainer.train()
    logged = [e for e in toy.logs(trainer) if "gere/tm" in e]
    assert logged[0]["gere/violations"] < 0.01 < logged[-1]["gere/violations"]


def test_a_row_touches_its_own_bytes(tmp_path):
    """The rest of the file may be gone: reading a row does not touch it."""
    made = record(tmp_path / "x.safetensors", {}, [[1, 2, 3]] * 9, lambda ids: torch.randn(len(ids), 4096), 1.0)
    row = made.row(4, 3).clone()
    content = bytearray(made.file.read_bytes())
    begin = content.find(row.numpy().tobytes())
    header = int.from_bytes(content[:8], "little") + 8
    content[header:begin] = b"\0" * (begin - header)
    content[begin + row.numel() :] = b"\0" * (len(content) - begin - row.numel())
    made.file.write_bytes(content)
    assert torch.equal(made.row(4, 3), row) and not made.row(3, 3).any()
    assert open_recorded(made.file, {}) is None


def test_weights_that_are_spread_already_are_refused():
    model = toy.model()
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="lm_head.weight is empty on this process: DeepSpeed ZeRO-3"):
        weights_fingerprint(model, "base")
