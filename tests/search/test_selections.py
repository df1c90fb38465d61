"""What a budget buys, in an order and by the knapsack, and budgets that cannot be met."""

import itertools

import numpy as np
import pytest

import sweeps
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.search.budgets import Budget, Unit, parse_share
from divergent_tokens.search.options import read_options
from divergent_tokens.search.selections import around, select
from divergent_tokens.search.settings import RankBy


def count(n):
    return Budget(Unit.components, n)


def share(x):
    return Budget(Unit.share, x)


def bits(x):
    return Budget(Unit.bits, x)


@pytest.fixture(scope="module")
def one():
    return read_options(sweeps.sweep(schemes=("int8",)))


@pytest.fixture(scope="module")
def two():
    return read_options(sweeps.sweep(schemes=("int8", "int4")))


def test_a_count_takes_the_least_harmful_each_by_its_best_scheme(two):
    found = select(two, count(9))
    assert np.count_nonzero(found.options) == 9
    assert found.gap is None
    least = np.sort(two.harm[:, 1:].min(1))
    chosen = np.flatnonzero(found.options)
    assert np.sort(two.harm[chosen, found.options[chosen]]).tolist() == least[:9].tolist()


def test_one_scheme_is_taken_in_order_until_the_size_is_met(one):
    order = np.argsort(one.harm[:, 1])
    found = select(one, share(0.7))
    n = np.count_nonzero(found.options)
    assert (np.sort(order[:n]) == np.flatnonzero(found.options)).all()
    limit = 0.7 * one.base_size_bytes
    last = order[n - 1]
    assert found.size_bytes <= limit < found.size_bytes + one.size[last, 0] - one.size[last, 1]


def test_greedy_choices_are_nested(one):
    budgets = [share(x) for x in (0.95, 0.8, 0.65, 0.53)]
    chosen = [select(one, budget).options for budget in budgets]
    for less, more in itertools.pairwise(chosen):
        assert (more >= less).all()


def test_of_equals_the_first_is_taken(one):
    harm = np.where(one.harm > 0, 1.0, 0.0)
    assert np.flatnonzero(select(one, count(3), harm).options).tolist() == [0, 1, 2]


@pytest.mark.parametrize("budget", [share(0.4), bits(6.4)])
def test_several_schemes_are_a_knapsack(budget, two):
    found = select(two, budget, prove=True)
    assert found.size_bytes <= 0.4 * two.base_size_bytes
    assert found.gap == 0
    harm = two.harm[np.arange(len(two.harm)), found.options].sum()
    quick = select(two, budget)
    assert quick.gap >= 0
    # Every component at the same: int8 for some, in order, int4 for the others.
    for order in (np.argsort(two.harm[:, 2]), np.arange(len(two.harm))):
        options = np.ones(len(two.harm), int)
        for component in order:
            if two.size[np.arange(len(options)), options].sum() <= found.size_bytes:
                break
            options[component] = 2
        assert harm <= two.harm[np.arange(len(options)), options].sum()


def test_a_scheme_that_saves_nothing_is_no_use_for_a_size(one):
    size = one.size.copy()
    size[:5, 1] = size[:5, 0]
    options = type(one)(**{**vars(one), "size": size})
    found = select(options, share(0.7))
    assert not found.options[:5].any()


def test_coupled_groups_stand_by_their_mean_harm():
    options = read_options(sweeps.sweep(schemes=("int8",)), coupling=Coupling.vllm)
    mean = options.harm[:, 1] / options.n_members
    found = select(options, count(12))
    members = options.n_members[found.options > 0]
    assert members.sum() == 12
    # Only what no longer fitted was passed over.
    worst = mean[found.options > 0].max()
    passed = (found.options == 0) & (mean < worst)
    assert (options.n_members[passed] > 1).all()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (count(29), r"--count 29 cannot be met: the sweep has 28 components; give --count 28 or"),
        (share(0.2), r"--budget 20% cannot be met: the smallest plan with int8, int4 takes .* of"),
        (bits(3), r"--bits 3 cannot be met: .* give --bits 4\.\d+ or more, or sweep smaller"),
        (bits(16), r"--bits 16 is met without a change: the base takes 16 bits a weight"),
    ],
)
def test_budgets_that_cannot_be_met(budget, message, two):
    with pytest.raises(DivergentTokensError, match=message):
        select(two, budget)


@pytest.mark.parametrize("schemes", [("int8",), ("int8", "int4")])
@pytest.mark.parametrize("unit", [Unit.share, Unit.bits])
def test_the_nearest_budget_that_is_named_can_be_met(unit, schemes):
    options = read_options(sweeps.sweep(schemes=schemes))
    with pytest.raises(DivergentTokensError) as caught:
        select(options, Budget(unit, 0.01))
    named = str(caught.value).split("give --")[1].split(" or more")[0].split()[1]
    value = parse_share(named) if unit is Unit.share else float(named)
    assert select(options, Budget(unit, value)).size_bytes <= value * options.base_size_bytes


def test_counts_that_groups_do_not_add_up_to():
    sweep = sweeps.sweep(n_layers=1, schemes=("int8",))
    options = read_options(sweep, coupling=Coupling.vllm)
    harm = np.c_[np.zeros(4), [1, 9, 2, 8]]  # q k v together, o, gate and up, down
    with pytest.raises(DivergentTokensError, match="nearest are --count 3 and --count 5"):
        select(
            type(options)(**{**vars(options), "groups": ((0, 1, 2), (3, 4))}), count(4), harm[:2]
        )
    assert select(options, count(4), harm).options.tolist() == [1, 0, 0, 1]


def test_every_order_meets_a_budget():
    sweep = sweeps.sweep(schemes=("int8", "int4"), methods=("measure",))
    for order in (RankBy.fdt, RankBy.sdt, RankBy.dppl, RankBy.weight_error):
        options = read_options(sweep, rank_by=order)
        found = select(options, share(0.4), prove=True)
        assert found.size_bytes <= 0.4 * options.base_size_bytes
        assert found.gap == pytest.approx(0, abs=1e-9)


def test_budgets_around_one_that_can_be_met(two, one):
    assert [b.value for b in around(two, count(20))] == [10, 15, 20, 25]
    assert [b.value for b in around(two, count(1))] == [1, 2]
    assert [b.value for b in around(two, share(0.3))] == [0.3, 0.35, 0.4]
    assert [str(b) for b in around(one, bits(15.2))] == [
        "--bits 14.2",
        "--bits 14.7",
        "--bits 15.2",
        "--bits 15.7",
    ]
