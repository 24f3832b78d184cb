"""A plan on a 4-bit base: the adapter is handed over, and the 4-bit model is scored with it."""

from __future__ import annotations

import pytest

from hf_continual import train_stream
from tests import toy
from tests.stream import world


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("between", ["continue", "new_adapter"])
def test_qlora(tmp_path, between):
    # bitsandbytes on a CPU needs blocks of 64 values along each axis.
    toy.model(hidden_size=128, intermediate_size=128, num_key_value_heads=4).save_pretrained(tmp_path / "wide")
    toy.tokenizer().save_pretrained(tmp_path / "wide")
    plan = world.make(
        tmp_path,
        model={"path": str(tmp_path / "wide"), "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
        peft={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        between_tasks=between,
        methods=[{"replay": {"rows": "earlier_tasks", "ratio": 0.3}}],
    )
    plan["tasks"] = plan["tasks"][:2]
    result = train_stream(plan)
    losses = result.results["nll"]
    assert losses["scores"][0][0] < losses["base"][0] and losses["scores"][1][1] < losses["base"][1]
    ranks = {t.shape[0] for n, t in world.adapter(tmp_path / "out" / "task-01-t1").items() if "lora_A" in n}
    assert ranks == ({4} if between == "continue" else {8})
