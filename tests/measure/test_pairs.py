import numpy as np
import pytest

from divergent_tokens.measure.pairs import compare_pairs

LENGTHS = np.full(40, 20)
RNG = np.random.default_rng(0)
NEAR = RNG.integers(10, 21, 40)
FDT = {
    "near": NEAR,
    "nearly as near": np.clip(NEAR - RNG.integers(-1, 2, 40), 0, 20),
    "far": RNG.integers(0, 6, 40),
}


def pairs_of(fdt, **options):
    found = compare_pairs(fdt, LENGTHS[: len(NEAR)], level=0.95, seed=0, **options)
    return {(pair.a, pair.b): pair for pair in found}


def test_every_pair_once_with_its_difference():
    found = pairs_of(FDT)
    assert list(found) == [("near", "nearly as near"), ("near", "far"), ("nearly as near", "far")]
    for (a, b), pair in found.items():
        assert pair.fdt_difference.value == pytest.approx((FDT[a] - FDT[b]).mean())
        assert pair.fdt_difference.low < pair.fdt_difference.value < pair.fdt_difference.high


def test_what_is_far_off_is_told_from_what_is_alike():
    found = pairs_of(FDT)
    assert found["near", "far"].p_holm < 0.001
    assert found["near", "far"].fdt_difference.low > 0
    assert found["near", "nearly as near"].p_value > 0.05


def test_p_values_are_corrected_for_the_number_of_pairs():
    found = sorted(pairs_of(FDT).values(), key=lambda pair: pair.p_value)
    assert found[0].p_holm == pytest.approx(3 * found[0].p_value)
    assert all(pair.p_holm >= pair.p_value for pair in found)
    alone = pairs_of({name: FDT[name] for name in ("near", "far")})
    assert alone["near", "far"].p_holm == alone["near", "far"].p_value


def test_the_order_of_candidates_changes_signs_only():
    forwards, backwards = pairs_of(FDT), pairs_of(dict(reversed(FDT.items())))
    for (a, b), pair in forwards.items():
        other = backwards[b, a]
        assert other.p_value == pair.p_value
        assert other.p_holm == pytest.approx(pair.p_holm)
        assert other.fdt_difference.value == -pair.fdt_difference.value


def test_one_candidate_has_no_pair_and_equals_do_not_differ():
    assert pairs_of({"near": NEAR}) == {}
    (pair,) = pairs_of({"a": NEAR, "b": NEAR}).values()
    assert (pair.p_value, pair.p_holm, pair.fdt_difference.value) == (1, 1, 0)
    assert pair.to_json()["fdt_difference"]["value"] == 0
    assert {"a", "b", "p_value", "p_holm"} <= pair.to_json().keys()
