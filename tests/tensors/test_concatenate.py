"""Two adapters in one: exactly the sum of both."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_continual.tensors.concatenate import concatenate_adapters, scaling
from tests import toy

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapter(folder, seed, **options):
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    )
    model = get_peft_model(toy.model().double(), config, autocast_adapter_dtype=False)
    model.double().save_pretrained(folder)
    return folder


def delta(folder):
    """What an adapter adds to each weight."""
    model = PeftModel.from_pretrained(toy.model().double(), folder, autocast_adapter_dtype=False).double()
    with torch.no_grad():
        merged = model.merge_and_unload().state_dict()
    base = toy.model().double().state_dict()
    return {n: merged[n] - base[n] for n in base}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({}, {"r": 2, "lora_alpha": 3}),
        ({"use_rslora": True}, {"r": 3}),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "embed_tokens"]}),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
            {"layers_to_transform": [0, 2]},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_sum_is_exact(tmp_path, first, second):
    one, two = adapter(tmp_path / "one", 1, **first), adapter(tmp_path / "two", 2, **second)
    concatenate_adapters(one, two, tmp_path / "sum")
    a, b, c = delta(one), delta(two), delta(tmp_path / "sum")
    for name in c:
        # In float64, where only s B is rounded, and that to float32.
        assert torch.allclose(c[name], a[name] + b[name], atol=1e-6, rtol=1e-5), name
    assert any((c[n] - a[n]).abs().max() > 0.01 for n in c)


def test_scaling_is_pefts(tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, use_rslora=True
    )
    model = get_peft_model(toy.model(), config)
    plain = json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value)))
    for name, module in model.named_modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            assert scaling(plain, name) == pytest.approx(module.scaling["default"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "holds a IA3 adapter; only LoRA"),
        ({"use_dora": True}, "has use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"bias": "all"}, "trains biases"),
    ],
)
def test_what_does_not_add_is_refused(tmp_path, changes, message):
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    file = one / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        concatenate_adapters(one, two, tmp_path / "sum")


@pytest.mark.filterwarnings("ignore:.*embedding layers:UserWarning")
@pytest.mark.parametrize("who", ["first", "second", "both", "neither", "different"])
def test_rows_that_adapters_bring_with_an_adapted_embedding(tmp_path, who):
    """PEFT loads the stored rows instead of the base's; rows that contradict each other are refused."""
    rows, base = "base_model.model.model.embed_tokens.base_layer.weight", toy.model().double().state_dict()
    folders = [adapter(tmp_path / str(i), i, target_modules=["q_proj", "embed_tokens"]) for i in (0, 1)]
    changed = base["model.embed_tokens.weight"].clone()
    changed[-3:] += 0.5
    for i, folder in enumerate(folders):
        file = folder / "adapter_model.safetensors"
        stored = load_file(file)
        if who in ("both", "different", "neither") or who == ("first", "second")[i]:
            stored[rows] = base["model.embed_tokens.weight"] if who == "neither" else changed + i * (who == "different")
        else:
            del stored[rows]
        save_file(stored, file, {"format": "pt"})
    if who == "different":
        with pytest.raises(ValueError, match="contain different weights as .*embed_tokens"):
            concatenate_adapters(*folders, tmp_path / "sum")
        return
    concatenate_adapters(*folders, tmp_path / "sum")
    found, one, two = (delta(f) for f in (tmp_path / "sum", *folders))
    name = "model.embed_tokens.weight"
    moved = 0 if who == "neither" else changed - base[name]
    counted = 2 if who == "both" else 0 if who == "neither" else 1  # deltas that include the rows' change
    torch.testing.assert_close(
        found[name], one[name] + two[name] - (counted - 1) * moved if counted else one[name] + two[name]
    )
    torch.testing.assert_close(found["lm_head.weight"], one["lm_head.weight"] + two["lm_head.weight"])
