"""Layers that wait on disk: the same numbers, bit for bit, with as few reads as said."""

from pathlib import Path

import pytest
import torch

import offloaded
import runs
import tiny
from divergent_tokens.calibrated import ready_schemes
from divergent_tokens.candidates import scheme_candidates
from divergent_tokens.compiled import compiler_works
from divergent_tokens.compress.apply import apply_plan, lent_plan
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import ModelError
from divergent_tokens.layers import decoder_layers
from divergent_tokens.measure.batches import BatchSize
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.perplexity import perplexity
from divergent_tokens.measure.rounding import lent_rounding
from divergent_tokens.measure.segments import Segments, walks
from divergent_tokens.measure.states import base_states
from divergent_tokens.models import Model, load_model
from divergent_tokens.offload import StoredWeights, at_hand, is_offloaded, placement
from divergent_tokens.probe import probe
from divergent_tokens.sweep import sweep

IDS = torch.arange(3, 13)[None]
LENGTHS = [8, 5, 19, 8, 3]
WRITTEN = [[5, 6, 7], [9, 8], [3, 4, 5, 6], [7], [8, 9, 9]]


@pytest.fixture
def llama(tmp_path):
    return offloaded.both(tmp_path)


def completions():
    return runs.written(runs.prompts(lengths=LENGTHS), WRITTEN)


def layer_reads(reads, network):
    """How often each weight of each layer was read: one number where all are alike."""
    name, layers = decoder_layers(network)
    found = {}
    for i in range(len(layers)):
        counts = {n for key, n in reads.items() if key.startswith(f"{name}.{i}.")}
        found[i] = counts.pop() if len(counts) == 1 else counts
    return found


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_waits_on_disk_is_the_same_model(architecture, tmp_path):
    whole, off = offloaded.both(tmp_path, architecture)
    assert is_offloaded(off.network)
    assert not is_offloaded(whole.network)
    assert off.fingerprint == whole.fingerprint
    assert off.device == whole.device
    assert all(p.is_meta for p in decoder_layers(off.network)[1][1].parameters())
    with torch.no_grad():
        assert torch.equal(off.network(IDS).logits, whole.network(IDS).logits)
    stored = StoredWeights(off.network)
    expected = whole.network.state_dict()
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    # In memory or on disk, what Python holds already has the same fingerprint.
    same = [Model.of(m.network, m.tokenizer).fingerprint for m in (off, whole)]
    assert same[0] == same[1]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_probe_reads_each_layer_once_for_each_direction(architecture, tmp_path):
    whole, off = offloaded.both(tmp_path, architecture)
    schemes = [parse_scheme("int8"), parse_scheme("int3")]
    components = find_components(whole.network, include=["*"])
    run = {"n_draws": 2, "batch_size": 2}
    expected = probe(whole, components, schemes, completions(), **run)
    probe(off, components, schemes, completions(), **run)  # finds the head, and checks the layers
    with offloaded.counted_reads() as reads:
        found = probe(off, components, schemes, completions(), **run)
    torch.testing.assert_close(
        torch.from_numpy(found.draws), torch.from_numpy(expected.draws), rtol=1e-6, atol=1e-7
    )
    assert found.weight_errors.tolist() == expected.weight_errors.tolist()
    # The last layer's forward pass is the beginning of the way back.
    assert layer_reads(reads, off.network) == {0: 2, 1: 1}


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "gpt2"])
def test_measured_rows_read_each_layer_once_for_a_batch_of_rows(architecture, tmp_path):
    whole, off = offloaded.both(tmp_path, architecture)
    schemes = [parse_scheme("int8"), parse_scheme("int3")]
    components = find_components(whole.network)
    prompts = completions().prompts

    def rows(model, name, only=None):
        run = {"method": "measure", "new_tokens": 6, "batch_size": 2, "cache": tmp_path / name}
        return sweep(
            model, components, schemes, prompts, tmp_path / f"{name}.db", only=only, **run
        ).rows

    expected = rows(whole, "whole")
    rows(off, "off", only=[])  # what a sweep needs before its first row
    with offloaded.counted_reads() as reads:
        found = rows(off, "off")
    for a, b in zip(found, expected, strict=True):
        assert (a.kl, a.fdt, a.sdt, a.dppl, a.weight_error) == (
            b.kl,
            b.fdt,
            b.sdt,
            b.dppl,
            b.weight_error,
        )
    # 3 passes check that layers can be left out, one finds the rounding floor; then the rows of
    # layer 0 pass both layers at once, the base passes layer 0, and the rows of layer 1 that one.
    assert layer_reads(reads, off.network) == {0: 3 + 1 + 1 + 1, 1: 3 + 1 + 1 + 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_what_waits_is_not_compiled(llama, tmp_path):
    """Modules whose forward is accelerate's would not be seen from compiled layers."""
    whole, off = llama
    scheme = [parse_scheme("int8")]
    components = find_components(whole.network)
    compiler_works.cache_clear()
    if not compiler_works(whole.device):
        pytest.skip("torch.compile needs a C++ compiler")
    expected = probe(whole, components, scheme, completions(), compiled=False)
    found = probe(off, components, scheme, completions(), compiled=True)
    torch.testing.assert_close(
        torch.from_numpy(found.draws), torch.from_numpy(expected.draws), rtol=1e-6, atol=1e-7
    )
    rows = sweep(
        off,
        components[:2],
        scheme,
        completions().prompts,
        tmp_path / "sweep.db",
        method="measure",
        new_tokens=4,
        compiled=True,
    )
    assert not rows.run["compiled"]
    assert all(row.kl > 0 for row in rows.rows)


def test_ends_that_cannot_be_changed_are_refused_before_any_work(llama, tmp_path):
    _, off = llama
    head = [c for c in find_components(off.network, include=["*"]) if c.is_end]
    out = tmp_path / "sweep.db"
    with pytest.raises(ModelError, match="cannot be changed while layers wait"):
        sweep(off, head, [parse_scheme("int8")], completions().prompts, out, method="measure")
    assert not out.exists()


def test_memory_that_runs_out_in_the_check_is_no_refusal(llama, monkeypatch):
    _, off = llama
    head = find_head(off.network)
    own = Segments._check

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Segments, "_check", short)
    with pytest.raises(torch.OutOfMemoryError):
        walks(head, IDS)
    monkeypatch.setattr(Segments, "_check", own)
    assert walks(head, IDS)


def test_scores_and_perplexity_read_each_layer_once(llama):
    words = " ".join(tiny.SENTENCES * 40)
    found = []
    for model in llama:
        head = find_head(model.network)
        base_states(model, head, completions(), batch_size=BatchSize(2))  # checks the layers
        with offloaded.counted_reads() as reads:
            states = base_states(model, head, completions(), batch_size=BatchSize(2))
            once = layer_reads(reads, model.network)
            nats = perplexity(model, head, words, batch_size=2).nats
        found.append((states.array, nats))
    assert once == {0: 1, 1: 1}
    assert layer_reads(reads, model.network) == {0: 2, 1: 2}
    assert all((a == b).all() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_schemes_and_plans_are_lent_to_what_waits(architecture, tmp_path):
    whole, off = offloaded.both(tmp_path / "m", architecture)
    prompts = complete(whole, runs.prompts(lengths=LENGTHS), new_tokens=6).prompts
    found = []
    for model in (whole, off):
        candidates = scheme_candidates(model, "int3", "w8a8")
        result = compare(model, candidates, prompts, new_tokens=6, batch_size=2)
        found.append([(c.name, c.metrics.to_json()) for c in result.candidates])
        found[-1].append(("rounding", result.rounding.to_json()))
    assert found[0] == found[1]
    with torch.no_grad():  # and everything came back
        assert torch.equal(off.network(IDS).logits, whole.network(IDS).logits)
    plan = Plan({c.name: parse_scheme("int3") for c in find_components(off.network)})
    apply_plan(whole, plan)
    apply_plan(off, plan)
    with torch.no_grad():
        assert torch.equal(off.network(IDS).logits, whole.network(IDS).logits)


def test_at_hand_is_there_once_and_goes_away_again(llama):
    whole, off = llama
    layer = decoder_layers(off.network)[1][1]
    with offloaded.counted_reads() as reads, at_hand(layer):
        weight = layer.mlp.down_proj.weight
        assert torch.equal(weight, decoder_layers(whole.network)[1][1].mlp.down_proj.weight)
        with at_hand(layer), torch.no_grad():
            off.network(IDS)
        assert layer.mlp.down_proj.weight is weight
    assert layer.mlp.down_proj.weight.is_meta
    assert layer_reads(reads, off.network) == {0: 1, 1: 1}


def test_rounding_of_a_first_layer_that_waits(llama):
    logits = []
    for model in llama:
        with lent_rounding(model), torch.no_grad():
            logits.append(model.network(IDS).logits)
    assert torch.equal(*logits)


def test_layers_that_hand_on_more_are_refused_by_the_probe_and_measured_in_full(llama, tmp_path):
    _, off = llama
    first, second = decoder_layers(off.network)[1]
    left = []
    first.mlp.register_forward_hook(lambda _m, _i, output: left.append(output))
    second.mlp.register_forward_hook(lambda _m, _i, output: output + left[-1])
    components = find_components(off.network)[:3]
    with pytest.raises(ModelError, match="hand on more than hidden states"):
        probe(off, components, [parse_scheme("int8")], completions())
    found = sweep(
        off,
        components,
        [parse_scheme("int8")],
        completions().prompts,
        tmp_path / "sweep.db",
        method="measure",
        new_tokens=4,
    )
    assert len(found.rows) == 3
    assert "from layer 1 on" in found.run["passes"]


def test_the_ends_of_what_waits_cannot_be_changed(llama):
    _, off = llama
    head = [c for c in find_components(off.network, include=["*"]) if c.kind == "head"]
    plan = Plan({head[0].name: parse_scheme("int8")})
    with (
        pytest.raises(ModelError, match="lm_head cannot be changed while layers wait"),
        lent_plan(off, plan, components=head),
    ):
        pass


def test_layers_fill_devices_in_their_order(llama):
    whole, _ = llama
    layers = decoder_layers(whole.network)[1]
    size = offloaded.n_bytes(layers[0])
    ends = offloaded.n_bytes(whole.network) - offloaded.n_bytes(layers)
    two = [torch.device("cuda", 0), torch.device("cuda", 1)]

    def placed(most, devices=two):
        found = placement(whole.network, devices, dtype=torch.float32, max_memory=most)
        return [found[f"model.layers.{i}"] for i in range(2)]

    assert placement(whole.network, two, dtype=torch.float32, max_memory=ends + 2 * size) is None
    assert placed(ends + size) == [0, 1]
    assert placed(ends + size, two[:1]) == ["cpu", "cpu"]
    assert placed(ends + size, [torch.device("cpu")]) == ["disk", "disk"]
    with pytest.raises(ModelError, match=r"one layer need .* MiB on cuda:0, and .* give it more"):
        placed(ends)


def test_a_quantized_checkpoint_is_not_spread(tmp_path):
    network = offloaded.checkpoint(tmp_path)
    network.config.quantization_config = {"quant_method": "compressed-tensors"}
    network.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a quantized checkpoint is loaded whole"):
        load_model(tmp_path, device="cpu", max_memory=10**9)


def test_weights_that_are_not_numbers_are_found_where_they_wait(tmp_path):
    network = tiny.network("llama")
    with torch.no_grad():
        decoder_layers(network)[1][1].mlp.down_proj.weight[0, 0] = torch.nan
    network.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    most = offloaded.n_bytes(network) - 1
    with pytest.raises(ModelError, match=r"1 of 1536 weights of model\.layers\.1\.mlp\.down_proj"):
        load_model(tmp_path, device="cpu", max_memory=most)


def test_from_the_command_line(tmp_path, dtm):
    offloaded.checkpoint(tmp_path / "m")
    arguments = [
        "compare",
        str(tmp_path / "m"),
        "--scheme",
        "int4",
        "--n-prompts",
        "2",
        "--prefix",
        "8",
        "--new-tokens",
        "4",
        "--format",
        "json",
        "--device",
        "cpu",
        "--cache",
        str(tmp_path / "cache"),
        "--prompts",
        str(text(tmp_path)),
    ]
    whole = dtm(*arguments)
    off = dtm(*arguments, "--max-memory", "110kB")
    assert (whole.code, off.code) == (0, 0)
    assert off.out.split('"rounding"')[1] == whole.out.split('"rounding"')[1]
    for wrong in ("much", "0GB", "20"):
        refused = dtm(*arguments, "--max-memory", wrong)
        assert refused.code == 2
        assert f"{wrong!r} is no size of memory" in refused.err
    small = dtm(*arguments, "--max-memory", "1kB")
    assert small.code == 2
    assert "give it more (--max-memory)" in small.err


def text(folder):
    path = Path(folder) / "prompts.txt"
    path.write_text("\n".join(tiny.SENTENCES), encoding="utf-8")
    return path


def test_experts_that_wait_are_not_calibrated(tmp_path):
    _, waiting = offloaded.both(tmp_path / "m", "qwen3-moe")
    experts = find_components(waiting.network, include=["*experts*"])
    with pytest.raises(ModelError, match=r"is an expert of a fused stack, and layers of .* wait"):
        ready_schemes(waiting, experts, [parse_scheme("wanda:0.5")], cache=tmp_path)
    others = find_components(waiting.network, include=["*self_attn*"])
    (scheme,) = ready_schemes(waiting, others, [parse_scheme("wanda:0.5")], cache=tmp_path)
    assert scheme.is_ready
