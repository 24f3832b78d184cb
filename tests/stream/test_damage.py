"""Run files that were truncated, edited or removed: the same matrix, or an error that names the file. Never a different matrix."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_continual import train_stream
from hf_continual.atomic_files import DamagedFile, read_json, read_lines
from hf_continual.hub.lint import lint_folder
from hf_continual.stream.plan_lines import PlanError
from tests.stream import world

SHORT = {**world.SFT, "max_steps": 2, "save_steps": 1}


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plan, its finished run, one that stopped while its second task was scored, one that stopped during its training."""
    folder = tmp_path_factory.mktemp("runs")
    plan = world.make(folder, sft=SHORT, memory={"rows": 2}, methods={"replay": {"rows": "kept", "ratio": 0.3}})
    plan["tasks"] = plan["tasks"][:2]
    plan["tasks"][1]["curve"] = [0, 2]
    plan["evaluation"]["gauges"] = {"general": {"rows": str(folder / "general.jsonl"), "split": "train"}}
    results = train_stream(plan).results
    for name, attribute in (("scoring", "score"), ("training", "_train")):
        _stop_in(plan, folder / name, attribute)
    return plan, results, folder


def _stop_in(plan, out, attribute):
    """Run until the second task: before its last score, or after its first checkpoint."""
    from hf_continual.stream.learner import PlanLearner
    from hf_continual.trainer.trainer import ContinualTrainer

    with pytest.MonkeyPatch.context() as patch:
        if attribute == "score":
            original, calls = PlanLearner._scored, []

            def scored(self, model, task):
                calls.append(task.name)
                if len(calls) == 9:  # three of the base, three after the first task, two after the second
                    raise Stopped
                return original(self, model, task)

            patch.setattr(PlanLearner, "_scored", scored)
        else:
            save, steps = ContinualTrainer._save_checkpoint, []

            def saved(self, model, trial):
                save(self, model, trial)
                steps.append(1)
                if len(steps) == 3:
                    raise Stopped

            patch.setattr(ContinualTrainer, "_save_checkpoint", saved)
        with pytest.raises(Stopped):
            train_stream(plan, output_dir=str(out))
    assert (out / "task-01-t1.partial").is_dir()


def copied(runs, which, tmp_path):
    plan, results, folder = runs
    out = tmp_path / "run"
    shutil.copytree(folder / which, out)
    return {**plan, "output_dir": str(out)}, results, out


def measured(results):
    """All measurements, without paths, as stored in a file."""
    return json.loads(json.dumps({k: v for k, v in results.items() if k != "model"}))


SCORED_AGAIN = [
    "predictions/base.t1.jsonl", "predictions/task-00-t0.t1.jsonl", "predictions/task-01-t1.general.jsonl",
    "base/continual/scores.json", "task-00-t0/continual/scores.json", "task-01-t1/continual/scores.json",
]  # fmt: skip


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def edited(file):
    """A changed number, in a file that can still be parsed."""
    text = file.read_text()
    changed = text.replace('"score": 0.0', '"score": 1.0').replace('"value": 0.0', '"value": 1.0')
    if changed == text:
        changed = text.replace("0.", "1.", 1) if "0." in text else text.replace(": 4", ": 5", 1).replace("4.", "5.", 1)
    assert changed != text, file
    file.write_text(changed)


@pytest.mark.parametrize("harm", [cut, edited, Path.unlink])
@pytest.mark.parametrize("name", SCORED_AGAIN)
def test_a_score_without_its_predictions_is_measured_again(runs, tmp_path, caplog, name, harm):
    plan, results, out = copied(runs, "out", tmp_path)
    harm(out / name)
    with caplog.at_level(logging.WARNING):
        found = train_stream(plan).results
    assert measured(found) == measured(results)
    # A missing file of scores does not tell what was in it.
    assert (harm is Path.unlink and name.endswith("scores.json")) or str(out / name) in caplog.text
    again = train_stream(plan).results
    assert measured(again) == measured(results)


@pytest.mark.parametrize("harm", [cut, edited])
def test_a_damaged_record_of_the_plan_is_named(runs, tmp_path, harm):
    plan, _, out = copied(runs, "out", tmp_path)
    whole = (out / "plan.json").read_bytes()
    harm(out / "plan.json")
    with pytest.raises(PlanError, match=r"(?s)run/plan\.json.*Restore plan\.json from a copy; or.*another output_dir"):
        train_stream(plan)
    (out / "plan.json").write_bytes(whole)
    assert train_stream(plan).results["complete"], "the first way out"


def test_a_record_that_is_gone_is_named(runs, tmp_path):
    plan, results, out = copied(runs, "out", tmp_path)
    (out / "plan.json").unlink()
    with pytest.raises(PlanError, match=r"run/plan\.json is missing, but .* holds task-00-t0, task-01-t1"):
        train_stream(plan)
    shutil.rmtree(out)
    assert measured(train_stream(plan).results) == measured(results), "the last way out"


@pytest.mark.parametrize("harm", [cut, edited, Path.unlink])
def test_facts_of_a_trained_model(runs, tmp_path, caplog, harm):
    plan, results, out = copied(runs, "out", tmp_path)
    harm(out / "task-01-t1" / "continual" / "trained.json")
    assert measured(train_stream(plan).results) == measured(results)
    assert "trained.json" in caplog.text and "Its steps are not known" in caplog.text
    assert "optimizer steps" not in (out / "task-01-t1" / "README.md").read_text()
    plan, results, out = copied(runs, "scoring", tmp_path / "half")
    harm(out / "task-01-t1.partial" / "continual" / "trained.json")
    assert measured(train_stream(plan).results) == measured(results)
    assert harm is Path.unlink or "Training resumes from the last checkpoint" in caplog.text


@pytest.mark.parametrize("harm", [cut, edited, Path.unlink])
def test_kept_rows_are_written_again(runs, tmp_path, caplog, harm):
    plan, results, out = copied(runs, "out", tmp_path)
    file = out / "task-00-t0" / "continual" / "memory.jsonl"
    rows = read_lines(file)
    if harm is edited:
        file.write_text(file.read_text().replace('"memory_row": ', '"memory_row": 1', 1))
    else:
        harm(file)
    assert measured(train_stream(plan).results) == measured(results)
    assert (
        read_lines(file) == rows
        and str(file) in caplog.text
        and "is rewritten from the rows of the plan" in caplog.text
    )


def test_scores_taken_in_training_cannot_be_taken_again(runs, tmp_path):
    plan, results, out = copied(runs, "out", tmp_path)
    file = out / "task-01-t1" / "continual" / "curve.json"
    cut(file)
    with pytest.raises(
        DamagedFile, match=r"curve\.json.*Delete .*curve\.json to run without them, or its task's folder"
    ):
        train_stream(plan)
    shutil.rmtree(file.parents[1])
    assert measured(train_stream(plan).results) == measured(results)


def test_results_and_cards_are_made_from_the_folders(runs, tmp_path):
    plan, results, out = copied(runs, "out", tmp_path)
    whole = (out / "task-01-t1" / "README.md").read_text()
    for name in ("continual_results.json", "task-01-t1/continual_results.json", "task-01-t1/continual_config.json"):
        cut(out / name)
    (out / "task-00-t0" / "README.md").write_bytes(b"\xff\xfe")
    (out / "task-01-t1" / "continual" / "published.json").write_text("{")
    assert (
        measured(train_stream(plan).results) == measured(results) == measured(read_json(out / "continual_results.json"))
    )
    assert (out / "task-01-t1" / "README.md").read_text() == whole
    assert not lint_folder(out / "task-01-t1")
    json.loads((out / "task-01-t1" / "continual_config.json").read_text())


def test_a_model_that_is_not_what_was_saved_is_not_built_on(runs, tmp_path):
    for name, harm in (("model.safetensors", None), ("config.json", cut), ("config.json", Path.unlink)):
        plan, results, out = copied(runs, "training", tmp_path / f"{name}-{harm}")
        file = out / "task-00-t0" / name
        if harm is None:
            raw = bytearray(file.read_bytes())
            raw[-5] ^= 1
            file.write_bytes(raw)
        else:
            harm(file)
        shutil.rmtree(out / "task-01-t1.partial")
        with pytest.raises(DamagedFile, match=rf"task-00-t0.*{name}.*delete .*task-00-t0"):
            train_stream(plan)
    shutil.rmtree(out / "task-00-t0")
    assert measured(train_stream(plan).results) == measured(results), "the way out"


def files_of(out):
    """Files that a property test damages: all except checkpoints, which the trainer's tests cover, and plots."""
    wanted = (".json", ".jsonl", ".md", ".safetensors")
    return [
        p for p in sorted(out.rglob("*"))
        if p.is_file() and p.suffix in wanted and not any(part.startswith("checkpoint-") for part in p.parts)
    ]  # fmt: skip


HARMS = {
    "remove": lambda raw, at: None,
    "empty": lambda raw, at: b"",
    "cut": lambda raw, at: raw[: int(at * len(raw))],
    "tail": lambda raw, at: raw[int(at * len(raw)) :],
    "flip": lambda raw, at: raw[: (i := int(at * (len(raw) - 1)))] + bytes([raw[i] ^ 1]) + raw[i + 1 :],
    "byte": lambda raw, at: raw[: (i := int(at * len(raw)))] + b"\xff" + raw[i:],
    "zeros": lambda raw, at: raw[: (i := int(at * len(raw)))] + b"\0" * (len(raw) - i),
    "null": lambda raw, at: b"null",
    "list": lambda raw, at: b"[]",
    "object": lambda raw, at: b"{}",
    "nested": lambda raw, at: b'{"a":' * 50_000,
    "line twice": lambda raw, at: raw + raw.splitlines(keepends=True)[-1] if raw else b"1",
}


def harmed(runs, caplog, which, place, harm, at):
    """Damage one file of a run and run the plan again: the same measurements, or an error with the file's name."""
    with tempfile.TemporaryDirectory() as folder:
        plan, results, out = copied(runs, which, Path(folder))
        files = files_of(out)
        file = files[int(place * (len(files) - 1))]
        new = HARMS[harm](file.read_bytes(), at)
        if new is None:
            file.unlink()
        else:
            file.write_bytes(new)
        try:
            found = train_stream(plan).results
        except (ValueError, OSError, RuntimeError) as error:
            assert file.name in str(error), (file, harm, at, error)
            assert type(error) is not json.JSONDecodeError and not isinstance(error, UnicodeError)
            return
        found, wanted = measured(found), measured(results)
        if file.name == "curve.json" and new is None and found["curves"] == {"t1": {}}:
            # Scores from training cannot be measured again: they are left out, with a warning.
            assert str(file) in caplog.text
            found["curves"] = wanted["curves"]
        assert found == wanted, (file, harm, at)


place = st.floats(0, 1)
common = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),
}


@settings(max_examples=30, **common)
@given(place, st.sampled_from(sorted(HARMS)), place)
def test_any_file_of_a_finished_run(runs, caplog, where, harm, at):
    harmed(runs, caplog, "out", where, harm, at)


@settings(max_examples=5, **common)
@given(st.sampled_from(["scoring", "training"]), place, st.sampled_from(sorted(HARMS)), place)
def test_any_file_of_an_unfinished_run(runs, caplog, which, where, harm, at):
    harmed(runs, caplog, which, where, harm, at)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@settings(max_examples=800, **common)
@given(place, st.sampled_from(sorted(HARMS)), place)
def test_any_file_of_a_finished_run_often(runs, caplog, where, harm, at):
    harmed(runs, caplog, "out", where, harm, at)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@settings(max_examples=150, **common)
@given(st.sampled_from(["scoring", "training"]), place, st.sampled_from(sorted(HARMS)), place)
def test_any_file_of_an_unfinished_run_often(runs, caplog, which, where, harm, at):
    harmed(runs, caplog, which, where, harm, at)


def test_a_row_of_the_matrix_is_never_that_of_another_task(tmp_path):
    from hf_continual.stream.prepare import prepare
    from hf_continual.stream.read_plan import read_plan
    from hf_continual.stream.results import collect

    plan = world.make(tmp_path, sft=SHORT)
    plan["tasks"][1]["metric"] = "label_likelihood"
    whole = train_stream(plan)
    out = tmp_path / "out"
    assert whole.results["metric"].count("; ") == 1, "both ways of scoring are named"
    (out / "task-01-t1" / "continual" / "scores.json").unlink()
    found = collect(prepare(*read_plan(plan)), out, out).matrix.scores
    assert found == whole.matrix.scores[:1], "the row after the third task is not the second row"
    assert train_stream(plan).matrix == whole.matrix
