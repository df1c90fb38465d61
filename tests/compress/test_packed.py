"""Codes and scales as a checkpoint holds them: read again, they are what was measured."""

import hashlib

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.packed import quantization_config
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import SchemeError

SCHEMES = [
    *(f"int{bits}" for bits in range(2, 9)),
    "int8:tensor",
    "int4:g32",
    "int3:g16",
    "int4:asym",
    "int8:g64:asym",
    "int3:g16:asym",
    "int8:tensor:asym",
    "w8a8",
    "fp8",
    "mxfp4",
    "nvfp4",
    "magnitude:0.5+int4:g32",
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrix(dtype, shape=(96, 128), seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    weight[3] = 0  # a channel of zeros
    return weight.to(dtype)


def component(dtype, shape=(96, 128)):
    return Component("model.layers.0.self_attn.q_proj", "q", 0, shape, dtype, "q.weight")


def format_of(packed):
    return str(getattr(packed.settings.format, "value", packed.settings.format))


def unpacked(packed):
    compressor = BaseCompressor.get_value_from_registry(format_of(packed))
    return compressor.decompress(dict(packed.tensors), packed.settings)["weight"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_library_decodes_what_was_measured(text, dtype):
    if text == "nvfp4" and dtype is not torch.bfloat16:
        pytest.skip("the library decodes nvfp4 to bfloat16 only; servers.py refuses it elsewhere")
    scheme = parse_scheme(text)
    packed = scheme.packed(matrix(dtype), component(dtype))
    assert torch.equal(unpacked(packed).to(dtype), scheme.compress(matrix(dtype), component(dtype)))


@pytest.mark.parametrize("text", SCHEMES)
def test_it_takes_the_planned_room(text):
    """But for the 16 bytes that say its shape, and scales that servers want repeated."""
    scheme = parse_scheme(text)
    packed = scheme.packed(matrix(torch.bfloat16), component(torch.bfloat16))
    planned = scheme.size_bytes(component(torch.bfloat16))
    repeated = (
        95 * (2 + scheme.steps[-1].bits * (not scheme.steps[-1].symmetric) // 8)
        if (":tensor" in text)
        else 0
    )
    shape = 16 if "weight_shape" in packed.tensors else 0
    assert 0 <= packed.n_bytes - planned - repeated - shape <= 4


@pytest.mark.parametrize(
    ("text", "format", "parts"),
    [
        ("int4:g32", "pack-quantized", "weight_packed weight_scale weight_shape"),
        (
            "int8:asym",
            "pack-quantized",
            "weight_packed weight_scale weight_shape weight_zero_point",
        ),
        ("w8a8", "int-quantized", "weight weight_scale"),
        ("fp8", "float-quantized", "weight weight_scale"),
        ("mxfp4", "mxfp4-pack-quantized", "weight_packed weight_scale"),
        ("nvfp4", "nvfp4-pack-quantized", "weight_packed weight_scale weight_global_scale"),
    ],
)
def test_formats_and_their_parts(text, format, parts):
    packed = parse_scheme(text).packed(matrix(torch.bfloat16), component(torch.bfloat16))
    assert format_of(packed) == format
    assert sorted(packed.tensors) == sorted(parts.split())
    assert (packed.settings.input_activations is not None) == (text in ("w8a8", "fp8"))


def test_by_hand():
    """Two channels of eight weights at 4 bits: each code plus 8, from the lowest bits up."""
    weight = torch.tensor([[7.0, -7, 0, 1, 2, 3, 4, 5], [0.0, 0, 0, 0, 0, 0, 0, 14]])
    packed = parse_scheme("int4").packed(weight, component(torch.float32, (2, 8)))
    assert packed.tensors["weight_scale"].tolist() == [[1.0], [2.0]]
    first = [15, 1, 8, 9, 10, 11, 12, 13]
    words = [
        sum(code << (4 * i) for i, code in enumerate(codes)) for codes in (first, [8] * 7 + [15])
    ]
    assert [word % 2**32 for word in packed.tensors["weight_packed"].flatten().tolist()] == words
    assert packed.tensors["weight_shape"].tolist() == [2, 8]


def test_golden_bytes():
    """A file written today is read tomorrow: these bytes do not change by themselves."""
    digest = hashlib.sha256()
    for text in ("int4:g32", "int8", "w8a8", "fp8", "mxfp4"):
        packed = parse_scheme(text).packed(matrix(torch.bfloat16), component(torch.bfloat16))
        for name, tensor in sorted(packed.tensors.items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "e66cf79eecf498c05108b7a157ff1d3bdcfcdde68c527212d175c87ceca94e28"


@pytest.mark.parametrize("text", ["magnitude:0.5", "from:somewhere", "int4+magnitude:0.5"])
def test_what_leaves_no_codes_is_refused_by_name(text):
    with pytest.raises(SchemeError, match=r"q_proj: .* leaves no codes"):
        parse_scheme(text).packed(matrix(torch.float32), component(torch.float32))


def test_groups_of_the_config():
    packs = {
        f"model.layers.{i}.{name}": parse_scheme(text).packed(
            matrix(torch.bfloat16), component(torch.bfloat16)
        )
        for i in range(2)
        for name, text in [
            ("self_attn.q_proj", "int8"),
            ("mlp.experts.0.up_proj", "int4:g32"),
            ("mlp.experts.1.up_proj", "int4:g32"),
        ]
    }
    config = quantization_config(packs, ["lm_head", "model.layers.0.mlp.gate"])
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [
        ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        [rf"re:model\.layers\.{i}\.mlp\.experts\..*" for i in range(2)],
    ]
    QuantizationConfig.model_validate(config)
    packs["model.norm"] = parse_scheme("w8a8").packed(
        matrix(torch.bfloat16), component(torch.bfloat16)
    )
    mixed = quantization_config(packs, [])
    assert mixed["format"] == "mixed-precision"
    formats = [group["format"] for group in mixed["config_groups"].values()]
    assert formats == ["pack-quantized", "pack-quantized", "int-quantized"]
