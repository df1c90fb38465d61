"""Widths as they are typed."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.widths import UNITS, Width, parse_width, parse_widths


def test_absolute_and_relative_by_hand():
    assert parse_width("fdt=10") == Width("fdt", 10.0, relative=False)
    assert parse_width(" KL = 12.5% ") == Width("kl", 0.125, relative=True)
    assert parse_width("fdt=10").of(50) == 10
    assert parse_width("sdt=25%").of(0.04) == pytest.approx(0.01)
    assert parse_width("kl=2e-3").to_json() == {"metric": "kl", "size": 0.002, "relative": False}


@given(
    st.sampled_from(sorted(UNITS)),
    st.floats(min_value=1e-9, max_value=0.999),
    st.booleans(),
)
def test_what_is_printed_is_parsed_again(metric, size, relative):
    width = Width(metric, size, relative)
    again = parse_width(str(width))
    assert (again.metric, again.relative) == (metric, relative)
    assert math.isclose(again.size, size, rel_tol=1e-12)


@given(st.text(max_size=12))
def test_any_text_is_a_width_or_one_clear_error(text):
    found = None
    with contextlib.suppress(DivergentTokensError):
        found = parse_width(text)
    if found is not None:
        assert 0 < found.size < math.inf
        return
    with pytest.raises(DivergentTokensError, match=r"--width .*expected|wider than all"):
        parse_width(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dppl=1", "is of 'dppl'; expected one of fdt, sdt, kl"),
        ("fdt", "expected a number above 0, in tokens"),
        ("fdt=", "as in fdt=10"),
        ("kl=-1", "in nats per token or with % of the value, as in kl=25%"),
        ("kl=0%", "expected a number above 0"),
        ("kl=nan", "expected a number above 0"),
        ("fdt=inf", "expected a number above 0"),
        ("sdt=5", "write sdt=5%"),
    ],
)
def test_what_makes_no_sense_is_said(text, said):
    with pytest.raises(DivergentTokensError, match="--width") as error:
        parse_width(text)
    assert said in str(error.value)


def test_one_width_a_metric_and_none_wider_than_all_there_is():
    assert [str(w) for w in parse_widths((), new_tokens=128)] == ["fdt=10", "sdt=25%", "kl=25%"]
    assert [w.metric for w in parse_widths(["kl=1%", "fdt=5"], new_tokens=16)] == ["kl", "fdt"]
    with pytest.raises(DivergentTokensError, match="names kl twice"):
        parse_widths(["kl=1%", "kl=0.1"], new_tokens=16)
    with pytest.raises(DivergentTokensError, match="no narrower than all that FDT can be with 16"):
        parse_widths(["fdt=16"], new_tokens=16)
    assert parse_widths(["fdt=150%"], new_tokens=16)
    assert parse_widths((), new_tokens=4)  # nobody asked for that width
