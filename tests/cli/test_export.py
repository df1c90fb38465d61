"""`dtm export`, from a plan to another tool's file."""

import json

import pytest

from divergent_tokens.compress.plan_file import PlanFile, write_plan
from divergent_tokens.compress.tools import Tool


@pytest.fixture
def plan(tmp_path):
    base = {"reference": "b", "fingerprint": "0" * 64, "model_type": "llama", "config": {}}
    write_plan(tmp_path / "plan.json", PlanFile(base, {"model.layers.0.mlp.up_proj": "int8"}, 1, 2))
    return tmp_path / "plan.json"


@pytest.mark.parametrize("tool", list(Tool))
def test_the_command_knows_every_tool(dtm, plan, tool):
    left = dtm("export", plan, "--to", tool.value)
    assert (left.code, left.err) == (0, "")
    assert left.out


def test_to_the_standard_output_or_into_a_file(dtm, plan, tmp_path):
    left = dtm("export", plan, "--to", "gptqmodel")
    assert (left.code, left.err) == (0, "")
    assert json.loads(left.out)["bits"] == 8
    file = tmp_path / "types.txt"
    left = dtm("export", plan, "--to", "llama.cpp", "--out", file)
    assert file.read_text().startswith(r"^blk\.0\.ffn_up\.weight$=q8_0" + "\n")
    assert f"llama-quantize --tensor-type-file {file}" in left.out


def test_bad_input(dtm, plan, tmp_path):
    assert dtm("export", plan, "--to", "awq").code == 2
    left = dtm("export", tmp_path / "missing.json", "--to", "modelopt", "--out", tmp_path / "x")
    assert (left.code, left.out) == (2, "")
    assert "does not exist" in left.err
    assert not (tmp_path / "x").exists()
