"""The points of the curve."""

import pytest

import sweeps
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.flips import UNFITTED
from divergent_tokens.search.curve import curve, quarters
from divergent_tokens.search.settings import RankBy, Settings


def test_every_order_at_every_count():
    sweep = sweeps.sweep(schemes=("int8",), scale=1e-6)
    orders = (RankBy.weight_error, RankBy.kl)
    points = curve(sweep, orders, (7, 14), Settings(), UNFITTED)
    assert [point.name for point in points] == [
        "weight-error 7",
        "weight-error 14",
        "kl 7",
        "kl 14",
    ]
    by_error, by_kl = points[1].offer, points[3].offer
    assert by_error.components.keys() != by_kl.components.keys()
    assert by_kl.forecast.kl < by_error.forecast.kl
    file = points[0].plan_file(sweep.run["base"])
    assert file.components == points[0].offer.components
    assert file.base == sweep.run["base"]
    record = points[0].to_json({"step": "measured"})
    assert (record["rank_by"], record["n_components"]) == ("weight-error", 7)
    assert record["measured"] == {"step": "measured"}


def test_a_count_out_of_reach():
    with pytest.raises(DivergentTokensError, match="has 28 components"):
        curve(sweeps.sweep(), [RankBy.kl], (14, 29), Settings(), UNFITTED)


@pytest.mark.parametrize(
    ("n", "counts"), [(210, (52, 105, 157, 210)), (2, (1, 2)), (1, (1,)), (3, (1, 2, 3))]
)
def test_quarters(n, counts):
    assert quarters(n) == counts
