"""Check that the saved files are the model: load them with plain transformers or PEFT and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_continual.atomic_files import read_json
from hf_continual.hub.folder_facts import is_adapter
from hf_continual.inference.names import NAMES
from hf_continual.tensors.modes import evaluation_mode


class WrongModel(ValueError):
    """The saved model is not the expected one."""


def check_loads(folder: Path) -> None:
    """Load a merged model as a reader will, and refuse missing weights and numbers that are not finite.

    Args:
        folder: The folder.

    Raises:
        WrongModel: If weights are missing or left over, or its logits are not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _check_finite(folder)
    if is_adapter(folder):
        return
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(str(key) for key in info.get(kind) or ()):
            raise WrongModel(f"the model on disk has {kind.replace('_', ' ')}: {', '.join(found[:3])}. Merge again.")
    with torch.no_grad():
        logits = model.eval()(input_ids=some_ids(model)).logits
    if not torch.isfinite(logits).all():
        raise WrongModel("the logits of the model on disk are not finite: the merge went wrong. It was not pushed.")


def _check_finite(folder: Path) -> None:
    import torch

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise WrongModel(
                        f"{file.name} holds NaN or infinity in {name}: the merge went wrong. It was not pushed."
                    )


def some_ids(model: Any, number: int = 16) -> Any:
    """A row of token ids spread over the vocabulary, the same for every model of its size."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, number + 1) * 7919 % size).unsqueeze(0).to(model.device)


def check_same(folder: Path, live: Any) -> None:
    """Compare the model on disk with the live one, bit for bit.

    An adapter's tensors are compared; for a full model also its logits, after loading it with plain transformers.

    Args:
        folder: Where the live model was saved.
        live: The live model, unwrapped.

    Raises:
        WrongModel: If they differ.
    """
    import torch

    if is_adapter(folder):
        _same_adapter(folder, live)
        return
    from transformers import AutoModelForCausalLM

    dtype = next(p.dtype for p in live.parameters() if p.is_floating_point())
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(live.device).eval()
    left, right = dict(live.state_dict()), dict(again.state_dict())
    for name in right:
        if name not in left or not torch.equal(left[name], right[name]):
            raise WrongModel(f"{name} on disk differs from the live model. Save it again.")
    with evaluation_mode(live), torch.no_grad():
        ids = some_ids(again)
        worst = (type(live).forward(live, input_ids=ids).logits - again(input_ids=ids).logits).abs().max().item()
    if worst != 0:
        raise WrongModel(f"the model on disk answers differently from the live one (logits differ by up to {worst:g}).")


def _same_adapter(folder: Path, live: Any) -> None:
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    held = {k: v.detach().cpu() for k, v in get_peft_model_state_dict(live).items()}
    if saved.keys() != held.keys():
        lost = sorted(saved.keys() ^ held.keys())
        raise WrongModel(f"{lost[0]} is in only one of the adapter on disk and the live one. Save it again.")
    for name, tensor in saved.items():
        if not torch.equal(tensor, held[name].to(tensor.dtype)):
            raise WrongModel(f"{name} of the adapter on disk differs from the live model. Save it again.")
    config = read_json(folder / "adapter_config.json")
    assert config.get("r") is not None or config["peft_type"] in NAMES
