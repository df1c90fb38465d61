"""docs/reproduction.md is what its script makes of the results; its rules decide as they say."""

import copy
import importlib.util
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"


@pytest.fixture(scope="module")
def script():
    """benchmarks/reproduction.py, whose files are no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(
            "reproduction", BENCHMARKS / "reproduction.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["reproduction"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def results(script):
    return script.reader(script.RESULTS)


def changed(results, **files):
    """The same results with some files in place of others; None takes one away."""
    return lambda name: files[name] if name in files else results(name)


def test_the_committed_page_and_figures_are_what_the_script_makes(script, results):
    made = script.made(results)
    for name, text in made.items():
        assert (DOCS / name).read_text("utf-8") == text, (
            f"docs/{name} is not what its results say; run python benchmarks/reproduction.py"
        )
    figures = {f"figures/{path.name}" for path in (DOCS / "figures").glob("*.svg")}
    assert {name for name in made if name.startswith("figures/")} <= figures


def test_every_claim_names_its_rule_its_limits_and_files_that_are_there(script, results):
    claims = [claim(results) for claim in script.CLAIMS]
    assert len(claims) == 7
    page = (DOCS / "reproduction.md").read_text("utf-8")
    for claim in claims:
        assert claim.verdict in ("holds", "holds in part", "does not hold", "not measured yet")
        assert f"| [{claim.title}](#{script.anchor(claim.title)}) | **{claim.verdict}** |" in page
        assert claim.rule.endswith(".")
        assert claim.limits.endswith(".")
        for name in claim.results:
            assert (script.RESULTS / f"{name}.json").is_file()
            assert f"`benchmarks/results/{name}.json`" in page


def test_every_number_of_a_table_comes_from_the_results(script, results):
    """Another result gives another page: nothing on it is written by hand."""
    run = copy.deepcopy(results("llm-int8"))
    run["held_out"]["189 of 210"]["fdt"]["value"] = 55.5
    page = script.made(changed(results, **{"llm-int8": run}))["reproduction.md"]
    assert "| 189 of 210 | 85.3% | 55.5 (" in page


def test_figures_are_wellformed_said_aloud_and_on_the_page(script, results):
    made = script.made(results)
    for name, text in made.items():
        if not name.endswith(".svg"):
            continue
        root = ElementTree.fromstring(text)
        assert root.attrib["role"] == "img"
        assert root[0].text
        assert f"]({name})" in made["reproduction.md"]
        assert "nan" not in text
        width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
        for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height


def verdict(script, name, results):
    (claim,) = (claim for claim in script.CLAIMS if claim.__name__ == name)
    return claim(results).verdict


def test_absmax_by_its_rule(script, results):
    run = copy.deepcopy(results("llm-int8"))
    held = run["held_out"]
    for name, row in held.items():
        row["fdt"]["value"] = 20.0 if name.startswith("llm") else 10.0
        row["kl"]["value"] = 0.01 if name.startswith("llm") else 0.02
    planted = changed(results, **{"llm-int8": run})
    assert verdict(script, "absmax", planted) == "does not hold"
    held["189 of 210"]["fdt"]["value"] = 20.0
    assert verdict(script, "absmax", planted) == "holds in part"
    held["189 of 210"]["kl"]["value"] = 0.01
    assert verdict(script, "absmax", planted) == "holds"


def test_orders_by_its_rule(script, results):
    files = {}
    for name in ("selection-timed", "selection-int8-tensor", "selection-int8-channel"):
        files[name] = copy.deepcopy(results(name))
        for key, row in files[name]["held_out"].items():
            value = 60.0 if ", FDT, " in key else 50.0
            row["fdt"] = {"value": value, "low": value - 20, "high": value + 20}
    planted = changed(results, **files)
    assert verdict(script, "orders", planted) == "holds"
    cell = files["selection-timed"]["held_out"]["int8, PPL, 42"]
    cell["fdt"] = {"value": 99.0, "low": 90.0, "high": 100.0}  # clearly above, once
    assert verdict(script, "orders", planted) == "holds in part"
    for file in files.values():
        for key, row in file["held_out"].items():
            if ", FDT, " not in key:
                row["fdt"] = {"value": 99.0, "low": 50.0, "high": 100.0}
    assert verdict(script, "orders", planted) == "does not hold"


def test_perplexity_by_its_rule(script, results):
    run = copy.deepcopy(results("gptq"))
    held = run["held_out"]
    planted = changed(results, gptq=run)
    pair = held["int8:g64"], held["gptq:int8:g64"]
    pair[0]["fdt"] |= {"low": 60.0, "high": 74.0}
    pair[1]["fdt"] |= {"low": 76.0, "high": 99.0}
    assert verdict(script, "perplexity", planted) == "holds"
    for row in held.values():  # nothing differs
        for metric in ("fdt", "sdt", "kl"):
            row[metric] = {"value": 1.0, "low": 0.5, "high": 2.0}
    assert verdict(script, "perplexity", planted) == "does not hold"


def test_others_by_its_rule(script, results):
    run = copy.deepcopy(results("gptq"))
    planted = changed(results, gptq=run)
    assert verdict(script, "others", planted) == "holds in part"
    run["held_out"]["gptq:int2:g64"]["kl"] |= {"low": 1.0, "high": 2.0}
    assert verdict(script, "others", planted) == "holds"


KINDS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)


def recovery(**runs):
    """A file as benchmarks/pruning.py writes it; values are (PPL, SDT, attention, MLP, beyond)."""
    found = {}
    for name, values in runs.items():
        ppl, sdt, attention, mlp, beyond = values
        rate = 1e-3 if "1e-3" in name else 3e-4
        found[name] = {
            "settings": {"rounds": 10, "steps": 60, "lr": rate, "n_saliency": 64},
            "after": {"ppl": ppl, "fdt": 3.0, "sdt": sdt, "kl": 0.5},
            "sparsity": 0.75,
            "attention": attention,
            "mlp": mlp,
            "attention_beyond": beyond,
            "sparsities": {f"model.layers.0.{kind}_proj": 0.7 for kind in KINDS},
        }
    return {"command": "python benchmarks/pruning.py", "device": "a GPU", "found": found}


def recovered(results, file):
    return changed(results, **{"pruning-recovery": file})


UNIFORM = (60.0, 0.3, 0.75, 0.75, 0.0)


def test_pruning_waits_for_its_file_and_takes_it(script, results):
    nothing = recovered(results, None)
    assert verdict(script, "guided", nothing) == verdict(script, "attention", nothing)
    assert verdict(script, "guided", nothing) == "not measured yet"
    seeds = (0, 1, 2)
    file = recovery(
        **{f"magnitude/uniform, 0.75, seed {s}": UNIFORM for s in seeds},
        **{f"fisher/global, 0.75, seed {s}": (50.0, 0.2, 0.85, 0.7, 0.3) for s in seeds},
        **{"fisher/global, 0.5, seed 0": (99.0, 0.9, 0.1, 0.9, 0.0)},  # another sparsity
    )
    planted = recovered(results, file)
    assert verdict(script, "guided", planted) == verdict(script, "attention", planted) == "holds"
    page = script.made(planted)["reproduction.md"]
    assert "| fisher/global | magnitude/uniform | 3 | 0.83 | 0.67 | 1.00 | 1.00 |" in page
    assert "recovery between rounds: not measured" not in page
    assert "figures/attention.svg" in page
    assert "3 seeds; values without intervals" in page

    one = file["found"]["fisher/global, 0.75, seed 1"]
    one["after"]["sdt"] = 0.31
    one["attention_beyond"] = 0.2
    assert verdict(script, "guided", planted) == "holds in part"
    assert verdict(script, "attention", planted) == "holds in part"
    for name, run in file["found"].items():
        if name.startswith("fisher"):
            run["after"] |= {"ppl": 70.0, "sdt": 0.4}
            run |= {"attention": 0.6, "attention_beyond": 0.0}
    assert verdict(script, "guided", planted) == "does not hold"
    assert verdict(script, "attention", planted) == "does not hold"


def test_a_guided_run_is_held_against_every_uniform_one_that_was_trained_alike(script, results):
    file = recovery(
        **{
            "magnitude/uniform, 0.75, seed 0": UNIFORM,
            "magnitude/uniform, 0.75, seed 1": (80.0, 0.4, 0.7, 0.7, 0.0),
            "fisher/uniform-spared, 0.75, seed 1": (90.0, 0.5, 0.7, 0.7, 0.0),
            "magnitude/uniform, 0.75, seed 1, 1e-3": (10.0, 0.1, 0.7, 0.7, 0.0),
            "fisher/global, 0.75, seed 0": (50.0, 0.2, 0.8, 0.7, 0.3),
            "fisher/global, 0.75, seed 1": (48.0, 0.1, 0.8, 0.7, 0.3),
            "fisher/kl/repair, 0.75, seed 1, 256 sequences": (40.0, 0.2, 0.8, 0.7, 0.3),
        }
    )
    many = file["found"]["fisher/kl/repair, 0.75, seed 1, 256 sequences"]
    many["settings"]["n_saliency"] = 256
    page = script.made(recovered(results, file))["reproduction.md"]
    assert re.findall(
        r"^\| (fisher/\S+.*) \| (\S+) \| (\d) \| (.*?) \| (.*?) \|", page, re.MULTILINE
    ) == [
        ("fisher/global", "magnitude/uniform", "2", "0.60 to 0.83", "0.25 to 0.67"),
        ("fisher/global", "fisher/uniform-spared", "1", "0.53", "0.20"),
        ("fisher/kl/repair, 256 sequences", "magnitude/uniform", "1", "0.50", "0.50"),
        ("fisher/kl/repair, 256 sequences", "fisher/uniform-spared", "1", "0.44", "0.40"),
    ]


def test_how_many_prompts_by_its_rule(script, results):
    run = copy.deepcopy(results("coverage"))
    planted = changed(results, coverage=run)
    for row in run["results"]:
        row["mean_width"] = 0.01 * row["value"]
    assert verdict(script, "prompts", planted) == "holds"
    for row in run["results"]:
        row["mean_width"] = 1e9 if row["metric"] == "kl" else 0.01 * row["value"]
    assert verdict(script, "prompts", planted) == "holds in part"
    for row in run["results"]:
        row["mean_width"] = 1e9
    assert verdict(script, "prompts", planted) == "does not hold"


def test_prefixes_and_lengths_stand_there_where_a_model_was_tried(script, results):
    run = copy.deepcopy(results("pilot"))
    estimate = {"value": 0.02, "low": 0.01, "high": 0.03}
    check = {"candidate": "int8", "metric": "kl", "new_tokens": 64, "later": estimate}
    cell = {"prefix": 16, "new_tokens": 64, "n_prompts": 280, "repeated": 0.4}
    run["model"] = {
        "prefix": 64,
        "checks": [check | {"foretold": 0.03, "found": 0.02}],
        "pilot": {"cells": [cell | {"candidates": [{"censored": 0.25}, {"censored": 0.125}]}]},
    }
    page = script.made(changed(results, pilot=run))["reproduction.md"]
    assert "| 16 | 64 | 280 | 25.0% | 40.0% |" in page
    assert "| int8, KL, 64 new tokens | 0.0200 (0.010–0.030) | 1.50 |" in page
    del run["model"]
    page = script.made(changed(results, pilot=run))["reproduction.md"]
    assert "on a model: not measured yet." in page


def test_a_result_that_is_missing_is_named(script, results):
    with pytest.raises(FileNotFoundError, match=r"results/gptq\.json is not there"):
        script.made(changed(results, gptq=None))
