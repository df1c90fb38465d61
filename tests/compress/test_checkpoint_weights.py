"""Checkpoints of other tools: they give what they give when transformers loads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import packed
import tiny
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.checkpoint_weights import CheckpointWeights
from divergent_tokens.compress.components import Component, find_components, weight_of
from divergent_tokens.compress.donors import Donor
from divergent_tokens.compress.formats import PerToken
from divergent_tokens.compress.plan import uniform_plan
from divergent_tokens.compress.quantize import dequantize, quantize
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.errors import SchemeError
from divergent_tokens.models import Model, load_model
from divergent_tokens.quiet import quietly

WEIGHTS = "model.safetensors"


def group(targets: str = "Linear", **settings: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=[targets], weights=QuantizationArgs(**settings))


def preset(name: str, targets: str = "Linear") -> QuantizationScheme:
    return preset_name_to_scheme(name, [targets])


GROUPS: dict[str, dict[str, QuantizationScheme]] = {
    "int4": {"all": group(num_bits=4, strategy="group", group_size=16)},
    "int3": {"all": group(num_bits=3, strategy="channel")},
    "w8a8": {"all": preset("W8A8")},
    "fp8": {"all": preset("FP8_DYNAMIC")},
    "nvfp4": {"all": preset("NVFP4A16")},
    "two formats": {
        "a": group("re:.*self_attn.*", num_bits=4, strategy="group", group_size=16),
        "b": preset("NVFP4A16", "re:.*mlp.*"),
    },
}
INPUTS = {"w8a8": PerToken("w8a8"), "fp8": PerToken("fp8")}
LLAMA_BYTES = {
    # Codes, scales of 2 bytes, and 16 bytes for the shape of a packed weight. [48, 32] and [32, 48]
    "up_proj": {"int4": 768 + 96 * 2 + 16, "w8a8": 1536 + 48 * 2, "nvfp4": 768 + 96 + 4},
    "down_proj": {"int4": 768 + 96 * 2 + 16, "w8a8": 1536 + 32 * 2, "nvfp4": 768 + 96 + 4},
}


def save(network: PreTrainedModel, folder: Path) -> Path:
    with quietly():
        network.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def opened(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(folder, str(folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    network = tiny.network("llama").to(torch.bfloat16)
    return load_model(save(network, tmp_path_factory.mktemp("base")), dtype="bfloat16")


@pytest.fixture(scope="module")
def int4(base: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.write(tmp_path_factory.mktemp("packed"), base.network, GROUPS["int4"])


@pytest.fixture
def copy(int4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int4, tmp_path / "copy"))


@pytest.mark.parametrize("name", GROUPS)
def test_all_components_lent_compute_what_the_reloaded_checkpoint_does(
    name: str, base: Model, tmp_path: Path
) -> None:
    folder = packed.write(tmp_path / "packed", base.network, GROUPS[name])
    donor = Donor(str(folder))
    components = find_components(base.network)
    plan = uniform_plan(components, Scheme((donor,)))
    assert donor.activations == INPUTS.get(name)
    ids = torch.arange(4, 40).view(2, 18)
    theirs = load_model(folder, dtype="bfloat16").network
    with torch.no_grad(), quietly():
        before = base.network(ids).logits
        expected = theirs(ids).logits
        with lent_plan(base, plan, components=components) as lent:
            found = lent.network(ids).logits
        assert torch.equal(found, expected)
        assert torch.equal(base.network(ids).logits, before)
    assert not torch.equal(found, before)
    for component in components:
        part = LLAMA_BYTES.get(component.name.rpartition(".")[2], {})
        if name in part:
            assert donor.size_bytes(component, 0) == part[name]


def test_zero_points_are_decoded_too(base: Model, tmp_path: Path) -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=16, symmetric=False)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=args)}
    weights = opened(packed.write(tmp_path, base.network, groups))
    for component in find_components(base.network):
        weight = weight_of(base.network, component)
        assert weights.shape(component) == component.shape
        read = weights.read(component)
        ours = dequantize(quantize(weight, bits=4, granularity=16, symmetric=False))
        step = (weight.amax() - weight.amin()) / 15
        assert (read - ours).abs().amax() <= 1.1 * step  # both rounded, in other dtypes
        n = component.n_parameters  # codes, a scale and a zero point for each 16, the shape
        assert weights.size_bytes(component) == n / 2 + n / 16 * 2.5 + 16


def test_single_experts_of_a_packed_mixture(tmp_path: Path) -> None:
    """The network fuses its experts; packers see them one by one, and so do files."""
    network = tiny.network("qwen3-moe")
    folder = save(network, tmp_path / "moe")
    components = {c.name: c for c in find_components(network)}
    component = components["model.layers.1.mlp.experts.2.up_proj"]
    coded = quantize(weight_of(network, component), bits=8)

    def pack(tensors: dict[str, Tensor]) -> None:
        tensors[f"{component.name}.weight"] = coded.codes
        tensors[f"{component.name}.weight_scale"] = coded.scales

    change(folder, pack, {"config_groups": {"all": {**GROUPS["w8a8"]["all"].model_dump()}}})
    weights = opened(folder)
    assert weights.shape(component) == (24, 32)
    assert torch.equal(weights.read(component), dequantize(coded))
    assert weights.size_bytes(component) == 24 * 32 + 24 * 4
    other = components["model.layers.1.mlp.experts.3.up_proj"]
    with pytest.raises(SchemeError, match=r"quantizes inputs, but has left .*experts\.3\.up_proj"):
        weights.shape(other)


def test_a_component_that_the_checkpoint_left_alone(int4: Path, base: Model) -> None:
    weights = opened(int4)
    (head,) = find_components(base.network, include=["lm_head"])
    assert weights.shape(head) == head.shape
    assert torch.equal(weights.read(head), weight_of(base.network, head))
    assert weights.size_bytes(head) == head.n_parameters * 2


# --- names ---


def rename(folder: Path, name: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS, PT)


PT = {"format": "pt"}


def test_names_without_the_network_s_prefix(tmp_path: Path) -> None:
    """GPT-2 on the hub has `h.0.attn.c_attn.weight`; its matrices are stored as [in, out]."""
    network = tiny.network("gpt2")
    folder = save(network, tmp_path / "gpt2")
    rename(folder, lambda name: name.removeprefix("transformer."))
    weights = opened(folder)
    for component in find_components(network, include=["*"]):
        assert weights.shape(component) == component.shape
        assert torch.equal(weights.read(component), weight_of(network, component))


def test_mixtral_s_names(tmp_path: Path) -> None:
    """`mlp.experts.1.gate_proj` is `block_sparse_moe.experts.1.w1` in the file."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    network = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=256, **sizes, **heads))
    weights = opened(save(network, tmp_path / "mixtral"))
    for component in find_components(network):
        assert weights.shape(component) == component.shape
        assert torch.equal(weights.read(component), weight_of(network, component))


def test_names_that_only_transformers_knows(tmp_path: Path) -> None:
    network = tiny.network("llama")
    network.lm_head.weight = network.model.embed_tokens.weight
    network.config.tie_word_embeddings = True
    folder = save(network, tmp_path / "tied")
    (head,) = find_components(tiny.network("llama"), include=["lm_head"])
    weights = opened(folder)
    assert weights.shape(head) == head.shape
    assert torch.equal(weights.read(head), network.lm_head.weight)
    assert weights.size_bytes(head) == head.n_parameters * 2


# --- refused ---


def change(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Change a checkpoint's tensors and the settings of its quantization."""
    held = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors(held)
    save_file(held, folder / WEIGHTS, PT)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if quantization is not None:
        before = config.get("quantization_config", {"quant_method": "compressed-tensors"})
        config["quantization_config"] = before | quantization
    file.write_text(json.dumps(config, default=str))


def refused(folder: Path, components: tuple[Component, ...], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Donor(str(folder)).check(components)


def settings_of(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}, **changes}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq"}, r"format 'gptq', which is not read here.*save a dense copy"),
        ({"transform_config": {"config_groups": {}}}, "rotates its weights"),
        ({"config_groups": {"a": {"targets": 3}}}, "installed compressed-tensors cannot read"),
        (settings_of(targets=["Conv2d"]), "no group of a quantization_config in its config"),
        (settings_of(format="dense"), "before it was quantized"),
        (settings_of(format="marlin-24"), "in the format 'marlin-24'"),
    ],
)
def test_formats_that_are_not_read(
    settings: dict[str, Any], message: str, copy: Path, base: Model
) -> None:
    change(copy, quantization=settings)
    refused(copy, find_components(base.network), message)


def test_inputs_that_no_scheme_of_ours_stands_for(base: Model, tmp_path: Path) -> None:
    components = find_components(base.network)
    static = packed.write(tmp_path / "static", base.network, {"all": preset("FP8")})
    refused(static, components, "otherwise than with a dynamic scale for each token")
    groups = {
        "a": preset("W8A8", "re:.*self_attn.*"),
        "b": group("re:.*mlp.*", num_bits=8, strategy="channel"),
    }
    some = packed.write(tmp_path / "some", base.network, groups)
    refused(some, components, "quantizes inputs in several ways")


def test_a_stack_of_other_shapes(tmp_path: Path) -> None:
    network = tiny.network("gpt-oss")
    folder = save(network, tmp_path / "gpt-oss")
    name = "model.layers.0.mlp.experts.gate_up_proj"  # [expert, in, gate and up]

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name]] * 2, -1)

    change(folder, widen)
    components = find_components(network)
    refused(folder, components, r"has 192 rows of gate and up in .*expected the base's 96")

    def drop_experts(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:2, :, :96].contiguous()

    change(folder, drop_experts)
    refused(folder, components, r"does not have model\.layers\.0\.mlp\.experts\.2\.gate_proj")


def test_a_packed_component_that_is_missing(copy: Path, base: Model) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight_packed"]

    change(copy, drop)
    refused(copy, find_components(base.network), r"has no model\.layers\.0\.mlp\.up_proj; exclude")


def test_codes_that_nothing_explains(tmp_path: Path) -> None:
    network = tiny.network("llama")
    folder = save(network, tmp_path / "llama")
    name = "model.layers.0.mlp.up_proj.weight"

    def code(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.int8)

    change(folder, code)
    refused(folder, find_components(network), rf"holds {name} as I8, without a scale")

    def scale(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}_scale"] = torch.ones(48, 1)

    change(folder, scale)
    refused(folder, find_components(network), r"0\.mlp\.up_proj in codes, and no group of a quant")


def test_a_folder_without_weights(tmp_path: Path, base: Model) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, find_components(base.network), "its weights are missing")
