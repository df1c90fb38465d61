import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergent_tokens.conditions import (
    METRICS,
    OPERATORS,
    largest_flips,
    metric_value,
    parse_condition,
)
from divergent_tokens.errors import DivergentTokensError


def estimate(value):
    return {"value": value, "low": None, "high": None, "level": 0.95, "n_prompts": 9, "seed": 0}


MEASURED = {
    "fdt": estimate(40.0),
    "median_fdt": estimate(31.0),
    "sdt": estimate(0.1),
    "dppl": estimate(2.5),
    "base_dppl": 2.0,
    "ppl": {"conventional": estimate(17.0), "context_aware": estimate(12.0)},
    "kl": estimate(0.02),
    "kl_p99": 0.3,
    "acceptance": estimate(0.9),
    "near_ties": 0.25,
    "identical": 0.0,
    "mean_length": 64.0,
    "repeated": 0.5,
    "flips": 0.15,
}
UNMEASURED = MEASURED | {"ppl": None, "kl": None, "near_ties": None, "flips": None}


def holds(text, metrics=MEASURED):
    return parse_condition(text).holds(metrics)


@pytest.mark.parametrize(
    ("sign", "below", "equal", "above"),
    [
        ("<", False, False, True),
        ("<=", False, True, True),
        (">", True, False, False),
        (">=", True, True, False),
        ("==", False, True, False),
        ("!=", True, False, True),
    ],
)
def test_operators(sign, below, equal, above):
    found = [holds(f"fdt{sign}{bound}") for bound in (39.5, 40, 40.5)]
    assert found == [below, equal, above]


def test_spaces_and_order_are_free_and_and_joins():
    assert holds("  fdt <  41 and sdt>0.01 ")
    assert not holds("fdt<41 and sdt>0.2")
    assert not holds("sdt>0.2 and fdt<41")
    assert holds("fdt>=40 and sdt<=0.1 and kl>1e-3 and near_ties<1")


def test_every_metric_can_be_asked_for():
    assert set(METRICS) == set(MEASURED)
    values = {name: metric_value(MEASURED, name) for name in METRICS}
    assert values["ppl"] == 17
    assert values["acceptance"] == 0.9
    for name, value in values.items():
        assert holds(f"{name}=={value}")


@given(
    st.sampled_from(METRICS),
    st.sampled_from(sorted(OPERATORS)),
    st.floats(allow_nan=False, allow_infinity=True),
)
def test_a_condition_is_read_back_from_its_text(metric, sign, bound):
    condition = parse_condition(f"{metric} {sign} {bound!r} and fdt<1")
    assert parse_condition(str(condition)) == condition
    assert condition.parts[0].bound == bound


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftd<40", "no metric 'ftd'; did you mean 'fdt'"),
        ("perplexity<40", r"no metric 'perplexity'; did you mean '\w+'.*Known are fdt, "),
        ("xyz<40", "did you mean"),
        ("SDT>0.1", "no metric 'SDT'; did you mean 'sdt'"),
        ("fdt", "'fdt' is no condition; expected a metric, one of <= >= == != < >, and a number"),
        ("fdt=40", "is no condition"),
        ("fdt<40 and", "'' is no condition"),
        ("fdt<40 or sdt>1", "is no condition"),
        ("fdt<40,sdt>1", "is no condition"),
        ("", "'' is no condition"),
        ("40>fdt", "is no condition"),
        ("fdt<forty", "'forty' in the condition 'fdt<forty' is no number"),
        ("sdt>10%", "0.1 rather than 10%"),
        ("fdt<nan", "'nan' .* is no number"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(DivergentTokensError, match=message):
        parse_condition(text)


def test_what_was_not_measured_is_no_pass():
    with pytest.raises(DivergentTokensError, match=r"ppl>3 cannot be decided: .*give --text"):
        holds("ppl>3", UNMEASURED)
    with pytest.raises(DivergentTokensError, match="kl was not measured"):
        holds("fdt<99 and kl>0.1", UNMEASURED)


def test_one_false_part_decides_without_the_rest():
    assert not holds("kl>0.1 and fdt<1", UNMEASURED)


def test_no_divergence_has_no_near_ties_and_a_median_beyond_every_bound():
    perfect = MEASURED | {"near_ties": None, "identical": 1.0, "median_fdt": estimate(None)}
    assert not holds("near_ties>0.1", perfect)
    assert not holds("near_ties<0.1", perfect)
    assert not holds("median_fdt<400", perfect)
    assert holds("median_fdt>400", perfect)


def test_a_message_says_what_was_found():
    condition = parse_condition("fdt<41 and sdt>0.01 and fdt>1")
    assert condition.found(MEASURED) == "fdt is 40, sdt is 0.1"
    beyond = MEASURED | {"median_fdt": estimate(None)}
    assert parse_condition("median_fdt>4").found(beyond) == "median_fdt is beyond the completions"
    assert math.isinf(parse_condition("fdt<inf").parts[0].bound)


def test_flips_are_the_largest_of_any_task():
    tasks = [{"flips": None}, *({"flips": {"share": estimate(share)}} for share in (0.1, 0.3, 0.2))]
    assert largest_flips({"tasks": tasks}) == 0.3
    assert largest_flips({"tasks": tasks[:1]}) is None
    assert largest_flips({"tasks": None}) is None
    with pytest.raises(DivergentTokensError, match="no task has a metric of right and wrong"):
        holds("flips>0.1", UNMEASURED)
