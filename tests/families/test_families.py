"""Families x methods: every cell is trained and checked, or refused with a clear error."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from hf_continual.tensors.layers import find_blocks, modules_below, towers
from tests.families.cells import CELLS, run
from tests.families.configs import ENCODERS, KINDS, TEXT, TOWERS, build
from tests.families.notes import FAILS, LOSS, REFUSED, SETTINGS, TARGETS, outcome
from tests.families.table import PAGE, rows

# One cell of each family, each method in turn; the rest is exhaustive.
COVERING = {(kind, list(CELLS)[i % len(CELLS)]) for i, kind in enumerate(KINDS)}
EVERY = [(kind, method) for kind in KINDS for method in CELLS]


@pytest.mark.filterwarnings("ignore")  # families warn about missing kernels, and much else
@pytest.mark.parametrize(
    ("kind", "method"),
    [pytest.param(*cell, marks=[] if cell in COVERING else pytest.mark.exhaustive) for cell in EVERY],
)
def test_cell(kind, method):
    assert run(kind, method) == outcome(kind, method)


def test_the_page_is_the_table():
    """`recipes/families.md` was written from these families, methods and notes."""
    cells = {cell: outcome(*cell) for cell in EVERY}
    assert PAGE.read_text(encoding="utf-8").endswith("\n".join(rows(cells)) + "\n")


def test_notes_are_of_families_in_the_table():
    assert {*SETTINGS, *TARGETS, *LOSS, *REFUSED, *FAILS} <= set(KINDS)
    assert len(KINDS) == len(set(KINDS)) >= 80


@pytest.mark.parametrize("kind", [*TEXT, *TOWERS])
def test_towers_are_told_from_text(kind):
    """A tower is a sibling of the text model that text does not run; a text model has none."""
    model = build(kind)
    found = towers(model)
    assert bool(found) == (kind in TOWERS)
    of_towers = {id(p) for parameters in found.values() for p in parameters}
    of_text = {id(p) for m in (*find_blocks(model).modules, *modules_below(model).values()) for p in m.parameters()}
    assert not of_towers & of_text
    rest = {id(p) for p in model.parameters()} - of_towers
    model(input_ids=torch.arange(4, 12)[None], labels=torch.arange(4, 12)[None], use_cache=False).loss.backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} <= rest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ENCODERS and k not in FAILS])
def test_the_loss_of_the_trainer_is_the_models(kind):
    """TRL computes the loss without the model's forward pass; if the two differ, a note says so."""
    model = build(kind).eval()
    ids = torch.arange(4, 24).view(2, 10)
    extra = {"token_type_ids": torch.zeros_like(ids)} if kind == "paligemma" else {}
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)  # logits of a size that a cap or a scale changes
        own = model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
        add_fused_lm_head(model)
        fused = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    assert torch.allclose(own, fused, rtol=1e-3) == (kind not in LOSS)
