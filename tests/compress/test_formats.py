"""The formats against values worked out by hand, and against compressed-tensors' own modules."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor, nn

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.formats import W8A8, Fp4, Fp8, PerToken
from divergent_tokens.compress.quantize import dequantize, quantize
from divergent_tokens.errors import SchemeError

PRESETS = {"w8a8": "W8A8", "fp8": "FP8_DYNAMIC", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
STEPS = {"w8a8": W8A8(), "fp8": Fp8(), "mxfp4": Fp4("mxfp4"), "nvfp4": Fp4("nvfp4")}
DTYPES = [torch.float32, torch.bfloat16]


def _component(n_out: int, n_in: int, dtype: torch.dtype = torch.bfloat16) -> Component:
    return Component("layers.0.up", "up", 0, (n_out, n_in), dtype, "layers.0.up.weight")


def _compress(name: str, rows: list[list[float]], dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.tensor(rows, dtype=dtype)
    return STEPS[name].compress(weight, _component(*weight.shape))


# --- by hand ---


def test_fp8_by_hand() -> None:
    """Scale 448/448 = 1: E4M3 has 3 bits of mantissa, so 17 is a tie between 16 and 18."""
    assert _compress("fp8", [[448.0, 17.0, -19.0, 0.3], [0.0, 0.0, 0.0, 0.0]]).tolist() == [
        [448.0, 16.0, -20.0, 0.3125],
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_mxfp4_by_hand() -> None:
    """E2M1 has 0, .5, 1, 1.5, 2, 3, 4, 6; a group up to 7 has scale 1, from 7 on scale 2."""
    group = [6.0, 2.4, 5.1, -0.7, 0.2] + [0.0] * 27
    assert _compress("mxfp4", [group]).tolist() == [[6.0, 2.0, 6.0, -0.5, 0.0] + [0.0] * 27]
    group[0] = 8.0
    assert _compress("mxfp4", [group])[0, :3].tolist() == [8.0, 2.0, 6.0]


def test_nvfp4_by_hand() -> None:
    """The whole's scale is 448 · 6 / 6 = 448; a group up to 3 then has E4M3(224) / 448 = ½."""
    rows = [[6.0, 2.4] + [0.0] * 14 + [3.0, 1.2] + [0.0] * 14]
    expected = torch.tensor([[6.0, 2.0] + [0.0] * 14 + [3.0, 1.0] + [0.0] * 14])
    torch.testing.assert_close(_compress("nvfp4", rows), expected)


def test_inputs_by_hand() -> None:
    """int8: scale 127.5 / 127.5; +127.5 is cut off at 127, ties go to even codes."""
    x = torch.tensor([[[127.5, 0.5, 1.5, -2.4], [0.0, 0.0, 0.0, 0.0]]])
    assert PerToken("w8a8").quantize(x).tolist() == [[[127.0, 0.0, 2.0, -2.0], [0.0] * 4]]
    x = torch.tensor([448.0, 17.0, -19.0, 0.3])
    assert PerToken("fp8").quantize(x).tolist() == [448.0, 16.0, -20.0, 0.3125]


@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_have_a_scale_for_each_token_in_any_shape(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x *= torch.logspace(-3, 3, 12).view(3, 4, 1).to(dtype)
    kept = x.clone()
    quantized = PerToken(kind).quantize(x)
    assert quantized.dtype == dtype
    assert quantized.shape == x.shape
    for i in range(3):
        for j in range(4):
            assert torch.equal(PerToken(kind).quantize(x[i, j]), quantized[i, j])
    assert torch.equal(PerToken(kind).quantize(x.flatten(0, 1)).view_as(x), quantized)
    assert torch.equal(PerToken(kind).quantize(x[:, None])[:, 0], quantized)
    error = (quantized - x).abs().amax(-1) / x.abs().amax(-1)
    assert error.min() > 0
    assert error.max() < {"w8a8": 0.012, "fp8": 0.04}[kind]
    assert torch.equal(x, kept)
    assert PerToken(kind).quantize(x[:0]).shape == (0, 4, 16)


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    factors = torch.arange(24.0).view(3, 8)
    (gradient,) = torch.autograd.grad((PerToken("fp8").quantize(x) * factors).sum(), x)
    assert torch.equal(gradient, factors)


# --- compressed-tensors' own ---


def _theirs(name: str, weight: Tensor) -> nn.Linear:
    """A linear layer under their configuration, with scales from its own largest weights."""
    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype))
    model[0].weight.data = weight.clone()
    scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group": scheme}))
    linear, args = model[0], scheme.weights
    groups = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
    low, high = groups.amin(-1), groups.amax(-1)
    whole = None
    if name == "nvfp4":
        whole = generate_gparam(low.amin(), high.amax())
        linear.weight_global_scale.data = whole
    scale, zero_point = calculate_qparams(low, high, args, global_scale=whole)
    linear.weight_scale.data = scale.to(linear.weight_scale.dtype)
    if hasattr(linear, "weight_zero_point"):
        linear.weight_zero_point.data = zero_point
    linear.quantization_status = QuantizationStatus.FROZEN
    if name == "w8a8":  # AbsMax codes are ours, and stay: max|w| / 127
        linear.weight.data = dequantize(quantize(weight, bits=8))
        linear.quantization_status = QuantizationStatus.COMPRESSED
    return linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_a_layer_computes_what_theirs_does(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(48, 64, generator=generator) * 0.05).to(dtype)
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    step = STEPS[name]
    ours = step.compress(weight, _component(48, 64, dtype))
    assert ours.dtype == dtype
    inputs = x if step.activations is None else step.activations.quantize(x)
    linear = _theirs(name, weight)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), inputs @ ours.t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_what_they_store_reads_back_as_ours(name: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    weight[3] = 0
    linear = _theirs(name, weight)
    scheme = linear.quantization_scheme
    format = infer_module_format(nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(format.value)
    stored = compressor.compress(dict(linear.state_dict()), scheme)
    if name == "w8a8":
        coded = quantize(weight, bits=8)
        stored |= {"weight": coded.codes, "weight_scale": coded.scales}
    read = compressor.decompress(stored, scheme)["weight"]  # fp4 comes in bfloat16, always
    ours = STEPS[name].compress(weight, _component(48, 64, dtype)).to(read.dtype)
    torch.testing.assert_close(read, ours, rtol=1e-6, atol=0)
    kept = [stored[key] for key in compressor.compression_param_names(scheme) if key in stored]
    assert STEPS[name].size_bytes(_component(48, 64, dtype), 0) == sum(t.nbytes for t in kept)


# --- sizes and refusals ---


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("w8a8", torch.bfloat16, 640 + 10 * 2),
        ("w8a8", torch.float32, 640 + 10 * 4),
        ("fp8", torch.float16, 640 + 10 * 2),
        ("mxfp4", torch.bfloat16, 320 + 20),
        ("nvfp4", torch.bfloat16, 320 + 40 + 4),
    ],
)
def test_sizes_by_hand(name: str, dtype: torch.dtype, size: int) -> None:
    assert STEPS[name].size_bytes(_component(10, 64, dtype), 1280) == size


@pytest.mark.parametrize(("name", "group"), [("mxfp4", 32), ("nvfp4", 16)])
def test_groups_that_do_not_divide_are_refused_by_name(name: str, group: int) -> None:
    STEPS[name].check([_component(7, 64)])
    with pytest.raises(SchemeError, match=rf"{name}: its groups of {group} do not divide the 40 "):
        STEPS[name].check([_component(7, 64), _component(7, 40)])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_nothing_comes_of_nothing(name: str, dtype: torch.dtype) -> None:
    zeros = torch.zeros(4, 64, dtype=dtype)
    assert torch.equal(STEPS[name].compress(zeros, _component(4, 64)), zeros)
