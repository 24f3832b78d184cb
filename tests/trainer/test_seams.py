"""The private members of TRL and transformers that the trainer builds on: an upgrade breaks here, not in a run."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

OVERRIDDEN = {
    "create_optimizer": ["self", "model"],
    "get_train_dataloader": ["self"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "log": ["self", "logs", "start_time"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "init_hf_repo": ["self", "token", "private"],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_finish_current_push": ["self"],
}
CALLED = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
    "get_decay_parameter_names": ["self", "model"],
    "_clip_grad_norm": ["self", "model"],
    "_prepare_inputs": ["self", "inputs"],
    "compute_loss_context_manager": ["self"],
    "get_tp_size": ["self"],
}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_members(name):
    wanted = (OVERRIDDEN | CALLED)[name]
    got = list(inspect.signature(getattr(SFTTrainer, name)).parameters)
    assert got == wanted, f"{name}{got} is not what hf_continual/trainer/trainer.py was written for, {wanted}"


def test_attributes_that_are_read():
    source = inspect.getsource(SFTTrainer) + inspect.getsource(Trainer)
    for name in (
        "_tokenizer", "padding_free", "completion_only_loss", "_formatting_func", "_is_vision_dataset",
        "model_accepts_loss_kwargs", "current_gradient_accumulation_steps", "model_wrapped", "optimizer_cls_and_kwargs",
    ):  # fmt: skip
        assert f"self.{name}" in source, name


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
