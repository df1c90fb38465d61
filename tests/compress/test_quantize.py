"""AbsMax against values worked out by hand, an obvious loop, and compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward as theirs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from divergent_tokens.compress.quantize import Granularity, Quantized, dequantize, quantize

ROW = torch.tensor([[0.0, 3.5, -7.0, 1.4], [0.6, 0.2, -0.1, 0.3]])


def test_symmetric_by_hand() -> None:
    """4 bits: scales 7/7 and 0.6/7; 3.5 is a tie and goes to the even code."""
    quantized = quantize(ROW, bits=4)
    assert quantized.codes.tolist() == [[0, 4, -7, 1], [7, 2, -1, 4]]  # .2/.0857 = 2.33, .3: 3.5
    torch.testing.assert_close(quantized.scales, torch.tensor([[1.0], [0.6 / 7]]))
    assert quantized.zero_points is None
    torch.testing.assert_close(
        dequantize(quantized),
        torch.tensor([[0.0, 4.0, -7.0, 1.0], [0.6, 1.2 / 7, -0.6 / 7, 2.4 / 7]]),
    )


def test_per_tensor_and_per_group_by_hand() -> None:
    tensor = quantize(ROW, bits=4, granularity="tensor")
    assert tensor.scales.tolist() == [[1.0]]
    assert tensor.codes.tolist() == [[0, 4, -7, 1], [1, 0, 0, 0]]
    groups = quantize(ROW, bits=4, granularity=2)
    torch.testing.assert_close(groups.scales, torch.tensor([[0.5, 1.0], [0.6 / 7, 0.3 / 7]]))
    assert groups.codes.tolist() == [[0, 7, -7, 1], [7, 2, -2, 7]]


def test_two_bits_are_ternary() -> None:
    quantized = quantize(torch.tensor([[1.0, 0.6, 0.4, -0.6, -1.0]]), bits=2)
    assert quantized.codes.tolist() == [[1, 1, 0, -1, -1]]


def test_asymmetric_by_hand() -> None:
    """2 bits: 3 steps. From -1 to 2 the step is 1, and 0 is code -1; from 0 to 6 it is 2."""
    weight = torch.tensor([[-1.0, 0.0, 2.0, 0.9], [3.0, 6.0, 2.0, 4.5]])
    quantized = quantize(weight, bits=2, symmetric=False)
    assert quantized.scales.tolist() == [[1.0], [2.0]]
    assert quantized.zero_points is not None
    assert quantized.zero_points.tolist() == [[-1], [-2]]
    assert quantized.codes.tolist() == [[-2, -1, 1, 0], [0, 1, -1, 0]]
    # 3 lies between codes and goes to the even one, as 1.5 - 2 = -0.5 does.
    assert dequantize(quantized).tolist() == [[-1.0, 0.0, 2.0, 1.0], [4.0, 6.0, 2.0, 4.0]]


def test_the_scale_is_rounded_before_coding() -> None:
    """bf16 has no 1/7: with the rounded 0.142578 the code of 0.5 is 3.507 -> 4, not 3.5 -> 4."""
    weight = torch.tensor([[1.0, 0.5, 0.35546875]], dtype=torch.bfloat16)
    quantized = quantize(weight, bits=4)
    assert quantized.scales.dtype == torch.bfloat16
    scale = quantized.scales.item()
    assert scale == 0.142578125
    assert quantized.codes.tolist() == [[7, 4, round(0.35546875 / scale)]]
    assert dequantize(quantized).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16,) * 2],
)
def test_dtypes(dtype: torch.dtype, stored: torch.dtype) -> None:
    quantized = quantize(torch.randn(4, 8).to(dtype), bits=8)
    assert quantized.scales.dtype == stored
    assert dequantize(quantized).dtype == dtype
    assert quantized.codes.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, 6e-8, 1e-6])
def test_zeros_and_denormals(
    dtype: torch.dtype, symmetric: bool, granularity: Granularity, largest: float
) -> None:
    weight = torch.tensor([[0.0] * 8, [largest, -largest] * 4]).to(dtype)
    for bits in (2, 4, 8):
        quantized = quantize(weight, bits=bits, granularity=granularity, symmetric=symmetric)
        restored = dequantize(quantized)
        assert bool((quantized.scales > 0).all())
        assert bool(restored.isfinite().all())
        assert restored[0].tolist() == [0.0] * 8
        # A scale that its dtype cannot hold rounds the row to zero, or to a step of its grain.
        assert float(restored.abs().max()) <= 2 * float(weight.abs().max())


def test_codes_stay_in_range_where_the_scale_cannot_be_stored() -> None:
    """fp16 has no 1.4 · 2^-24, only 2^-24: the largest code would be 178, and wrap in int8."""
    grain = 2.0**-24
    weight = torch.tensor([[178 * grain, -178 * grain, 3 * grain]]).half()
    quantized = quantize(weight, bits=8)
    assert quantized.scales.item() == grain
    assert quantized.codes.tolist() == [[127, -127, 3]]
    asymmetric = quantize(weight.clamp(min=0) * 2, bits=8, symmetric=False)
    assert asymmetric.scales.item() == grain
    assert asymmetric.codes.tolist() == [[127, -128, 6 - 128]]


def _slow(
    weight: Tensor, bits: int, granularity: Granularity, symmetric: bool
) -> list[list[float]]:
    """One weight at a time, in Python's numbers."""
    n_out, n_in = weight.shape
    width = n_in if isinstance(granularity, str) else granularity
    rows: list[list[float]] = []
    for row in range(n_out):
        restored = []
        for column in range(n_in):
            start = column // width * width
            shared = weight[row, start : start + width]
            if granularity == "tensor":
                shared = weight.flatten()
            values = shared.tolist()
            if symmetric:
                top = 2 ** (bits - 1) - 1
                scale, zero = max(map(abs, values)) / top, 0
                lowest, highest = -top, top
            else:
                lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
                scale = (max(*values, 0.0) - min(*values, 0.0)) / (2**bits - 1)
                zero = lowest - round(min(*values, 0.0) / scale)
            code = round(float(weight[row, column]) / scale + zero)
            restored.append((min(max(code, lowest), highest) - zero) * scale)
        rows.append(restored)
    return rows


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 3, 6])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_obvious_loop(bits: int, granularity: Granularity, symmetric: bool) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(bits))
    quantized = quantize(weight, bits=bits, granularity=granularity, symmetric=symmetric)
    slow = torch.tensor(_slow(weight, bits, granularity, symmetric))
    torch.testing.assert_close(dequantize(quantized), slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_reads_our_codes_as_we_do(
    bits: int, granularity: Granularity, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = quantize(weight, bits=bits, granularity=granularity, symmetric=symmetric)
    grouped = not isinstance(granularity, str)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if grouped else granularity,
        group_size=granularity if grouped else None,
    )
    zeros = ours.zero_points
    restored = theirs.dequantize(ours.codes, ours.scales, zeros, args, dtype=dtype)
    assert torch.equal(restored, dequantize(ours))
    if dtype == torch.float32:  # they divide in the weight's dtype, we in float32
        no_zeros = torch.zeros_like(ours.scales, dtype=torch.int8)
        codes = theirs.quantize(weight, ours.scales, no_zeros if zeros is None else zeros, args)
        if symmetric:
            # Their grid has one more negative code; a weight never reaches it with our scale.
            assert int(codes.min()) >= -(2 ** (bits - 1) - 1)
        assert torch.equal(codes.to(torch.int8), ours.codes)


# --- properties ---


def _weight(seed: int, n_out: int, n_groups: int, scale: float, offset: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_out, 4 * n_groups, generator=generator) + offset) * scale


WEIGHTS = st.builds(
    _weight,
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
    st.sampled_from([0.0, 0.5, -5.0]),
)
GRANULARITIES = st.sampled_from(["tensor", "channel", 4])


def _step(quantized: Quantized, weight: Tensor) -> Tensor:
    """Each weight's step, [out, in]."""
    rows, groups = quantized.scales.shape
    scales = quantized.scales.float()[..., None].expand(
        rows, groups, weight.numel() // rows // groups
    )
    return scales.reshape(weight.shape)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(WEIGHTS, st.integers(2, 8), GRANULARITIES, st.booleans(), st.booleans())
def test_codes_in_range_and_errors_within_half_a_step(
    weight: Tensor, bits: int, granularity: Granularity, symmetric: bool, narrow: bool
) -> None:
    if narrow:
        weight = weight.bfloat16()
    kept = weight.clone()
    quantized = quantize(weight, bits=bits, granularity=granularity, symmetric=symmetric)
    assert torch.equal(weight, kept)
    lowest, highest = -(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1
    assert lowest <= int(quantized.codes.min()) <= int(quantized.codes.max()) <= highest
    if quantized.zero_points is not None:
        assert lowest <= int(quantized.zero_points.min())
    step = _step(quantized, weight)
    error = (dequantize(quantized).float() - weight.float()).abs()
    allowed = 0.5 * step * (1 + 1e-4)
    if narrow:
        # bf16 keeps 8 bits: of the scale (times up to 2^B - 1 codes), and of the product.
        allowed = allowed + weight.float().abs() * 2**-8
        allowed = allowed + (0 if symmetric else step * (2**bits - 1) * 2**-9)
    assert bool((error <= allowed).all()), float((error / step).max())


@settings(deadline=None, derandomize=True, max_examples=150)
@given(WEIGHTS, st.integers(2, 8), GRANULARITIES, st.booleans())
def test_quantizing_the_dequantized_changes_nothing(
    weight: Tensor, bits: int, granularity: Granularity, symmetric: bool
) -> None:
    once = quantize(weight, bits=bits, granularity=granularity, symmetric=symmetric)
    again = quantize(dequantize(once), bits=bits, granularity=granularity, symmetric=symmetric)
    if not symmetric:
        # Rounding the zero point may leave an end of the grid unused; the next grid is then finer.
        codes = once.codes.reshape(*once.scales.shape, -1)
        assert once.zero_points is not None
        low, high = (
            torch.minimum(codes.amin(-1), once.zero_points),
            torch.maximum(codes.amax(-1), once.zero_points),
        )
        assume(bool((high - low == 2**bits - 1).all()))
    assert torch.equal(again.codes, once.codes)
    torch.testing.assert_close(dequantize(again), dequantize(once), rtol=3e-7, atol=0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(WEIGHTS, st.integers(2, 8), GRANULARITIES, st.booleans())
def test_zeros_stay_zero(
    weight: Tensor, bits: int, granularity: Granularity, symmetric: bool
) -> None:
    weight[:, ::2] = 0
    restored = dequantize(quantize(weight, bits=bits, granularity=granularity, symmetric=symmetric))
    assert bool((restored[:, ::2] == 0).all())
