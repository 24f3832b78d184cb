"""The private members of TRL and transformers that the trainer builds on: an upgrade breaks here, not in a run."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

import hf_continual
from hf_continual import private

HERE = Path(hf_continual.__file__).parent
# Of torch and Python; their private members are not stable either, and have separate tests.
TORCH = {"_version", "_local_tensor", "_parameters", "_asdict", "_fields", "_value_", "_name_"}


@pytest.mark.parametrize("name", [*private.OVERRIDDEN, *private.CALLED])
def test_members(name):
    wanted = (private.OVERRIDDEN | private.CALLED)[name]
    got = list(inspect.signature(getattr(SFTTrainer, name)).parameters)
    assert got == wanted, f"{name}{got} is not what hf_continual/private.py was written for, {wanted}"


def test_attributes_that_are_read():
    source = inspect.getsource(SFTTrainer) + inspect.getsource(Trainer)
    for name in private.ATTRIBUTES:
        assert f"self.{name}" in source, name
    assert SFTTrainer._tag_names and Dataset.from_list([{"a": 1}])._fingerprint
    assert hasattr(LlamaConfig(), "_attn_implementation") and LlamaConfig()._name_or_path == ""
    assert AutoModelForCausalLM._model_mapping.get(LlamaConfig, None).__name__ == "LlamaForCausalLM"
    assert not private.is_known_absent("nobody/nothing", "no-file", None)


def own_names():
    """Every private name that this library defines itself."""
    names = set()
    for file in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def test_no_other_file_touches_what_is_private():
    """Also names reached only through `self` or `super()`: those are the listed ones."""
    listed = {
        *private.OVERRIDDEN,
        *private.CALLED,
        *private.ATTRIBUTES,
        "_VALID_DICT_FIELDS",
        "__init__",
        "__post_init__",
    }
    # A name defined by a Hugging Face class is theirs, even if a subclass here redefines it.
    own = own_names() - {n for n in dir(SFTTrainer) + dir(Trainer) if n.startswith("_")}
    for file in sorted(HERE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
                continue
            whose = ast.unparse(node.value)
            if (
                node.attr in own
                or node.attr in TORCH
                or whose in ("torch", "hashlib", "np")
                or file.name == "private.py"
            ):
                continue
            mine = whose in ("self", "super()", "cls", "SFTConfig")
            assert mine and node.attr in listed, f"{file.relative_to(HERE)}:{node.lineno} {whose}.{node.attr}"


def test_the_loop_calls_what_it_must_in_order():
    loop = inspect.getsource(Trainer._run_epoch)
    order = ["get_batch_samples", "training_step", "_clip_grad_norm", "on_pre_optimizer_step", "optimizer.step()",
             "on_optimizer_step", "zero_grad", "global_step += 1", "on_step_end", "_maybe_log_save_evaluate"]  # fmt: skip
    found = [loop.index(call) for call in order]
    assert found == sorted(found)


def test_the_fused_output_has_what_is_tapped():
    fields = FusedCausalLMOutput.__dataclass_fields__
    assert {"log_probs", "label_mask"} <= fields.keys()
    assert SFTConfig._VALID_DICT_FIELDS
