from dataclasses import replace

import pytest

import sweeps
from divergent_tokens.errors import RecordError
from divergent_tokens.search.overview import overview


def read(tmp_path, sweep):
    return sweeps.written(tmp_path / "sweep.db", sweep)


def test_the_measured_row_counts_but_where_it_is_rounding(tmp_path):
    made = sweeps.sweep(methods=("probe", "measure"))
    first = made.rows[1]
    assert first.method == "measure"
    rows = [replace(r, kl=1e-12) if r == first else r for r in made.rows]
    rows = [replace(r, kl=9e-9) if r.method == "measure" and r.kl > 1e-12 else r for r in rows]
    made = replace(made, rows=tuple(rows), rounding_kl=1e-10)
    found = {c["name"]: c["options"] for c in overview(read(tmp_path, made))["components"]}
    methods = [o["method"] for options in found.values() for o in options.values()]
    assert found[first.component][first.scheme]["method"] == "probe"
    assert methods.count("probe") == 1


def test_a_scheme_without_a_row_is_no_option(tmp_path):
    made = sweeps.sweep()
    found = overview(read(tmp_path, replace(made, rows=made.rows[:1])))
    assert [len(component["options"]) for component in found["components"]] == [1] + [0] * 27
    assert len(found["frontier"]) > 1


def test_the_frontier_falls_from_all_compressed_to_the_base(tmp_path):
    found = overview(read(tmp_path, sweeps.sweep()))
    kls = [point["kl"] for point in found["frontier"]]
    assert kls == sorted(kls, reverse=True)
    assert kls[-1] == 0
    smallest = [min(o["size_bytes"] for o in c["options"].values()) for c in found["components"]]
    assert found["frontier"][0]["size_bytes"] == sum(smallest)


def test_a_sweep_without_rows_is_refused(tmp_path):
    with pytest.raises(RecordError, match="holds no finished row"):
        overview(read(tmp_path, replace(sweeps.sweep(), rows=())))
