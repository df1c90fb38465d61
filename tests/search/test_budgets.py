"""Budgets as they are typed."""

import pytest

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.search.budgets import Budget, Unit, one_budget, parse_share


@pytest.mark.parametrize(
    ("text", "value"), [("60%", 0.6), (" 33.3 %", 0.333), ("0.6", 0.6), ("0.5%", 0.005)]
)
def test_shares(text, value):
    assert parse_share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["60", "100%", "0", "-5%", "half", "nan", "%"])
def test_what_is_no_share(text):
    with pytest.raises(DivergentTokensError, match=r"expected a share .*, as in 60% or 0\.6"):
        parse_share(text)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(Unit.share, 0.6), "--budget 60%"),
        (Budget(Unit.bits, 5.5), "--bits 5.5"),
        (Budget(Unit.components, 84), "--count 84"),
    ],
)
def test_a_budget_says_itself_as_it_is_typed(budget, text):
    assert str(budget) == text


def test_one_budget_in_one_unit():
    assert one_budget("60%", None, None) == Budget(Unit.share, 0.6)
    assert one_budget(None, 5.5, None) == Budget(Unit.bits, 5.5)
    assert one_budget(None, None, 84) == Budget(Unit.components, 84)
    assert one_budget(None, None, None) is None
    with pytest.raises(DivergentTokensError, match="--bits and --count are two budgets"):
        one_budget(None, 5.5, 84)
