"""Methods from plain data, and the errors for unknown names."""

from __future__ import annotations

import pytest

from hf_continual.methods.base import Method
from hf_continual.methods.compose import Methods, hooks
from hf_continual.methods.freeze import FreezeLayers
from hf_continual.methods.recadam import RecAdam
from hf_continual.methods.replay import Replay
from hf_continual.methods.table import TABLE, build_methods, method_class

ROWS = [{"text": "a"}]


@pytest.mark.parametrize("name", TABLE)
def test_every_row_of_the_table_is_a_method_with_a_paper(name):
    cls = method_class(name)
    assert cls.name == name if name != "replay" else True
    assert cls.paper.title and str(cls.paper.year) in cls.paper.bibtex
    assert hooks(cls)


def test_names_mappings_and_lists():
    assert build_methods(None) == []
    assert [type(m) for m in build_methods("recadam")] == [RecAdam]
    built = build_methods({"freeze": {"bottom": 2}, "recadam": None})
    assert built[0] == FreezeLayers(bottom=2) and isinstance(built[1], RecAdam)
    built = build_methods([{"replay": {"rows": ROWS, "ratio": 0.1}}, "recadam"])
    assert isinstance(built[0], Replay) and built[0].ratio == 0.1


def test_a_method_of_ones_own():
    assert method_class("hf_continual.methods.freeze:FreezeLayers") is FreezeLayers
    with pytest.raises(ValueError, match="not a subclass"):
        method_class("json:dumps")
    with pytest.raises(ValueError, match="cannot be imported"):
        method_class("no.such:Thing")


def test_yaml_reads_an_exponent_as_text():
    assert build_methods({"recadam": {"pull": "1e-2"}})[0].pull == 0.01


@pytest.mark.parametrize(
    ("description", "error", "said"),
    [
        ("recadm", ValueError, "Did you mean 'recadam'"),
        ({"ewc2": {}}, ValueError, "Known are replay, gere, freeze, kif, recadam"),
        ({"freeze": {"botom": 1}}, ValueError, "Did you mean 'bottom'"),
        ({"freeze": {"bottom": "three"}}, TypeError, "methods.freeze.bottom is 'three' (str), expected int"),
        ({"freeze": {"bottom": 1.5}}, TypeError, "methods.freeze.bottom is 1.5"),
        ({"freeze": {"bottom": True}}, TypeError, "methods.freeze.bottom is True (bool)"),
        ({"freeze": 3}, TypeError, "must be a mapping of hyper-parameters"),
        ({"freeze": {}}, TypeError, "bottom"),
        ({"replay": {"rows": "gone.jsonl", "ratio": 0.1}}, FileNotFoundError, "gone.jsonl"),
        ({"replay": {"rows": ROWS, "ratio": 1.0}}, ValueError, "between 0 and 1, both excluded"),
        ({"replay": {"rows": ROWS, "ratio": 0}}, ValueError, "between 0 and 1, both excluded"),
        (7, TypeError, "got int"),
        ([RecAdam()], TypeError, "ContinualTrainer(methods=[...])"),
    ],
)
def test_sentences(description, error, said):
    with pytest.raises(error) as caught:
        build_methods(description)
    assert said in str(caught.value)


def test_conflicts_between_methods():
    class Other(RecAdam):
        name = "other"

    with pytest.raises(ValueError, match="both supply an optimizer"):
        Methods([RecAdam(), Other()])
    with pytest.raises(ValueError, match="Two methods are called 'freeze'"):
        Methods([FreezeLayers(bottom=1), FreezeLayers(bottom=2)])
    with pytest.raises(TypeError, match=r"put an object there: RecAdam\(\.\.\.\)"):
        Methods([RecAdam])
    with pytest.raises(TypeError, match="got str"):
        Methods(["recadam"])
    two = [Replay(ROWS, ratio=0.1), Replay(ROWS, ratio=0.1, name="general")]
    assert len(Methods(two)) == 2


def test_defaults_do_nothing():
    class Silent(Method):
        name = "silent"

    assert hooks(Silent) == []
    assert not Silent().reads_forward()


def test_a_method_that_is_not_a_dataclass_says_what_it_was_made_with():
    class Plain(Method):
        name = "plain"

        def __init__(self, weight, rows=()):
            self.weight, self.rows = weight, rows

    assert Methods([Plain(0.5)]).describe()[0].popitem()[1] == {"weight": 0.5, "rows": []}
