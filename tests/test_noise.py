"""The flip law beside what was measured, on candidates that were made by it, and on others."""

import math

import pytest

import page_records
from divergent_tokens.measure.flips import KL_LIMIT
from divergent_tokens.noise import LEAST_KL, LEAST_PROMPTS, noise, table


def record(**options):
    return page_records.comparison(n_prompts=60, n_tokens=48, **options)


def test_flips_that_the_law_made_are_ordinary_noise():
    found = noise(record())
    judged = {one["name"]: one for one in found["candidates"]}
    for name in ("candidate 1", "candidate 2"):
        assert judged[name]["sdt"]["ordinary"] is True, judged[name]
    assert found["law"]["sdt"]["value"] == pytest.approx(page_records.LAW, rel=0.25)


def test_flips_that_come_in_excess_are_not():
    made = record()
    worst = made["candidates"][1]
    worst["metrics"]["sdt"] |= {"value": 0.5}
    judged = {one["name"]: one for one in noise(made)["candidates"]}
    assert judged["candidate 1"]["sdt"]["ordinary"] is False
    assert judged["candidate 1"]["sdt"]["expected"]["high"] < 0.5
    # It is judged by the others' constants, so that an odd one does not excuse itself.
    assert judged["candidate 1"]["fdt"]["ordinary"] is True


def test_above_the_laws_range_there_is_no_judgement():
    made = record()
    made["candidates"][2]["metrics"]["kl"] |= {"value": 0.4}
    judged = noise(made)["candidates"][2]
    assert judged["sdt"]["ordinary"] is None
    assert "above 0.3" in judged["reason"]


def test_small_groups_are_not_judged():
    made = record(domains=[f"domain {i}" for i in range(60 // (LEAST_PROMPTS - 1))])
    assert all(not one["by_domain"] for one in noise(made)["candidates"])
    assert noise(record())["candidates"][1]["by_domain"].keys() == {"prose", "code"}


def test_the_table_goes_over_the_laws_range_and_is_in_order():
    found = noise(record())["table"]
    assert found[0][0] == pytest.approx(LEAST_KL)
    assert found[-1][0] == pytest.approx(KL_LIMIT)
    assert [row[1] for row in found] == sorted(row[1] for row in found)
    assert [row[4] for row in found] == sorted((row[4] for row in found), reverse=True)
    assert all(row[2] <= row[1] <= row[3] and row[5] <= row[4] <= row[6] for row in found)


def test_without_any_kl_there_is_nothing_to_judge():
    made = record(names=("one",))
    made["candidates"][0]["metrics"]["kl"] = None
    found = noise(made)
    assert found["candidates"] == []
    assert not math.isnan(found["table"][0][1])
    assert table(made["prompts"]["margins"][:1], _law(found))


def _law(found):
    from divergent_tokens.measure.flips import Constant, FlipLaw

    return FlipLaw(Constant(**found["law"]["sdt"]), Constant(**found["law"]["fdt"]))
