"""Sweeps against a slow obvious loop, and against kills at any moment."""

import copy
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
import tiny
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import DivergentTokensError, ModelError, RecordError, SchemeError
from divergent_tokens.measure import metrics
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.segments import Segments
from divergent_tokens.probe import kl_of
from divergent_tokens.quiet import quietly
from divergent_tokens.sensitivities import read_sensitivities
from divergent_tokens.sweep import sweep

SCHEMES = [parse_scheme("int4"), parse_scheme("magnitude:0.5")]
LENGTHS = (8, 5, 12, 8, 7)
NEW_TOKENS = 10
TEXT = "\n".join(tiny.SENTENCES * 20)


def prompts():
    return runs.prompts(lengths=LENGTHS)


def swept(model, out, *, include=(), schemes=SCHEMES, **settings):
    components = find_components(model.network, include=include)
    given = {"new_tokens": NEW_TOKENS, "batch_size": 2, "method": "measure", **settings}
    return sweep(model, components, schemes, prompts(), out, **given)


def plain(found):
    """All columns but seconds, by component, scheme and method."""
    rows = [dataclasses.asdict(row) for row in found.rows]
    assert all(row.pop("seconds") > 0 for row in rows)
    return {(row["component"], row["scheme"], row["method"]): row for row in rows}


# --- the same as by hand ---


def by_hand(model, component, scheme, completions):
    """Copy the model, change one matrix, run every sequence in full."""
    network = copy.deepcopy(model.network)
    weight = weight_of(network, component)
    changed = scheme.compress(weight.clone(), component)
    error = float(torch.linalg.norm(changed - weight) / torch.linalg.norm(weight))
    with torch.no_grad():
        weight.copy_(changed)
    kl, acceptance, logprobs, argmax = [], [], [], []
    for i, sequence in enumerate(completions.sequences()):
        n, length = len(completions.prompts.prompts[i].ids), int(completions.lengths[i])
        base = runs.logits_of(model.network, sequence)[n - 1 : n - 1 + length]
        own = runs.logits_of(network, sequence)[n - 1 : n - 1 + length]
        ids = completions.ids[i, :length]
        kl.append(metrics.kl(base, own))
        acceptance.append(metrics.acceptance(base, own))
        logprobs.append(metrics.log_softmax(own)[np.arange(length), ids])
        argmax.append(own.argmax(-1))
    apart = [a != completions.ids[i, : len(a)] for i, a in enumerate(argmax)]
    n_tokens = sum(map(len, kl))
    return {
        "kl": sum(map(np.sum, kl)) / n_tokens,
        "acceptance": sum(map(np.sum, acceptance)) / n_tokens,
        "dppl": np.exp(-sum(map(np.sum, logprobs)) / n_tokens),
        "sdt": sum(map(np.sum, apart)) / n_tokens,
        "fdt": np.mean([a.argmax() if a.any() else len(a) for a in apart]),
        "weight_error": error,
    }, [one.sum() for one in kl]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe"])
def test_measured_rows_are_those_of_a_slow_obvious_loop(architecture, tmp_path):
    model = runs.model(architecture)
    found = swept(model, tmp_path / "sweep.db", include=["re:[.]1[.].*(o|down|c)_proj"])
    completions = complete(model, prompts(), new_tokens=NEW_TOKENS, batch_size=2)
    components = {c.name: c for c in find_components(model.network)}
    assert len(found.rows) == 2 * len(found.components) > 0
    for row in found.rows:
        component = components[row.component]
        scheme = next(scheme for scheme in SCHEMES if str(scheme) == row.scheme)
        expected, by_prompt = by_hand(model, component, scheme, completions)
        kept = {name: getattr(row, name) for name in expected}
        assert kept == pytest.approx(expected, rel=1e-5, abs=1e-5)
        prompt_kl = found.prompt_kl(row.component, row.scheme)
        assert prompt_kl == pytest.approx(by_prompt, rel=1e-4, abs=1e-5)
        assert row.size_bytes == scheme.size_bytes(component)
        assert (row.n_prompts, row.ppl) == (len(LENGTHS), None)
        ratio = prompt_kl - row.kl * found.lengths
        n = len(LENGTHS)
        assert row.kl_se == pytest.approx(
            np.sqrt(n / (n - 1) * (ratio**2).sum()) / found.lengths.sum()
        )


def test_the_network_is_as_it_was_and_the_file_holds_what_the_rows_rest_on(tmp_path):
    model = runs.model()
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    found = swept(model, tmp_path / "sweep.db", text=TEXT, include=["*.0.*_proj"])
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name])
    assert found.run["base"]["fingerprint"] == model.fingerprint
    assert found.run["base"]["model_type"] == "llama"
    assert found.run["base"]["config"]["hidden_size"] == 32
    assert (found.run["dtype"], found.run["device"]) == ("float32", "cpu")
    assert found.run["batch_size"] == 2
    assert found.run["passes"] == "from the changed layer on"
    assert [prompt.digest for prompt in found.prompts] == [p.digest for p in prompts().prompts]
    assert found.lengths.max() == NEW_TOKENS
    assert all((row > 0).all() for row in found.margins)  # a greedy base prefers its own tokens
    assert 0 < found.rounding_kl < min(row.kl for row in found.rows)
    assert found.run["base_dppl"] > 1
    # Lending 4 bits changes the perplexity of a text, by not too much.
    ppls = {row.ppl for row in found.rows}
    assert len(ppls) == len(found.rows)
    assert found.run["base_ppl"] not in ppls


def test_a_probe_fills_the_same_file_with_its_draws(tmp_path):
    model = runs.model()
    out = tmp_path / "sweep.db"
    found = swept(model, out, method="probe", n_draws=3)
    assert len(found.rows) == 2 * len(found.components)
    row = found.rows[5]
    draws = found.draws(row.component, row.scheme)
    assert draws.shape == (len(LENGTHS), 3)
    assert (row.kl, row.kl_se) == kl_of(draws, found.lengths)
    assert (row.method, row.fdt, row.dppl) == ("probe", None, None)
    assert found.rounding_kl is None
    both = swept(model, out, method="measure")
    assert both.rows[: len(found.rows)] == found.rows
    probed, measured = plain(found), plain(both)
    for (component, scheme, _), row in probed.items():
        other = measured[component, scheme, "measure"]
        assert other["size_bytes"] == row["size_bytes"]
        assert other["weight_error"] == pytest.approx(row["weight_error"], rel=1e-6)
    assert len(both.rows) == 2 * len(found.rows)


def test_embedding_and_head_are_swept_if_they_are_asked_for(tmp_path):
    model = runs.model()
    found = swept(model, tmp_path / "sweep.db", include=["*embed*", "lm_head"])
    assert {component.layer for component in found.components} == {None}
    completions = complete(model, prompts(), new_tokens=NEW_TOKENS, batch_size=2)
    components = find_components(model.network, include=["*embed*", "lm_head"])
    assert len(components) == 2
    for component in components:
        expected, _ = by_hand(model, component, SCHEMES[0], completions)
        (row,) = [r for r in found.rows if (r.component, r.scheme) == (component.name, "int4")]
        assert row.kl == pytest.approx(expected["kl"], rel=1e-4)


def test_full_passes_give_the_same_rows_and_say_so(tmp_path, monkeypatch):
    model = runs.model()
    found = swept(model, tmp_path / "a.db", include=["*.v_proj"])

    def refuse(*_):
        raise ValueError("not this network")

    monkeypatch.setattr(Segments, "_check", refuse)
    in_full = swept(model, tmp_path / "b.db", include=["*.v_proj"])
    assert plain(in_full) == plain(found)
    assert in_full.run["passes"] == "ValueError: not this network"


# --- going on ---


def test_further_schemes_and_components_add_their_rows(tmp_path):
    model, out = runs.model(), tmp_path / "sweep.db"
    first = swept(model, out, schemes=SCHEMES[:1], include=["*.q_proj"], batch_size=4)
    second = swept(model, out, include=["*.q_proj", "*.v_proj"], batch_size=2)
    assert second.rows[:2] == first.rows
    assert len(second.rows) == 8
    assert second.run["batch_size"] == 4  # the first run's
    whole = swept(model, tmp_path / "b.db", include=["*.q_proj", "*.v_proj"], batch_size=4)
    assert plain(second) == plain(whole)


def test_what_is_done_is_read_without_any_work(tmp_path, monkeypatch):
    model, out = runs.model(), tmp_path / "sweep.db"
    found = swept(model, out, include=["*.q_proj"])
    monkeypatch.setattr("divergent_tokens.sweep.complete", None)
    assert swept(model, out, include=["*.q_proj"]).rows == found.rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"new_tokens": 6}, "new_tokens is 10 in the file and 6 now"),
        ({"ignore_eos": True}, "ignore_eos is false in the file and true now"),
        ({"seed": 3}, "seed is 0 in the file and 3 now"),
        ({"text": TEXT}, "text is null in the file"),
    ],
)
def test_another_run_is_refused_before_any_work(tmp_path, monkeypatch, change, said):
    model, out = runs.model(), tmp_path / "sweep.db"
    swept(model, out, include=["*.q_proj"])
    monkeypatch.setattr("divergent_tokens.sweep.complete", None)
    with pytest.raises(RecordError, match=said):
        swept(model, out, **change)
    with pytest.raises(RecordError, match=r"base\.fingerprint"):
        swept(runs.model(seed=1), out)


def test_a_donor_that_changed_between_two_runs_is_refused(tmp_path):
    def save(seed):
        with quietly():
            runs.model(seed=seed).network.save_pretrained(tmp_path / "donor")

    save(seed=1)
    donor = parse_scheme(f"from:{tmp_path / 'donor'}")
    model, out = runs.model(), tmp_path / "sweep.db"
    swept(model, out, include=["*.0.*.q_proj"], schemes=[donor])
    found = swept(model, out, include=["*.0.*.q_proj"], schemes=[donor, *SCHEMES])
    assert len(found.rows) == 3
    save(seed=2)
    with pytest.raises(RecordError, match=r"sources\.from:"):
        swept(model, out, include=["*.q_proj"], schemes=[donor])


def test_what_cannot_be_swept_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("divergent_tokens.sweep.complete", None)
    with pytest.raises(SchemeError, match="groups of 7"):
        swept(runs.model(), tmp_path / "a.db", schemes=[parse_scheme("int4:g7")])
    with pytest.raises(DivergentTokensError, match="a probe reads no text"):
        swept(runs.model(), tmp_path / "a.db", method="probe", text=TEXT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["measure", "probe"])
def test_what_is_not_finite_is_named(tmp_path, method):
    class Infinite:
        by_rows, activations, source = False, None, None

        def check(self, components):
            pass

        def size_bytes(self, component):
            return 0

        def compress(self, weight, component):
            return weight * torch.inf

        def __str__(self):
            return "infinite"

    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj under infinite"):
        swept(runs.model(), tmp_path / "a.db", method=method, schemes=[Infinite()])


# --- killed ---


class Interrupted:
    """A progress that stops the work at its n-th call."""

    def __init__(self, n):
        self.left = n

    def __call__(self, stage, done, total, unit):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_stopped_ten_times_at_random_it_ends_with_the_same_rows(tmp_path):
    model = runs.model("qwen3-moe")
    include = ["*.self_attn.*", "re:experts[.][12][.]"]
    expected = swept(model, tmp_path / "whole.db", include=include, text=TEXT)
    rng = random.Random(0)
    out = tmp_path / "killed.db"
    n_kept = [0]
    for _ in range(10):
        stop = Interrupted(rng.randrange(20, 48))  # most calls tell of the base's own passes
        with pytest.raises(KeyboardInterrupt):
            swept(model, out, include=include, text=TEXT, progress=stop)
        if out.exists():
            n_kept.append(len(read_sensitivities(out).rows))
    found = swept(model, out, include=include, text=TEXT)
    assert n_kept == sorted(n_kept)
    assert 0 < n_kept[-1] < len(expected.rows)
    assert plain(found) == plain(expected)
    assert found.run == expected.run
    assert len(found.rows) == len(expected.rows)
    for row in expected.rows:
        key = row.component, row.scheme
        assert (found.prompt_kl(*key) == expected.prompt_kl(*key)).all()


SWEEPS = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import runs, test_sweep
def tell(stage, done, total, unit):
    if stage == "sweep":
        print(done, flush=True)
test_sweep.swept(runs.model(), sys.argv[1], progress=tell)
"""


def test_killed_for_real_it_ends_with_the_same_rows(tmp_path):
    expected = swept(runs.model(), tmp_path / "whole.db")
    out = tmp_path / "killed.db"
    code = SWEEPS.format(tests=str(Path(__file__).parent))
    for seconds in (0.0, 0.004, 0.01):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert 3 <= len(read_sensitivities(out).rows) < len(expected.rows)
    found = swept(runs.model(), out)
    assert plain(found) == plain(expected)
    assert found.run["base"]["fingerprint"] == expected.run["base"]["fingerprint"]
    # Saving the shared network, as other tests do, writes its architecture into its config.
    assert {**found.run, "base": None} == {**expected.run, "base": None}


def test_time_left_counts_the_layers_that_are_to_run(tmp_path):
    seen = []
    swept(runs.model(), tmp_path / "a.db", progress=lambda *told: seen.append(told))
    rows = [(done, total) for stage, done, total, _ in seen if stage == "sweep"]
    n = 7 * 2  # components of a layer and schemes
    assert rows[-1] == (3 * n, 3 * n)
    assert [done for done, _ in rows] == [2 * i for i in range(1, n + 1)] + [
        2 * n + i for i in range(1, n + 1)
    ]


def test_the_run_is_plain_json(tmp_path):
    found = swept(runs.model(), tmp_path / "a.db", include=["*.q_proj"])
    assert json.loads(json.dumps(dict(found.run), allow_nan=False)) == found.run
