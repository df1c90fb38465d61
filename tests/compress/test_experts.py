"""Expert slices against each architecture's arithmetic, written out with plain matrices."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import tiny
from divergent_tokens.compress import experts as experts_module
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.experts import ExpertSlice, expert_slices, is_expert_stack

E, H, I = 3, 10, 6  # noqa: E741 - experts, hidden and inner width, no two alike nor doubled


def _config(**more: object) -> SimpleNamespace:
    return SimpleNamespace(
        num_experts=E,
        num_local_experts=E,
        n_routed_experts=E,
        hidden_size=H,
        intermediate_size=I,
        moe_intermediate_size=I,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation="eager",
        **more,
    )


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def _gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


CLASSES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    Qwen3MoeExperts: _gated,
    GptOssExperts: _gpt_oss,
    OpenAIPrivacyFilterExperts: _gpt_oss,
    Step3p7Experts: _gated,
    Llama4TextExperts: _gated,
    NemotronHExperts: lambda _, up: torch.relu(up) ** 2,
}


def _random(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Biases are not ours to read; they are zero here, and not in the gpt-oss network.
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name.endswith("bias"):
                parameter.zero_()
    return module


def _view(module: nn.Module, piece: ExpertSlice) -> Tensor:
    matrix = module.get_parameter(piece.parameter).detach()[piece.index]
    matrix = matrix.T if piece.transposed else matrix
    return matrix if piece.rows is None else matrix[slice(*piece.rows)]


def _by_hand(module: nn.Module, x: Tensor, activation: Callable[..., Tensor]) -> Tensor:
    """[expert, token, hidden]: every expert on its own tokens, from the slices alone."""
    pieces = {(p.index, p.part): _view(module, p) for p in expert_slices(module)}
    outputs = []
    for expert in range(E):
        up = x[expert] @ pieces[expert, "up_proj"].T
        gate = x[expert] @ pieces.get((expert, "gate_proj"), pieces[expert, "up_proj"]).T
        outputs.append(activation(gate, up) @ pieces[expert, "down_proj"].T)
    return torch.stack(outputs)


def _by_module(module: nn.Module, x: Tensor) -> Tensor:
    n_tokens = x.shape[1]
    if isinstance(module, Llama4TextExperts):  # takes the tokens sorted by expert
        return module(x.reshape(E * n_tokens, H)).reshape(E, n_tokens, H)
    chosen = torch.arange(E).repeat_interleave(n_tokens)[:, None]  # one expert a token
    return module(x.reshape(-1, H), chosen, torch.ones(E * n_tokens, 1)).reshape(E, n_tokens, H)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_slices_compute_what_the_module_computes(kind: type[nn.Module]) -> None:
    module = _random(kind(_config()))
    x = torch.randn(E, 5, H, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for piece in (None, *expert_slices(module)):
            if piece is not None:
                view = _view(module, piece)
                assert view.shape == piece.shape
                view += torch.outer(torch.arange(view.shape[0]) - 2.0, torch.ones(view.shape[1]))
            expected = _by_hand(module, x, CLASSES[kind])
            torch.testing.assert_close(_by_module(module, x), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss", "qwen3-next"])
def test_experts_of_a_whole_network(architecture: str) -> None:
    """The routed sum from the components' views, with the network's own inputs and biases."""
    network = tiny.network(architecture)
    seen: list[tuple[Tensor, ...]] = []
    name = "model.layers.1.mlp.experts"
    stack = network.get_submodule(name)
    stack.register_forward_hook(
        lambda _, inputs, kwargs, output: seen.append((*inputs, *kwargs.values(), output)),
        with_kwargs=True,
    )
    with torch.no_grad():
        if architecture == "gpt-oss":
            stack.gate_up_proj_bias.normal_(generator=torch.Generator().manual_seed(0))
            stack.down_proj_bias.normal_(generator=torch.Generator().manual_seed(1))
        network(torch.arange(40)[None])
    x, chosen, shares, output = seen[0]
    weights = {c.name: weight_of(network, c) for c in find_components(network)}
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            gate, up, down = (
                weights[f"{name}.{expert}.{part}_proj"] for part in ("gate", "up", "down")
            )
            if architecture == "gpt-oss":
                bias = stack.gate_up_proj_bias[expert]
                inner = _gpt_oss(gate @ x[token] + bias[::2], up @ x[token] + bias[1::2])
                expected[token] += share * (down @ inner + stack.down_proj_bias[expert])
            else:
                expected[token] += share * (down @ _gated(gate @ x[token], up @ x[token]))
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


def test_shared_experts_that_are_stacked_one_by_one() -> None:
    inkling = pytest.importorskip("transformers.models.inkling.modeling_inkling")
    module = inkling.InklingSharedExperts(_config(n_shared_experts=2))
    pieces = list(expert_slices(module))
    assert [(p.index, p.part, p.shape) for p in pieces[:3]] == [
        (0, "gate_proj", (I, H)),
        (0, "up_proj", (I, H)),
        (0, "down_proj", (H, I)),
    ]
    assert len(pieces) == 6


# --- what the installed transformers holds, read from its source ---


_CLASS = re.compile(r"^(?:@[^\n]*\n)*class \w*Experts\w*\(.*:\n(?:(?:[ \t]+[^\n]*)?\n)*", re.M)


def _expert_classes() -> list[tuple[str, ast.ClassDef, str]]:
    """Every class of the installed transformers that stacks experts: its name, tree and source."""
    found = []
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        # Whole files would take half a minute to parse.
        for source in _CLASS.findall(path.read_text(encoding="utf-8")):
            node = ast.parse(source).body[0]
            if isinstance(node, ast.ClassDef) and "self.down_proj = nn.Parameter" in source:
                found.append((node.name, node, source))
    return found


def _declared(node: ast.ClassDef) -> dict[str, bool] | None:
    for decorator in node.decorator_list:
        if "use_experts_implementation" in ast.unparse(decorator):
            flags = {"is_transposed": False, "is_concatenated": True}
            for keyword in getattr(decorator, "keywords", []):
                flags[str(keyword.arg)] = ast.literal_eval(keyword.value)
            return flags
    return None


def _inner_comes_first(node: ast.ClassDef) -> bool:
    """Whether down_proj is made as [expert, inner, hidden]."""
    (down,) = (
        ast.unparse(statement.value)
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == "self.down_proj"
    )
    inner, hidden = re.search("intermediate|expert_dim", down), re.search("hidden|input_dim", down)
    assert inner
    assert hidden
    return inner.start() < hidden.start()


def test_what_is_declared_or_was_read_is_what_the_code_does() -> None:
    """For every class of the installed transformers; a class that is not known is refused."""
    known = []
    for name, node, source in _expert_classes():
        layout = experts_module._READ.get(name)
        declared = _declared(node)
        if declared is not None:
            layout = experts_module._Layout(
                declared["is_transposed"], interleaved=not declared["is_concatenated"]
            )
        if layout is not None:
            assert layout.interleaved == ("::2]" in source), name
            assert layout.transposed == _inner_comes_first(node), name
            known.append(name)
    assert len(known) > 40
    assert known.count("GptOssExperts") == 1


def test_stacks_are_told_from_other_modules() -> None:
    assert is_expert_stack(Qwen3MoeExperts(_config()))
    assert not is_expert_stack(nn.Conv1d(4, 4, 3))
    assert not is_expert_stack(nn.Linear(4, 4))
    scale = nn.Module()
    scale.vector = nn.Parameter(torch.ones(1, 1, 8))
    assert not is_expert_stack(scale)
