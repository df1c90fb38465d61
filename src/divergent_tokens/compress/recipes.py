"""A plan as other tools' settings, so that their quantizers can carry out what was chosen here.

The decisions are ours, the arithmetic is theirs: a scale that they fit otherwise gives another KL.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme

from divergent_tokens.compress.absmax import AbsMax
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.gguf_weights import gguf_architecture
from divergent_tokens.compress.gptq import Gptq
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.compress.tools import Tool
from divergent_tokens.errors import SchemeError


@dataclass(frozen=True)
class Recipe:
    """A file for another tool."""

    text: str
    notes: tuple[str, ...]
    """How it is used, and what it does otherwise than planned."""


def recipe(file: PlanFile, tool: Tool) -> Recipe:
    """The plan's decisions as that tool reads them.

    Raises SchemeError, naming a component, for what the tool has no setting for or would leave
    undone in silence, and for a plan of nothing.
    """
    if not file.components:
        raise SchemeError(
            f"the plan leaves every component as it is, and {tool} has nothing to do; search one "
            "with a smaller budget"
        )
    return _RECIPES[tool](file.plan().schemes, file)


Schemes = Mapping[str, Scheme]


def _refused(name: str, scheme: Scheme, tool: Tool, takes: str) -> SchemeError:
    return SchemeError(
        f"{tool} has no setting for {name} ({scheme}); it takes {takes}: search a plan of those "
        "(dtm search --scheme), or write this one yourself (dtm compress)"
    )


def _weights_only(name: str, scheme: Scheme, tool: Tool, takes: str) -> AbsMax:
    """The one step of a scheme that rounds integers."""
    step = scheme.steps[0]
    step = step.grid if isinstance(step, Gptq) else step
    if len(scheme.steps) != 1 or not isinstance(step, AbsMax):
        raise _refused(name, scheme, tool, takes)
    return step


def _is_end(name: str) -> bool:
    """Whether it is the embedding or the head: all else lies in a layer, which has a number."""
    return not re.search(r"\.\d+\.", name)


def _any_of(names: Iterable[str]) -> str:
    r"""A regular expression for these dotted names and no others: short, for what they share.

    "a.0.q", "a.0.k" and "a.1.q" give r"a\.(?:0\.(?:q|k)|1\.q)".
    """
    tails: dict[str, list[str]] = {}
    for name in names:
        head, _, tail = name.partition(".")
        tails.setdefault(head, []).append(tail)
    heads: dict[str, list[str]] = {}  # what follows -> what it follows
    for head, rest in tails.items():
        longer = [tail for tail in rest if tail]
        follows = r"\." + _any_of(longer) if longer else ""
        if longer and len(longer) < len(rest):
            follows = f"(?:{follows})?"
        heads.setdefault(follows, []).append(re.escape(head))
    return _either([_either(found) + follows for follows, found in heads.items()])


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


# --- llm-compressor ---

_CONV1D = ("gpt2", "openai-gpt")
"""Whose layers are no nn.Linear, which is all that llm-compressor looks at."""


def _llm_compressor(schemes: Schemes, file: PlanFile) -> Recipe:
    """A modifier with a group for each scheme; its targets are module names."""
    model_type = file.base["model_type"]
    _check_nvfp4(schemes)
    modifiers: dict[str, dict[str, dict[str, Any]]] = {}
    for name, scheme in schemes.items():
        if model_type in _CONV1D and not _is_end(name):
            raise SchemeError(
                f"llm-compressor passes over {name}, a Conv1D of {model_type}, in silence; export "
                "to gptqmodel or llama.cpp, or write the plan with dtm compress --dense"
            )
        if not scheme.is_packable or len(scheme.steps) > 1:
            takes = "intB, w8a8, fp8, mxfp4, nvfp4 and gptq:intB on their own"
            raise _refused(name, scheme, Tool.llm_compressor, takes)
        kind = "GPTQModifier" if scheme.is_calibrated else "QuantizationModifier"
        groups = modifiers.setdefault(kind, {})
        group = groups.setdefault(str(scheme), {**_settings(scheme), "targets": []})
        group["targets"].append(name)
    found = {
        kind: {"config_groups": {f"group_{i}": g for i, g in enumerate(groups.values())}}
        for kind, groups in modifiers.items()
    }
    content = {"quantization_stage": {"quantization_modifiers": found}}
    notes = [
        "oneshot(model=..., recipe=FILE) carries it out, with a tokenizer and, for GPTQ, a "
        "dataset.",
        "The scale of its symmetric integers is max|w| / (2^(B-1) - 1/2), with one code more: "
        "another rounding than ours.",
    ]
    texts = sorted(set(map(str, schemes.values())))
    notes += [
        f"{text} becomes {text.removesuffix(':tensor')}, one scale a channel: vLLM takes no "
        "weights of one scale."
        for text in texts
        if text.endswith(":tensor")
    ]
    if "nvfp4" in texts:
        notes.append("nvfp4 shares one scale of the whole among q, k and v, and gate and up.")
    return Recipe(yaml.safe_dump(content, sort_keys=False, width=100), tuple(notes))


_SCALED_TOGETHER = ("q_proj k_proj v_proj", "gate_proj up_proj", "q_a_proj kv_a_proj_with_mqa")
"""What llm-compressor gives one nvfp4 scale, and stops at if only a part of it is nvfp4."""


def _check_nvfp4(schemes: Schemes) -> None:
    """Raise SchemeError for a matrix in nvfp4 beside one of its group that is not."""
    lasts = {name.rpartition(".")[2] for name in schemes}
    for name, scheme in schemes.items():
        parent, _, last = name.rpartition(".")
        if str(scheme) != "nvfp4":
            continue
        for group in map(str.split, _SCALED_TOGETHER):
            if last not in group or not lasts.issuperset(group):  # not all are in the model
                continue
            for other in (f"{parent}.{part}" for part in group):
                found = schemes.get(other)
                if str(found) != "nvfp4":
                    raise SchemeError(
                        f"llm-compressor gives {' and '.join(group)} one nvfp4 scale, and {name} "
                        f"is nvfp4 where {other} is {found or 'unchanged'}; search again with "
                        "--couple vllm"
                    )


def _settings(scheme: Scheme) -> dict[str, Any]:
    """Weights and inputs as compressed-tensors' arguments, from a matrix of ones."""
    step = scheme.steps[-1]
    if isinstance(step, Gptq):
        step = step.grid
        scheme = Scheme((step,))
    group = step.granularity if isinstance(step, AbsMax) else 32
    columns = 2 * group if isinstance(group, int) else 64
    weight = torch.ones(1, columns)
    component = Component("", "other", 0, (1, columns), weight.dtype, "")
    settings: QuantizationScheme = scheme.packed(weight, component).settings
    found = settings.model_dump(mode="json", exclude={"targets", "format", "output_activations"})
    return {
        part: {key: value for key, value in args.items() if value is not None}
        for part, args in found.items()
        if args is not None
    }


# --- GPTQModel ---

_GPTQ_BITS = (2, 3, 4, 8)  # It knows 5 to 7 too, in a format of its own that no server reads.
_GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)


def _gptqmodel(schemes: Schemes, _file: PlanFile) -> Recipe:
    """The most frequent setting for all, and `dynamic`: a pattern for each, and one for the rest.

    `-:` leaves out what it matches, and comes before every `+:` wherever it is written. It is
    asked of names inside a layer too (`mlp.up_proj`): one that matches them leaves out all layers.
    """
    of: dict[str, str] = {}
    for name, scheme in schemes.items():
        takes = f"int{'/'.join(map(str, _GPTQ_BITS))}, by channel or in groups, :asym or not"
        step = _weights_only(name, scheme, Tool.gptqmodel, takes)
        group = -1 if step.granularity == "channel" else step.granularity
        if step.bits not in _GPTQ_BITS or group not in (-1, *_GPTQ_GROUPS):
            raise _refused(name, scheme, Tool.gptqmodel, takes)
        if _is_end(name):
            raise SchemeError(
                f"gptqmodel quantizes what lies in the layers, and {name} does not; sweep again "
                f"with --exclude {name}"
            )
        setting = {"bits": step.bits, "group_size": group, "sym": step.symmetric}
        of[name] = json.dumps(setting)
    joined, torn = _joined(of)
    settings: dict[str, list[str]] = {}
    for name, text in (of | joined).items():
        settings.setdefault(text, []).append(name)
    layers = _any_of({re.split(r"\.\d+\.", name)[0] for name in schemes})
    rest = rf"-:^(?={layers}\.\d)(?!{_any_of(of | joined)}$)"
    dynamic: dict[str, dict[str, Any]] = {rest: {}}
    for text, names in settings.items():
        one = json.loads(text)
        # Its order of columns within groups stops at a matrix that has none.
        dynamic[f"+:^{_any_of(names)}$"] = one | (
            {"act_group_aware": False} if one["group_size"] == -1 else {}
        )
    frequent = max(settings, key=lambda text: len(settings[text]))
    notes = [
        "QuantizeConfig(**json.load(open(FILE))) reads it; the pattern with -: leaves out what the "
        "plan leaves as it is.",
        "It rounds by GPTQ, on the data that you give it: int4 becomes gptq:int4.",
    ]
    if torn:
        notes.append(
            f"vLLM and SGLang join the parts of {torn[0]} ({len(torn)} such), which the plan has "
            "in more than one way, and will not load it rightly: search again with --couple vllm."
        )
    return Recipe(
        json.dumps({**json.loads(frequent), "dynamic": dynamic}, indent=1) + "\n", tuple(notes)
    )


_JOINED = {"qkv_proj": "q_proj k_proj v_proj", "gate_up_proj": "gate_proj up_proj"}


def _joined(settings: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What servers join, by the name under which they look it up in `dynamic`.

    First the wholes whose parts all have one setting, with it; then those whose parts do not.
    """
    wholes: dict[str, dict[str, str]] = {}
    n_parts: dict[str, int] = {}
    for name, setting in settings.items():
        parent, _, last = name.rpartition(".")
        stack, mark, part = name.partition(".experts.")
        if mark:
            wholes.setdefault(f"{stack}.experts", {})[part] = setting
            continue
        for whole, parts in _JOINED.items():
            if last in parts.split():
                wholes.setdefault(f"{parent}.{whole}", {})[last] = setting
                n_parts[f"{parent}.{whole}"] = len(parts.split())
    joined, torn = {}, []
    for whole, found in wholes.items():
        if len(set(found.values())) == 1 and len(found) >= n_parts.get(whole, 0):
            joined[whole] = next(iter(found.values()))
        else:
            torn.append(whole)
    return joined, torn


# --- llama.cpp ---

_GGML: Mapping[tuple[int, bool], str] = {
    (8, True): "q8_0",
    (6, True): "q6_K",
    (5, True): "q5_0",
    (5, False): "q5_1",
    (4, True): "q4_0",
    (4, False): "q4_1",
    (3, True): "q3_K",
    (2, True): "q2_K",
}
"""(bits, symmetric) -> the nearest ggml type."""
_FLOATS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def _llama_cpp(schemes: Schemes, file: PlanFile) -> Recipe:
    """A `--tensor-type-file`: one regular expression and type a line, each for one tensor."""
    model_type = str(file.base["model_type"])
    names = _tensor_names(model_type, schemes)
    types: dict[str, tuple[str, str]] = {}
    for name, scheme in schemes.items():
        tensor, found = names(name), _ggml_type(name, scheme)
        other = types.setdefault(tensor, (found, name))
        if other[0] != found:
            raise SchemeError(
                f"llama.cpp keeps {other[1]} and {name} in one tensor, {tensor}, and the plan has "
                f"them as {other[0]} and {found}; search again with --couple vllm"
            )
    lines = [f"^{re.escape(tensor)}\\.weight$={found}" for tensor, (found, _) in types.items()]
    # Some builds take the first line that matches and some the last: this matches no other's.
    dtype = _FLOATS.get(_dtype(file.base["config"]), "bf16")
    lines.append(f"^(?!{_any_of(types)}\\.weight$)={dtype}")
    return Recipe(
        "\n".join(lines) + "\n",
        (
            f"llama-quantize --tensor-type-file FILE model-{dtype}.gguf model.gguf Q8_0 carries "
            f"it out, after convert_hf_to_gguf.py --outtype {dtype}; the last line keeps what the "
            "plan leaves as it is.",
            "ggml types have blocks of 32 (K types: 256) whatever the plan's groups; rows that 256 "
            "does not divide get a larger type than a K type.",
            *_rounded(schemes),
        ),
    )


def _rounded(schemes: Schemes) -> tuple[str, ...]:
    """What is said where codes are made without inputs."""
    found = next((str(scheme) for scheme in schemes.values() if scheme.is_calibrated), None)
    return (f"{found} is rounded to nearest there, not by GPTQ.",) if found else ()


def _dtype(config: object) -> str:
    """What a config says that the weights are kept in; 'None' if it does not."""
    outer = config if isinstance(config, dict) else {}
    inner = outer.get("text_config")
    found = inner.get("dtype") if isinstance(inner, dict) else None
    return str(found or outer.get("dtype"))


def _ggml_type(name: str, scheme: Scheme) -> str:
    if str(scheme) == "mxfp4":
        return "mxfp4"
    takes = "int2, int3, int4, int5, int6, int8, int4:asym, int5:asym and mxfp4"
    step = _weights_only(name, scheme, Tool.llama_cpp, takes)
    found = _GGML.get((step.bits, step.symmetric))
    if found is None:
        raise _refused(name, scheme, Tool.llama_cpp, takes)
    return found


def _tensor_names(model_type: str, schemes: Schemes) -> Callable[[str], str]:
    """From a component to the tensor that holds it in a GGUF."""
    architecture = gguf_architecture(model_type)
    layers = [int(number) for name in schemes for number in re.findall(r"\.(\d+)\.", name)[:1]]
    names = gguf.get_tensor_name_map(architecture, max(layers, default=0) + 1)

    def tensor(name: str) -> str:
        merged = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        found = names.get_name(merged)
        if found is None:
            raise SchemeError(
                f"gguf knows no tensor for {name} of {model_type}; leave it out of the plan"
            )
        return str(found)

    return tensor


# --- Model Optimizer ---


def _modelopt(schemes: Schemes, _file: PlanFile) -> Recipe:
    """A `quant_cfg` as auto_quantize chooses one: all off, then each module's quantizers."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, scheme in schemes.items():
        if re.search(r"\.experts\.\d+\.", name):
            raise SchemeError(
                f"modelopt keeps all experts in one module and has no quantizer by the name of "
                f"{name}; sweep again with --exclude '*.experts.*', or export to llm-compressor"
            )
        for part, settings in _quantizers(name, scheme).items():
            entries.append({"quantizer_name": f"{name}.{part}", "cfg": settings})
    content = {"quant_cfg": entries, "algorithm": "max"}
    notes = ["mtq.quantize(model, yaml.safe_load(open(FILE)), forward_loop) carries it out."]
    if "w8a8" in map(str, schemes.values()):
        notes.append("Its int8 inputs have the scale absmax / 127, where ours have absmax / 127.5.")
    return Recipe(yaml.safe_dump(content, sort_keys=False), (*notes, *_rounded(schemes)))


def _quantizers(name: str, scheme: Scheme) -> dict[str, dict[str, Any]]:
    per_token = {"type": "dynamic", "block_sizes": {-1: None}}
    known: dict[str, dict[str, dict[str, Any]]] = {
        "w8a8": {
            "weight_quantizer": {"num_bits": 8, "axis": 0},
            "input_quantizer": {"num_bits": 8, **per_token},
        },
        "fp8": {
            "weight_quantizer": {"num_bits": [4, 3], "axis": 0},
            "input_quantizer": {"num_bits": [4, 3], **per_token},
        },
        "mxfp4": {
            "weight_quantizer": {
                "num_bits": [2, 1],
                "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [8, 0]},
            }
        },
        "nvfp4": {
            "weight_quantizer": {
                "num_bits": [2, 1],
                "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]},
            }
        },
    }
    if str(scheme) in known:
        return known[str(scheme)]
    takes = "intB by tensor, channel or group, w8a8, fp8, mxfp4 and nvfp4"
    step = _weights_only(name, scheme, Tool.modelopt, takes)
    if not step.symmetric:
        raise _refused(name, scheme, Tool.modelopt, takes)
    where: dict[str, Any] = {"axis": 0}
    if step.granularity == "tensor":
        where = {"axis": None}
    elif isinstance(step.granularity, int):
        where = {"block_sizes": {-1: step.granularity}}
    return {"weight_quantizer": {"num_bits": step.bits, **where}}


_RECIPES: Mapping[Tool, Callable[[Schemes, PlanFile], Recipe]] = {
    Tool.llm_compressor: _llm_compressor,
    Tool.gptqmodel: _gptqmodel,
    Tool.llama_cpp: _llama_cpp,
    Tool.modelopt: _modelopt,
}
