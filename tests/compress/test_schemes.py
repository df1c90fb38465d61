"""The grammar of schemes, what they refuse, what they do and what they weigh."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergent_tokens.compress import schemes
from divergent_tokens.compress.absmax import AbsMax
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.donors import Donor
from divergent_tokens.compress.formats import W8A8, Fp4, Fp8, PerToken
from divergent_tokens.compress.prune import prune_magnitude
from divergent_tokens.compress.quantize import dequantize, quantize
from divergent_tokens.compress.schemes import Magnitude, MagnitudePattern, Scheme, parse_scheme
from divergent_tokens.errors import SchemeError


def _component(
    n_out: int, n_in: int, dtype: torch.dtype = torch.bfloat16, name: str = "layers.0.up"
) -> Component:
    return Component(name, "up", 0, (n_out, n_in), dtype, f"{name}.weight")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("int8", (AbsMax(8),)),
        ("int2", (AbsMax(2),)),
        ("int8:tensor", (AbsMax(8, "tensor"),)),
        ("int4:g64", (AbsMax(4, 64),)),
        ("int4:g64:asym", (AbsMax(4, 64, symmetric=False),)),
        ("int3:asym", (AbsMax(3, "channel", symmetric=False),)),
        ("magnitude:0.5", (Magnitude(0.5),)),
        ("magnitude:2:4", (MagnitudePattern(2, 4),)),
        ("magnitude:0.5+int4:g64", (Magnitude(0.5), AbsMax(4, 64))),
        ("w8a8", (W8A8(),)),
        ("fp8", (Fp8(),)),
        ("mxfp4", (Fp4("mxfp4"),)),
        ("nvfp4", (Fp4("nvfp4"),)),
        ("magnitude:0.5+w8a8", (Magnitude(0.5), W8A8())),
        ("from:../other model/q4_0.gguf", (Donor("../other model/q4_0.gguf"),)),
        ("from:C:\\a+b:c+int4", (Donor("C:\\a+b:c+int4"),)),
    ],
)
def test_text_and_back(text: str, steps: tuple[schemes.Step, ...]) -> None:
    assert parse_scheme(text) == Scheme(steps)
    assert str(parse_scheme(text)) == text


def test_other_spellings_have_one_text() -> None:
    assert str(parse_scheme(" int4:asym:g64 ")) == "int4:g64:asym"
    assert str(parse_scheme("magnitude:.50 + int8")) == "magnitude:0.5+int8"
    assert str(parse_scheme(" from: model.gguf ")) == "from:model.gguf"


ABSMAX = st.builds(
    AbsMax,
    st.integers(2, 8),
    st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 512)),
    st.booleans(),
)
MAGNITUDE = st.builds(Magnitude, st.floats(0, 1, exclude_max=True))
FORMAT = st.sampled_from([W8A8(), Fp8(), Fp4("mxfp4"), Fp4("nvfp4")])
DONOR = st.builds(Donor, st.text(min_size=1).filter(lambda path: path == path.strip()))
STEPS = st.one_of(
    st.tuples(DONOR),
    st.tuples(ABSMAX),
    st.tuples(MAGNITUDE),
    st.tuples(FORMAT),
    st.tuples(ABSMAX, MAGNITUDE),
    st.tuples(MAGNITUDE, ABSMAX),
    st.tuples(MAGNITUDE, FORMAT, ABSMAX),
)


@settings(deadline=None, derandomize=True)
@given(STEPS)
def test_every_scheme_round_trips(steps: tuple[schemes.Step, ...]) -> None:
    assert parse_scheme(str(Scheme(steps))) == Scheme(steps)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("in8", "unknown scheme 'in8'; did you mean 'int8'?.* Known: int2, .*magnitude:0.5"),
        ("magnitud:0.5", "did you mean 'magnitude:0.5'"),
        ("Int8", "did you mean 'int8'"),
        ("int08", "did you mean 'int8'"),
        ("", "unknown scheme ''"),
        ("int8+", r"unknown scheme '' in 'int8\+'"),
        ("magnitude:0.5+itn4:g64", "unknown scheme 'itn4:g64' in .*did you mean 'int4:g64'"),
        ("int1", "asks for 1 bits; AbsMax takes 2 to 8"),
        ("int9:g64", "asks for 9 bits"),
        ("int16", "asks for 16 bits"),
        ("int4:64", "'64' is not known here"),
        ("int4:g0", "'g0' is not known here"),
        ("int4:g-64", "'g-64' is not known here"),
        ("int4:", "'' is not known here"),
        ("int4:g64:g64", "'g64' .*a second time"),
        ("int4:g64:tensor", "'tensor' .*a second time"),
        ("int4:asym:asym", "'asym' .*a second time"),
        ("magnitude", "expected a number from 0 up to"),
        ("magnitude:", "expected a number"),
        ("magnitude:half", "expected a number"),
        ("magnitude:1", "expected a number"),
        ("magnitude:-0.1", "expected a number"),
        ("magnitude:nan", "expected a number"),
        ("magnitude:50%", "expected a number"),
        ("int8+int4", "two steps of the kind 'int'"),
        ("w8a8:g64", "'w8a8:g64' says too much; 'w8a8' has nothing to choose"),
        ("mxfp8", "did you mean 'mxfp4'"),
        ("w8a8+fp8", "quantizes a component's inputs twice, by w8a8 and by fp8"),
        ("fp8+fp8", "two steps of the kind 'fp8'"),
        ("fp9", "Known: .*int8, .*w8a8, fp8, mxfp4, nvfp4, llm.int8, magnitude:0.5, .*from:PATH"),
        ("magnitude:0.5+from:a+b", "takes a step beside 'from:'"),
        ("from", "'from' names no checkpoint"),
        ("from: ", "names no checkpoint; expected the folder of one or a .gguf file"),
        ("form:model.gguf", "unknown scheme 'form:model.gguf'; did you mean 'from:PATH'"),
    ],
)
def test_bad_texts(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        parse_scheme(text)


def test_every_form_that_is_shown_parses() -> None:
    for family in schemes._FAMILIES:
        for form in family.forms:
            assert str(parse_scheme(form)) == form


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "size"),
    [
        ("int8", (10, 64), torch.bfloat16, 640 + 10 * 2),
        ("int8", (10, 64), torch.float32, 640 + 10 * 4),
        ("int8:tensor", (10, 64), torch.float16, 640 + 2),
        ("int4:g16", (10, 64), torch.bfloat16, 320 + 40 * 2),
        ("int4:g16:asym", (10, 64), torch.bfloat16, 320 + 20 + 40 * 2),
        ("int3", (1, 3), torch.bfloat16, 2 + 2),
        ("magnitude:0.9", (10, 64), torch.bfloat16, 1280),
        ("magnitude:0.9+int4", (10, 64), torch.bfloat16, 320 + 20),
        ("int4+magnitude:0.9", (10, 64), torch.bfloat16, 320 + 20),
    ],
)
def test_sizes_by_hand(text: str, shape: tuple[int, int], dtype: torch.dtype, size: int) -> None:
    assert parse_scheme(text).size_bytes(_component(*shape, dtype)) == size


def test_the_size_counts_what_the_record_holds() -> None:
    weight = torch.randn(6, 32).bfloat16()
    for text in ("int8", "int8:tensor", "int8:g8", "int8:g8:asym", "int8:asym"):
        (step,) = parse_scheme(text).steps
        assert isinstance(step, AbsMax)
        record = quantize(
            weight, bits=step.bits, granularity=step.granularity, symmetric=step.symmetric
        )
        tensors = [t for t in (record.codes, record.scales, record.zero_points) if t is not None]
        assert step.size_bytes(_component(6, 32), 0) == sum(t.nbytes for t in tensors)


FORMS = [form for family in schemes._FAMILIES for form in family.forms]


MADE = ("from:", "gptq:", "wanda:", "fisher:", "sparsegpt:")


@pytest.mark.parametrize("text", [f for f in FORMS if not f.startswith(MADE)])
def test_what_works_by_rows_gives_the_same_for_rows_together(text: str) -> None:
    scheme = parse_scheme(text)
    component = _component(6, 64)
    stack = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(0))
    together = scheme.compress(stack.flatten(0, 1), component).view_as(stack)
    apart = torch.stack([scheme.compress(weight, component) for weight in stack])
    assert torch.equal(together, apart) == scheme.by_rows


def test_activations_are_those_of_the_step_that_has_some() -> None:
    assert parse_scheme("int8").activations is None
    assert parse_scheme("magnitude:0.5+mxfp4").activations is None
    assert parse_scheme("magnitude:0.5+w8a8").activations == PerToken("w8a8")
    assert parse_scheme("fp8").activations == PerToken("fp8")
    assert len({parse_scheme(text).activations for text in ("fp8", "fp8+int8", "w8a8")}) == 2


def test_inputs_of_embeddings_cannot_be_quantized() -> None:
    embedding = Component("model.embed", "embedding", None, (64, 32), torch.bfloat16, "w")
    parse_scheme("nvfp4").check([embedding])
    with pytest.raises(SchemeError, match=r"w8a8 .*model\.embed looks rows up by token"):
        parse_scheme("magnitude:0.5+w8a8").check([_component(8, 32), embedding])


def test_steps_are_taken_in_order() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    kept = weight.clone()
    pruned = prune_magnitude(weight, 0.5)
    expected = dequantize(quantize(pruned, bits=4, granularity=4))
    assert torch.equal(
        parse_scheme("magnitude:0.5+int4:g4").compress(weight, _component(4, 8)), expected
    )
    assert torch.equal(weight, kept)


def test_groups_that_do_not_divide_name_those_that_do() -> None:
    components = [_component(8, 128), _component(8, 576, name="layers.1.q"), _component(8, 1536)]
    scheme = parse_scheme("int4:g128")
    scheme.check(components[:1])
    with pytest.raises(SchemeError) as caught:
        scheme.check(components)
    message = str(caught.value)
    assert "int4:g128: groups of 128 do not divide the 576 input columns of layers.1.q" in message
    assert "1 of 3 components" in message
    assert "fit all: 8, 16, 32, 64;" in message
    with pytest.raises(SchemeError, match="none from 8 up"):
        parse_scheme("magnitude:0.5+int4:g8").check([_component(8, 7)])
    parse_scheme("magnitude:0.5+int4:tensor").check([_component(8, 7)])


def test_two_of_four_neighbours_stay():
    weight = torch.randn(6, 16, dtype=torch.bfloat16)
    found = parse_scheme("magnitude:2:4").compress(weight, _component(6, 16))
    assert ((found.view(-1, 4) == 0).sum(1) == 2).all()
    kept = found != 0
    assert torch.equal(found[kept], weight[kept])
    lost = weight.masked_fill(kept, 0).abs().view(-1, 4).amax(1)
    stayed = found.abs().view(-1, 4).masked_fill(found.view(-1, 4) == 0, torch.inf).amin(1)
    assert (lost <= stayed).all()
    with pytest.raises(SchemeError, match="which 4 does not divide"):
        parse_scheme("magnitude:2:4").check([_component(6, 18)])
    with pytest.raises(SchemeError, match="'4:2' is no pattern of pruning"):
        parse_scheme("magnitude:4:2")
