"""`dtm search` in this process, on a probed tiny model and on files that are wrong."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import runs
import sweeps
import tiny
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan_file import PlanFile, read_plan, write_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.prompts import read_prompts
from divergent_tokens.models import load_model
from divergent_tokens.probe import kl_of, probe
from divergent_tokens.report.records import read_source
from divergent_tokens.sensitivities import (
    ComponentRow,
    PromptRow,
    Sensitivity,
    open_sensitivities,
)

N_PROMPTS, PREFIX, NEW_TOKENS = 6, 8, 12
SCHEMES = ("int8", "int4:g8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, prompts, and the base's probed sweep on the first six of them."""
    place = tmp_path_factory.mktemp("search")
    model = runs.model()
    model.network.save_pretrained(place / "base")
    model.tokenizer.save_pretrained(place / "base")
    rows = [{"text": f"{i} {sentence}"} for i in range(4) for sentence in tiny.SENTENCES]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_sweep(place)
    return place


def write_sweep(place):
    base = load_model(place / "base")
    prompts = read_prompts(str(place / "prompts.jsonl"), base, n_prompts=N_PROMPTS, prefix=PREFIX)
    completions = complete(base, prompts, new_tokens=NEW_TOKENS)
    components = find_components(base.network)
    schemes = [parse_scheme(text) for text in SCHEMES]
    found = probe(base, components, schemes, completions, n_draws=2)
    run = {
        "base": {
            "reference": str(place / "base"),
            "fingerprint": base.fingerprint,
            "model_type": "llama",
            "config": base.network.config.to_dict(),
        },
        "dtype": "float32",
        "prompts": {
            "source": prompts.source,
            "digest": prompts.digest,
            "prefix": PREFIX,
            "n_prompts": N_PROMPTS,
        },
        "new_tokens": NEW_TOKENS,
        "ignore_eos": False,
    }
    rng = np.random.default_rng(0)
    margins = [rng.gamma(1, 3, length) for length in completions.lengths]
    with open_sensitivities(
        place / "sweep.db",
        json.loads(json.dumps(run, default=str)),
        [
            ComponentRow(c.name, c.kind, c.layer, *c.shape, c.n_parameters, c.base_size_bytes)
            for c in components
        ],
        [PromptRow(i, p.digest, None, None) for i, p in enumerate(prompts.prompts)],
        margins,
    ) as writer:
        for i, component in enumerate(components):
            for j, scheme in enumerate(schemes):
                draws = found.draws[i, j]
                kl, kl_se = kl_of(draws, completions.lengths)
                size = scheme.size_bytes(component)
                row = Sensitivity(
                    *(component.name, str(scheme), "probe", kl, kl_se),
                    *(None, None, None, None, None),
                    *(float(found.weight_errors[i, j]), N_PROMPTS, size, 0.1),
                )
                writer.add(row, draws=draws)


@pytest.fixture
def search(dtm, place):
    """`dtm search SWEEP ...`, with the cache of `place`."""

    def run(*arguments, sweep=place / "sweep.db"):
        return dtm("search", sweep, "--cache", place / "cache", *arguments)

    return run


def held_out(place, *, skip=N_PROMPTS):
    prompts = ["--prompts", place / "prompts.jsonl", "--n-prompts", 5]
    return [*prompts, "--skip-prompts", skip]


# --- what it does ---


def test_it_starts_without_torch():
    code = (
        "import sys; sys.argv = ['dtm', 'search', '--help']\n"
        "from divergent_tokens import cli\n"
        "try: cli.main()\n"
        "finally: print({'torch', 'transformers', 'numpy', 'scipy'} & sys.modules.keys())"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert left.stdout.endswith("set()\n")
    for option in ("--budget", "--bits", "--count", "--rank-by", "--couple", "--curve"):
        assert option in left.stdout


def test_a_plan_without_a_model_needs_no_torch(place, tmp_path):
    code = (
        f"import sys; sys.argv = ['dtm', 'search', {str(place / 'sweep.db')!r}, '--count', '3', "
        f"'--out', {str(tmp_path / 'plan.json')!r}]\n"
        "from divergent_tokens import cli\n"
        "try: cli.main()\n"
        "finally: print({'torch', 'transformers'} & sys.modules.keys())"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert left.stdout.endswith("set()\n")
    assert len(read_plan(tmp_path / "plan.json").components) == 3


def test_a_budget_gives_a_plan_and_says_what_to_expect(search, place, tmp_path):
    left = search("--budget", "60%", "--out", tmp_path / "plan.json")
    assert (left.code, left.err) == (0, "")
    assert "What may be expected on other prompts" in left.out
    assert "▸ 60.0%" in left.out
    assert "not fitted on this base" in " ".join(left.out.split())
    assert max(map(len, left.out.splitlines())) <= 80
    file = read_plan(tmp_path / "plan.json")
    assert file.size_bytes <= 0.6 * file.base_size_bytes
    assert file.base["reference"] == str(place / "base")
    (step,) = file.trail
    assert step["budget"] == {"unit": "budget", "value": 0.6}
    assert step["predicted"]["kl_joint"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("budget", [["--bits", 9], ["--count", 4]])
def test_other_budgets(budget, search):
    left = search(*budget, "--format", "json")
    record = json.loads(left.out)
    (chosen,) = [one for one in record["around"] if one["budget"] == record["budget"]]
    if budget[0] == "--count":
        assert chosen["n_components"] == 4
    else:
        assert chosen["bits"] <= 9


def test_one_scheme_of_the_sweep_and_another_order(search):
    options = ["--scheme", "int8", "--rank-by", "weight-error", "--method", "probe"]
    left = search("--count", 5, *options, "--format", "json")
    record = json.loads(left.out)
    assert (record["rank_by"], record["schemes"]) == ("weight-error", ["int8"])
    assert record["method"] == "probe"
    assert all(one["schemes"].keys() == {"int8"} for one in record["around"])


def test_coupled_for_a_server(search, tmp_path):
    out = tmp_path / "plan.json"
    left = search("--budget", "60%", "--couple", "vllm", "--out", out)
    assert left.code == 0
    plan = read_plan(out).components
    for layer in range(2):
        block = f"model.layers.{layer}.self_attn"
        assert len({plan.get(f"{block}.{part}_proj") for part in "qkv"}) == 1


def test_markdown(search):
    left = search("--count", 4, "--format", "markdown")
    assert left.code == 0
    assert "| budget | changed | bytes | bits | KL | SDT | FDT |" in left.out


def test_a_plan_is_measured_on_prompts_that_did_not_choose_it(search, place, tmp_path):
    out = tmp_path / "plan.json"
    left = search("--budget", "60%", *held_out(place), "--out", out)
    assert left.code == 0
    assert "predicted and measured on 5 prompts of 8 tokens" in " ".join(left.out.split())
    assert "None of the prompts measured on" in " ".join(left.out.split())
    _, step = read_plan(out).trail
    assert step["step"] == "measured"
    assert step["overlap"] == 0
    assert step["prompts"] | {"source": ""} == {
        "source": "",
        "digest": step["prompts"]["digest"],
        "n_prompts": 5,
        "skipped": N_PROMPTS,
        "prefix": PREFIX,
        "new_tokens": NEW_TOKENS,
    }
    assert step["metrics"]["kl"]["value"] > 0


def test_prompts_that_overlap_are_counted(search, place):
    left = search("--count", 4, *held_out(place, skip=3))
    assert "3 of the 5 prompts measured on chose the plan too" in " ".join(left.out.split())


def test_what_was_measured_of_a_plan_fits_the_law(search, place, tmp_path):
    out = tmp_path / "plan.json"
    search("--budget", "60%", *held_out(place), "--out", out)
    left = search("--budget", "60%", "--fit-on", out, "--format", "json")
    reading = read_plan(out).trail[1]["reading"]
    assert json.loads(left.out)["law"]["sdt"]["value"] == pytest.approx(reading["sdt"])


def test_compare_gives_the_same_numbers_for_the_plan(search, dtm, place, tmp_path):
    out = tmp_path / "plan.json"
    search("--budget", "60%", *held_out(place), "--out", out)
    common = ["--prefix", PREFIX, "--new-tokens", NEW_TOKENS, "--cache", place / "cache"]
    common += held_out(place)
    left = dtm("compare", place / "base", "--plan", out, *common, "--format", "json")
    assert (left.code, left.err) == (0, "")
    (candidate,) = json.loads(left.out)["candidates"]
    assert candidate["name"] == str(out)
    assert candidate["metrics"] == read_plan(out).trail[1]["metrics"]


def test_a_curve_of_two_orders(search, place, tmp_path):
    out, curve = tmp_path / "plan.json", tmp_path / "curve.json"
    orders = ["--rank-by", "kl", "--rank-by", "weight-error"]
    left = search(
        *("--curve", "--counts", "3,14", *orders, *held_out(place)),
        *("--scheme", "int8", "--count", 7, "--out", out, "--curve-out", curve),
    )
    assert (left.code, left.err) == (0, "")
    record = json.loads(curve.read_text())
    assert record["schema"] == "divergent-tokens/curve/1"
    assert read_source(curve).kind == "curve"  # by its schema
    points = record["points"]
    assert [(p["rank_by"], p["n_components"]) for p in points] == [
        (order, n) for order in ("kl", "weight-error") for n in (3, 14)
    ]
    kls = [point["measured"]["metrics"]["kl"]["value"] for point in points]
    assert kls[0] < kls[1] == kls[3]
    assert all(point["predicted"]["fdt"] for point in points)
    assert [step["step"] for step in read_plan(out).trail] == ["search", "measured"]
    words = " ".join(left.out.split())
    assert "The curve, predicted and measured on 5 prompts" in words
    assert "With these measurements the flip law has" in words


def test_a_curve_alone_goes_by_quarters(search, place, tmp_path):
    left = search("--curve", "--scheme", "int8", *held_out(place), "--format", "json")
    record = json.loads(left.out)
    assert [point["n_components"] for point in record["curve"]] == [3, 7, 10, 14]
    assert record["measured"] is None
    table = search("--curve", "--scheme", "int8", *held_out(place))
    assert "no plan was asked for" in " ".join(table.out.split())


def test_a_curve_without_a_file_of_its_own_is_in_the_trail(search, place, tmp_path):
    out = tmp_path / "plan.json"
    search("--curve", "--counts", "3", "--count", 3, *held_out(place), "--out", out)
    *_, step = read_plan(out).trail
    assert step["step"] == "curve"
    assert len(step["points"]) == 1


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no budget; give --budget 60%, --bits 5.5 or --count 84"),
        (["--budget", "60%", "--count", 3], "--budget and --count are two budgets; give one"),
        (["--budget", "60"], r"--budget is '60'; expected a share .* as in 60% or 0\.6"),
        (["--budget", "10%"], r"--budget 10% cannot be met: the smallest plan .* or more"),
        (["--bits", 0], r"--bits is 0\.0; expected a number such as 5\.5"),
        (["--bits", 2], r"--bits 2 cannot be met: .*give --bits \d+"),
        (["--bits", 16], "met without a change"),
        (["--count", 15], "the sweep has 14 components; give --count 14 or less"),
        (["--count", 0], "Invalid value for '--count'"),
        (["--count", 3, "--rank-by", "fdt"], "fdt of .* was not measured; sweep with --method"),
        (["--count", 3, "--rank-by", "kl", "--rank-by", "sdt"], "one order makes a plan, and 2"),
        (["--count", 3, "--rank-by", "fd"], "'fd' is not one of 'kl', 'fdt'"),
        (["--count", 3, "--scheme", "int6"], "holds nothing on the scheme 'int6'; it has int8"),
        (["--count", 3, "--method", "measure"], "no row for .*; run `dtm sweep` again --method"),
        (["--count", 3, "--curve"], "--curve measures on prompts .* name them with --prompts"),
        (["--count", 3, "--counts", "3"], "belong to --curve"),
        (["--curve", "--counts", "3,x", "--prompts", "p"], "--counts is '3,x'; expected numbers"),
        (["--curve", "--prompts", "builtin", "--out", "plan.json"], "there is no budget"),
        (["--count", 3, "--level", 95], r"--level is 95\.0"),
        (["--count", 3, "--out", "gone/plan.json"], "the folder gone does not exist; make it"),
        (["--count", 3, "--fit-on", "gone.json"], "gone.json does not exist; check the path"),
        (["--count", 3, "--prompts", "gone.jsonl"], "gone.jsonl does not exist; check the path"),
        (["--count", 3, "--prompts", "builtin", "--base", "./gone"], "gone does not exist"),
    ],
)
def test_wrong_use(arguments, message, search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = search(*arguments)
    assert (left.code, left.out) == (2, "")
    assert left.err.count("\n") == 1
    assert re.search(message, left.err)
    assert not list(tmp_path.iterdir())


def test_the_sweep_is_not_overwritten(search, place):
    before = (place / "sweep.db").read_bytes()
    assert "would replace" in search("--count", 3, "--out", place / "sweep.db").err
    assert (place / "sweep.db").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"what is this", b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_sweep(content, search, tmp_path):
    path = tmp_path / "sweep.db"
    assert "does not exist" in search("--count", 3, sweep=path).err
    path.write_bytes(content)
    left = search("--count", 3, sweep=path)
    assert (left.code, left.err.count("\n")) == (2, 1)
    assert str(path) in left.err


def test_another_base_is_refused_before_anything_is_measured(search, place, tmp_path):
    other = runs.noisy(runs.model(), 0.1)
    other.network.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    left = search("--count", 3, *held_out(place), "--base", tmp_path / "other")
    assert left.code == 2
    assert re.search("is of another base: .* name the base that was swept with --base", left.err)


def test_plans_of_another_base_do_not_fit_the_law(search, tmp_path):
    base = {"reference": "else", "fingerprint": "0" * 64, "model_type": None, "config": {}}
    write_plan(tmp_path / "plan.json", PlanFile(base, {}, 1, 2))
    left = search("--count", 3, "--fit-on", tmp_path / "plan.json")
    assert "made for else, another base than the sweep's" in left.err


def test_a_plan_that_does_not_fit_is_refused_by_compare(dtm, place, tmp_path):
    out = tmp_path / "plan.json"
    for content, message in (("{}", "schema None"), ("no", "is no JSON")):
        out.write_text(content)
        left = dtm("compare", place / "base", "--plan", out)
        assert (left.code, left.err.count("\n")) == (2, 1)
        assert message in left.err


def test_a_sweep_of_thousands_is_searched_in_seconds(dtm, tmp_path):
    """Not a benchmark: nothing in it may grow with the square."""
    sweeps.written(tmp_path / "sweep.db", sweeps.sweep(n_layers=300, n_prompts=16, scale=1e-8))
    left = dtm("search", tmp_path / "sweep.db", "--budget", "40%", "--format", "json")
    assert left.code == 0
    assert json.loads(left.out)["around"][2]["n_components"] == 2100
