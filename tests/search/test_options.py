"""What a sweep offers: which row counts, harm by each order, groups, and what is missing."""

import dataclasses
import math

import numpy as np
import pytest

import sweeps
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.errors import RecordError, SchemeError
from divergent_tokens.search.options import read_options
from divergent_tokens.search.settings import Method, RankBy

BOTH = ("probe", "measure")


def changed(sweep, **changes):
    """The sweep with some fields of its measured rows replaced."""
    rows = [
        dataclasses.replace(row, **changes) if row.method == "measure" else row
        for row in sweep.rows
    ]
    return dataclasses.replace(sweep, rows=tuple(rows))


def row_of(sweep, component, scheme, method):
    (found,) = [
        row
        for row in sweep.rows
        if (row.component, row.scheme, row.method) == (component, scheme, method)
    ]
    return found


def test_every_component_and_scheme_has_its_place():
    sweep = sweeps.sweep(n_layers=1)
    options = read_options(sweep)
    assert options.schemes == ("int8", "int4")
    assert options.names == tuple(component.name for component in sweep.components)
    assert (options.harm[:, 0] == 0).all()
    assert (options.size[:, 0] == [c.base_size_bytes for c in sweep.components]).all()
    for i, name in enumerate(options.names):
        for j, scheme in enumerate(options.schemes):
            row = row_of(sweep, name, scheme, "probe")
            assert options.harm[i, j + 1] == row.kl
            assert options.size[i, j + 1] == row.size_bytes
    assert options.base_size_bytes == 2 * options.n_parameters
    assert options.draws.shape == (7, 3, 32, 1)


def test_prompts_add_up_to_the_rows():
    sweep = sweeps.sweep(n_layers=1, n_draws=3)
    options = read_options(sweep)
    (kl,) = options.kl_under(np.ones((32, 1)))
    assert kl == pytest.approx(options.harm, rel=1e-5)
    twice = np.ones((32, 2))
    twice[:, 1] = [2.0, *[0.0] * 31]
    only_first = options.kl_under(twice)[1]
    assert only_first == pytest.approx(options.nats[:, :, 0] / sweeps.N_TOKENS, rel=1e-5)


def test_a_measured_kl_counts_unless_it_is_rounding():
    sweep = changed(sweeps.sweep(n_layers=1, methods=BOTH, schemes=("int8",)), kl=0.5)
    assert (read_options(sweep).harm[:, 1] == 0.5).all()
    assert read_options(sweep).draws is None
    probed = read_options(sweep, method=Method.probe)
    assert (probed.harm[:, 1] < 0.5).all()
    rounding = dataclasses.replace(sweep, rounding_kl=0.2)
    assert (read_options(rounding).harm == probed.harm).all()
    assert read_options(rounding).n_below_rounding == 0
    measured = read_options(rounding, method=Method.measure)
    assert (measured.harm[:, 1] == 0.5).all()
    assert measured.n_below_rounding == 7


def test_a_measured_kl_that_stands_alone_is_used_and_counted():
    sweep = sweeps.sweep(n_layers=1, methods=("measure",), schemes=("int8",))
    options = read_options(dataclasses.replace(sweep, rounding_kl=1.0))
    assert options.n_below_rounding == 7
    assert options.harm[:, 1] == pytest.approx([row.kl for row in sweep.rows])


def test_the_harm_of_each_order():
    sweep = sweeps.sweep(n_layers=1, methods=BOTH)
    row = row_of(sweep, sweep.components[2].name, "int4", "measure")
    expected = {
        RankBy.fdt: sweeps.N_TOKENS - row.fdt,
        RankBy.sdt: row.sdt,
        RankBy.dppl: math.log(row.dppl / 3.0),
        RankBy.weight_error: row.weight_error,
        RankBy.kl: row.kl,
    }
    for order, harm in expected.items():
        assert read_options(sweep, rank_by=order).harm[2, 2] == pytest.approx(harm), order
    texted = changed(sweep, ppl=20.0)
    texted.run["base_ppl"] = 25.0
    options = read_options(texted, rank_by=RankBy.ppl)
    assert options.harm[2, 2] == pytest.approx(math.log(20 / 25))  # it got better


def test_the_weight_error_needs_no_measurement():
    sweep = sweeps.sweep(n_layers=1)
    harm = read_options(sweep, rank_by=RankBy.weight_error).harm
    assert harm[0, 1] == sweep.rows[0].weight_error


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (RankBy.fdt, "fdt of .*q_proj under int8 was not measured; sweep with --method measure"),
        (RankBy.ppl, "--method measure and --text FILE, or rank by kl"),
    ],
)
def test_what_was_not_measured_ranks_nothing(order, message):
    with pytest.raises(RecordError, match=message):
        read_options(sweeps.sweep(n_layers=1), rank_by=order)


def test_several_schemes_are_weighed_against_the_bases_own_perplexity():
    sweep = sweeps.sweep(n_layers=1, methods=("measure",))
    sweep.run["base_dppl"] = None
    with pytest.raises(RecordError, match="does not hold the base's own dppl"):
        read_options(sweep, rank_by=RankBy.dppl)
    one = read_options(sweep, rank_by=RankBy.dppl, schemes=["int4"])
    assert one.harm[0, 1] == math.log(row_of(sweep, one.names[0], "int4", "measure").dppl)


def test_schemes_to_choose_from():
    sweep = sweeps.sweep(n_layers=1, schemes=("int8", "int6", "int4"))
    options = read_options(sweep, schemes=["int4", "int8"])
    assert options.schemes == ("int4", "int8")
    assert options.size[0, 1] < options.size[0, 2]
    with pytest.raises(RecordError, match=r"nothing on the scheme 'int3'; it has int8, int6, int4"):
        read_options(sweep, schemes=["int3"])


def test_an_unfinished_sweep_is_to_be_finished():
    sweep = sweeps.sweep(n_layers=1)
    cut = dataclasses.replace(sweep, rows=sweep.rows[:-1])
    with pytest.raises(RecordError, match=r"no row for .*down_proj under int4; run `dtm sweep` ag"):
        read_options(cut)
    with pytest.raises(RecordError, match="--method measure, which goes on"):
        read_options(sweep, method=Method.measure)
    with pytest.raises(RecordError, match="holds no finished row"):
        read_options(dataclasses.replace(sweep, rows=()))


def test_a_file_offers_what_was_written_to_it(tmp_path):
    sweep = sweeps.sweep(n_layers=1, methods=BOTH)
    sweep = dataclasses.replace(sweep, rounding_kl=1e-3)
    for order in (RankBy.kl, RankBy.fdt, RankBy.dppl):
        before = read_options(sweep, rank_by=order)
        after = read_options(sweeps.written(tmp_path / "sweep.db", sweep), rank_by=order)
        for name, value in vars(before).items():
            assert np.array_equal(value, getattr(after, name)), name


def test_coupled_components_add_up():
    sweep = sweeps.sweep(n_layers=2, schemes=("int8", "int6", "int4"))
    alone = read_options(sweep)
    options = read_options(sweep, coupling=Coupling.vllm)
    assert options.schemes == ("int8", "int4")
    assert options.n_members.tolist() == [3, 1, 2, 1] * 2
    qkv = list(options.groups[0])
    assert options.harm[0, 2] == pytest.approx(alone.harm[qkv, 3].sum())
    assert options.size[0].tolist() == alone.size[qkv][:, [0, 1, 3]].sum(0).tolist()
    assert options.nats[0, 2] == pytest.approx(alone.nats[qkv, 3].sum(0))
    assert options.draws[0, 2] == pytest.approx(alone.draws[qkv, 3].sum(0))
    chosen = options.schemes_of(np.array([0, 2, 1, 0] * 2))
    assert list(chosen) == [name for name in options.names if name[-6] in "oep"]
    assert set(chosen.values()) == {"int8", "int4"}


def test_a_coupling_that_leaves_nothing():
    with pytest.raises(SchemeError, match="int6: vLLM loads 4 and 8 bits"):
        read_options(sweeps.sweep(n_layers=1, schemes=("int6",)), coupling=Coupling.vllm)
