import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from divergent_tokens.report.numbers import BARS, MISSING, estimate, number, percent, sparkline

ANY = st.floats(allow_nan=True, allow_infinity=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
DIGITS = st.integers(1, 6)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (52.3456, "52.3"),
        (0.020182, "0.0202"),
        (0.00282577, "0.00283"),
        (9.9999, "10.0"),
        (0.99996, "1.00"),
        (99.96, "100"),
        (128, "128"),
        (128.4, "128"),
        (123456.7, "123457"),
        (1234567, "1.2e+06"),
        (0.0001, "0.000100"),
        (0.00002, "2.0e-05"),
        (-13.04, "-13.0"),
        (0, "0"),
        (-0.0, "0"),
        (None, MISSING),
        (math.nan, MISSING),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
    ],
)
def test_numbers_as_people_read_them(value, text):
    assert number(value) == text


@given(st.floats(-1e300, 1e300), st.integers(2, 6))
def test_a_number_is_read_back_to_within_its_digits(value, digits):
    text = number(value, digits)
    kept = 2 if "e" in text else digits
    error = 0.5 * 10.0 ** (1 - kept)
    assert abs(float(text) - value) <= error * abs(value) * (1 + 1e-9)
    assert len(text) <= 9 + digits


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0202, "2.02%"),
        (0.25, "25.0%"),
        (0.5, "50.0%"),
        (0.514, "51.4%"),
        (0.978, "97.8%"),
        (0.9978, "99.78%"),
        (0.99998, "99.998%"),
        (0.00012, "0.012%"),
        (1e-7, "<0.001%"),
        (1 - 1e-7, ">99.999%"),
        (0, "0%"),
        (1, "100%"),
        (1.0000001, "100%"),
        (-0.03, "-3.00%"),
        (None, MISSING),
        (math.nan, MISSING),
    ],
)
def test_shares_as_percentages(share, text):
    assert percent(share) == text


@given(st.floats(0, 1), st.integers(2, 4))
def test_a_percentage_is_read_back_to_within_its_digits(share, digits):
    text = percent(share, digits)
    if text[0] in "<>":
        assert share < 1e-5 or share > 1 - 1e-5
        return
    shown = float(text.removesuffix("%")) / 100
    near_end = min(share, 1 - share)
    assert abs(shown - share) <= max(near_end * 10.0 ** (2 - digits), 5.1e-6)
    if share not in (0, 1):
        assert text not in ("0%", "100%")


@given(ANY | st.none(), ANY | st.none(), ANY | st.none(), DIGITS)
def test_nothing_raises(value, low, high, digits):
    number(value, digits)
    percent(value, digits)
    for as_percent in (False, True):
        shown, interval = estimate(
            {"value": value, "low": low, "high": high}, as_percent=as_percent
        )
        assert shown
        assert "\n" not in shown + interval


@given(FINITE, FINITE)
def test_larger_numbers_never_read_smaller(a, b):
    assume(a < b)
    assert float(number(a)) <= float(number(b)) or "e" in number(a) + number(b)


def test_estimates():
    def shown(value, low, high, **how):
        return estimate({"value": value, "low": low, "high": high}, **how)

    assert shown(52.31, 48.2, 57.9) == ("52.3", "48–58")
    assert shown(0.0202, 0.0134, 0.031, as_percent=True) == ("2.02%", "1.3–3.1%")
    assert shown(-3.0, -5.5, 1.25) == ("-3.00", "-5.5 to 1.2")
    assert shown(0.0, 0.0, None) == ("0", "")
    assert shown(4.0, None, 9.0) == ("4.00", "?–9.0")
    assert shown(4.0, None, None) == ("4.00", "")
    assert shown(None, 24.0, None) == (MISSING, "")
    assert estimate(None) == (MISSING, "")
    assert estimate(None, as_percent=True) == (MISSING, "")


def test_bounds_that_would_look_alike_get_more_digits():
    assert estimate({"value": 0.97, "low": 0.9681, "high": 0.9712}, as_percent=True)[1] == (
        "96.8–97.1%"
    )
    assert estimate({"value": 3.0, "low": 3.0, "high": 3.0})[1] == "3.000–3.000"


def test_sparkline_steps_down_where_the_curve_does():
    curve = [[0, 1.0, 1, 1], [6, 0.5, 0, 1], [9, 0.0, 0, 1]]
    assert sparkline(curve, 12) == "██████▅▅▅▁▁▁"
    assert sparkline([], 12) == BARS[-1] * 12
    assert sparkline([[0, 0.0, 0, 0.1]], 12) == BARS[0] * 12
    assert len(sparkline(curve, 128, width=7)) == 7


@given(
    st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1)), max_size=20),
    st.floats(0, 1e6),
    st.integers(0, 40),
)
def test_a_sparkline_has_its_width(rows, length, width):
    curve = sorted([t, share, 0.0, 1.0] for t, share in rows)
    assert len(sparkline(curve, length, width)) == width
