"""`dtm components`."""

import json

import pytest

import runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components") / "base"
    runs.model().network.save_pretrained(folder)
    runs.model().tokenizer.save_pretrained(folder)
    return folder


GOLDEN = """\
name                             kind                  layer  [out, in]  parameters  bytes
model.embed_tokens               embedding (left out)  –      [256, 32]  8,192       16,384
model.layers.0.self_attn.q_proj  q                     0      [32, 32]   1,024       2,048
"""


def test_every_matrix_with_totals_by_kind_and_the_ends_marked(dtm, base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    left = dtm("components", base)
    assert (left.code, left.err) == (0, "")
    lines = [line.rstrip() for line in left.out.splitlines()]
    assert lines[0].endswith("base: 14 components, 15,360 parameters, 30,720 bytes")
    start = lines.index(GOLDEN.splitlines()[0])
    assert lines[start : start + 3] == GOLDEN.splitlines()
    assert lines[start + 16].split()[:4] == ["lm_head", "head", "(left", "out)"]
    totals = lines[lines.index("By kind") + 1 :]
    assert totals[0].split() == ["kind", "components", "parameters", "bytes"]
    assert totals[1].split() == ["q", "2", "2,048", "4,096"]
    assert "unless --include names them: model.embed_tokens, lm_head." in left.out


def test_json_has_the_same_and_include_and_exclude_choose(dtm, base):
    everything = json.loads(dtm("components", base, "--format", "json").out)
    assert [c["name"] for c in everything["components"] if not c["included"]] == [
        "model.embed_tokens",
        "lm_head",
    ]
    assert len(everything["components"]) == 16
    assert everything["components"][1] == {
        "name": "model.layers.0.self_attn.q_proj",
        "kind": "q",
        "layer": 0,
        "shape": [32, 32],
        "n_parameters": 1024,
        "base_size_bytes": 2048,
        "size_bytes": {},
        "included": True,
    }
    chosen = dtm(
        "components", base, "--include", "*.mlp.*", "--include", "lm_head", "--format=json"
    )
    found = json.loads(chosen.out)["components"]
    assert [c["kind"] for c in found] == ["gate", "up", "down"] * 2 + ["head"]
    assert all(c["included"] for c in found)
    left = dtm("components", base, "--exclude", "re:mlp|head", "--format", "json")
    names = [c["name"] for c in json.loads(left.out)["components"]]
    assert len(names) == 9
    assert "lm_head" not in names
    assert "| lm\\_head | head (left out) |" in dtm("components", base, "--format=markdown").out


def test_what_matches_nothing_is_refused_with_the_nearest(dtm, base):
    left = dtm("components", base, "--include", "qproj")
    assert left.code == 2
    assert left.err.startswith("dtm: include 'qproj' matches no component")
    assert "q_proj" in left.err


def test_bytes_under_schemes_are_told_by_kind_and_in_json_one_by_one(dtm, base):
    schemes = ["--scheme", "int8", "--scheme", "int4:g8"]
    left = dtm("components", base, *schemes)
    assert (left.code, left.err) == (0, "")
    lines = [line.rstrip() for line in left.out.splitlines()]
    totals = [line.split() for line in lines[lines.index("By kind") + 1 :]]
    assert " ".join(totals[0]) == "kind components parameters bytes under int8 under int4:g8"
    # Codes of 8 bits and a float32 scale a row; of 4 bits and one for each 8 weights.
    assert totals[1] == ["q", "2", "2,048", "4,096", f"{2048 + 64 * 4:,}", f"{1024 + 256 * 4:,}"]
    assert totals[8][0] == "all"
    record = json.loads(dtm("components", base, *schemes, "--format", "json").out)
    assert record["schemes"] == ["int8", "int4:g8"]
    ends = [c for c in record["components"] if not c["included"]]
    assert [c["size_bytes"] for c in ends] == [{}, {}]
    assert record["components"][1]["size_bytes"] == {"int8": 1152, "int4:g8": 1024}


def test_a_scheme_that_does_not_fit_is_refused(dtm, base):
    left = dtm("components", base, "--scheme", "int4:g7")
    assert left.code == 2
    assert "groups of 7" in left.err
