"""The pre-registered rules on results computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes.proof import verdicts
from tests.proof.made_up import result, seeds

HERE = Path(verdicts.__file__).parent
OLD = {"arm": "new", "against": "sequential", "measure": "old_loss"}
OP = {**OLD, "measure": "op"}


def said(claim=OLD, against=None, **new):
    """The verdict on an arm whose numbers are `new`."""
    return verdicts.verdict(claim, [*seeds("new", **new), *seeds("sequential", **(against or {}))])


def test_holds():
    found = said(old=1.5)  # against 2.0
    assert (found["verdict"], found["difference"], found["by_seed"]) == ("holds", 0.5, [0.5] * 3)
    assert found["interval"] == pytest.approx([0.5, 0.5])


def test_does_not_hold():
    found = said(old=2.5)
    assert (found["verdict"], found["difference"]) == ("does not hold", -0.5)
    assert found["interval"] == pytest.approx([-0.5, -0.5])


def test_noise_if_a_seed_disagrees():
    assert said(old=(1.0, 1.0, 2.01))["verdict"] == "noise"
    assert said(old=(1.0, 1.0, 1.99))["verdict"] == "holds"


def test_noise_if_it_is_too_small_to_matter():
    assert said(old=1.96)["verdict"] == "noise"  # 0.04 of at least 0.05
    assert said(old=1.94)["verdict"] == "holds"


def test_noise_if_the_rows_disagree():
    """Each seed has a mean difference of 0.25, three rows lose 1 and one gains 4: the interval holds 0."""
    found = said(old=[3.0, 3.0, 3.0, -2.0])
    assert found["difference"] == pytest.approx(0.25) and min(found["by_seed"]) > 0
    assert found["interval"][0] < 0 < found["interval"][1] and found["verdict"] == "noise"


def test_keeping_more_by_learning_less_is_reported():
    assert said(old=1.5, learned=[1, 1, 1, 0])["verdict"] == "holds, learns less"
    assert said(old=1.5, learned=[1, 1, 1, 0], against={"learned": [1, 1, 1, 0]})["verdict"] == "holds"
    assert said(old=2.5, learned=[1, 1, 1, 0])["verdict"] == "does not hold"


def test_higher_is_better_for_scores():
    """OP: the mean of `kept` on the first task and `learned` on the second."""
    found = said(OP, kept=1.0)
    assert found["difference"] == 0.5 and found["verdict"] == "holds"
    assert said(OP, against={"kept": 1.0})["verdict"] == "does not hold"
    found = said({**OLD, "measure": "bwt"}, kept=[1, 1, 0, 0])  # from -1 to -0.5
    assert found["difference"] == 0.5


def test_general_loss_is_weighted_by_tokens():
    found = said({**OLD, "measure": "general_loss"}, general=[4.0, 4.0, 4.0, 3.2])  # 5 of 8 tokens, 0.8 less
    assert found["difference"] == pytest.approx(0.5)


def test_not_measured():
    two = seeds("new", old=1.0)[:2]
    assert verdicts.verdict(OLD, [*two, *seeds("sequential")])["verdict"] == "not measured"
    failed = {**result("new", 2), "error": "ValueError: the loss is not a number"}
    assert verdicts.verdict(OLD, [*two, failed, *seeds("sequential")])["verdict"] == "not measured"
    assert verdicts.verdict(OLD, [])["verdict"] == "not measured"


def test_other_rows_are_refused():
    other = seeds("new")
    for r in other:
        r["rows"]["1"]["a"]["nll"] = [1.0]
    with pytest.raises(ValueError, match="scored on different rows"):
        verdicts.verdict(OLD, [*other, *seeds("sequential")])


PLAIN = [
    *seeds("sequential", old=3.0),
    *seeds("plain_third", old=3.0, kept=[0, 0, 0, 1]),
    *seeds("plain_tenth", old=3.0),
]


def test_the_goal_by_hand():
    """Plain forgets 3 - 1 = 2 nats and 4 - 3 = 1 nat of general text."""
    good = seeds("comp_x", old=1.2, general=3.1)
    found = verdicts.goal([*PLAIN, *good], "comp_x")
    assert found["plain"] == "plain_third" and found["reached"] is True
    assert (found["old"], found["general"], found["tokens"]) == pytest.approx((0.9, 0.9, 1.0))
    for worse in ({"old": 1.5}, {"general": 3.3}, {"learned": [1, 1, 1, 0]}):
        assert (
            verdicts.goal([*PLAIN, *seeds("comp_x", **{"old": 1.2, "general": 3.1, **worse})], "comp_x")["reached"]
            is False
        )
    for r in good:
        r["cost"] = {**r["cost"], "tokens": 1301}
    assert verdicts.goal([*PLAIN, *good], "comp_x")["reached"] is False
    assert verdicts.goal([*PLAIN, *good[:2]], "comp_x")["reached"] is None
    assert verdicts.goal([*PLAIN[:3], *good], "comp_x")["reached"] is None  # two rates are missing


def test_a_data_set_on_which_nothing_is_forgotten_decides_nothing():
    plain = [r for arm in verdicts.PLAIN for r in seeds(arm, old=1.05)]
    assert verdicts.goal([*plain, *seeds("comp_x", old=1.0, general=3.0)], "comp_x")["reached"] is None


def test_the_composition_is_the_one_whose_worse_half_is_best():
    one, two = seeds("comp_1", old=1.0, general=3.5), seeds("comp_2", old=1.4, general=3.3)  # 1.0 and 0.5; 0.8 and 0.7
    slow = seeds("comp_3", old=1.0, general=3.0, learned=0.0)
    assert verdicts.choose([*PLAIN, *one, *two, *slow], ["comp_1", "comp_2", "comp_3"]) == "comp_2"
    assert verdicts.choose([*PLAIN, *slow], ["comp_3"]) == "comp_3"
    assert verdicts.choose([*PLAIN, *one], ["comp_1", "comp_2"]) is None


def test_every_claim_names_arms_and_a_measure():
    arms = yaml.safe_load((HERE / "arms.yaml").read_text())
    claims = yaml.safe_load((HERE / "claims.yaml").read_text())
    assert len({c["id"] for c in claims}) == len(claims)
    for claim in claims:
        assert {claim["arm"], claim["against"]} <= set(arms) and claim["measure"] in verdicts.SMALLEST, claim["id"]
