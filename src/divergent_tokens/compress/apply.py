"""A plan carried out on a model: lent, every bit coming back, or for good.

Weights get other values; where a scheme quantizes inputs too, they are changed on their way into
the component's module each time that it runs.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.compress.components import Component, component_view, find_components
from divergent_tokens.compress.expert_forward import ExpertInputs, keep_open
from divergent_tokens.compress.plan import Plan, check_plan
from divergent_tokens.compress.schemes import Activations
from divergent_tokens.errors import ModelError
from divergent_tokens.offload import change_elsewhere, is_offloaded, lent_elsewhere, running_device

if TYPE_CHECKING:
    from divergent_tokens.models import Model


@contextmanager
def lent_plan(
    model: "Model", plan: Plan, *, components: Sequence[Component] | None = None
) -> "Iterator[Model]":
    """The model with the plan's components compressed, as long as the context lasts.

    The network is the same object: whoever else holds it sees the change. Afterwards, and after
    any exception or interrupt, every parameter has its own storage back, so nothing can have been
    rounded, and inputs go in as they are. The memory of the touched parameters is needed twice;
    those that wait outside the device are compressed each time that they are read instead.
    Lending may be nested.

    `components`, if known already, saves finding them again. Raises SchemeError or ModelError
    before anything is changed, if the plan does not fit.
    """
    holders = _holders(model.network, plan, components)
    with ExitStack() as stack:  # gives back the rest too if giving back is interrupted
        _quantize_inputs(stack, model.network, holders, plan)
        for parameter, held in holders:
            if parameter.is_meta:
                change = partial(_compressed, held=held, plan=plan)
                stack.enter_context(lent_elsewhere(model.network, held[0].parameter, change))
                continue
            compressed = _compressed(parameter, held, plan)
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = compressed
        yield _renamed(model, plan)


def apply_plan(
    model: "Model", plan: Plan, *, components: Sequence[Component] | None = None
) -> "Model":
    """The model with the plan's components compressed for good, in the same network.

    One parameter at a time, so that no more memory is needed than for the largest. Raises before
    anything is changed if the plan does not fit; after an interrupt load the model again.
    """
    holders = _holders(model.network, plan, components)
    with ExitStack() as stack:
        _quantize_inputs(stack, model.network, holders, plan)
        stack.pop_all()  # it is not closed: they stay
    for parameter, held in holders:
        if parameter.is_meta:
            change = partial(_compressed, held=held, plan=plan)
            change_elsewhere(model.network, held[0].parameter, change)
        else:
            parameter.data = _compressed(parameter, held, plan)
    return _renamed(model, plan)


_Holder = tuple[nn.Parameter, list[Component]]


def _holders(
    network: PreTrainedModel, plan: Plan, components: Sequence[Component] | None
) -> list[_Holder]:
    """Each parameter that changes, with the components to change in it; all that can fail, here."""
    known = find_components(network) if components is None else components
    changed: dict[str, list[Component]] = {}
    for component in check_plan(plan, known):
        changed.setdefault(component.parameter, []).append(component)
    holders = []
    for name, held in changed.items():
        parameter = network.get_parameter(name)
        _check_parameter(network, parameter, held)
        holders.append((parameter, held))
    return holders


def _check_parameter(
    network: PreTrainedModel, parameter: nn.Parameter, held: list[Component]
) -> None:
    for component in held:
        component_view(parameter.detach(), component)  # raises if it is another network's component
    check_waiting(network, held)
    ends = cast(Any, network)  # transformers leaves these two methods untyped
    embeddings = (ends.get_input_embeddings(), ends.get_output_embeddings())
    shared = any(getattr(module, "weight", None) is parameter for module in embeddings)
    inner = [component for component in held if not component.is_end]
    if shared and inner:
        raise ModelError(
            f"{inner[0].name} shares its weight with the embeddings or the head, which would "
            "change with it; exclude it"
        )


def check_waiting(network: PreTrainedModel, components: Sequence[Component]) -> None:
    """Raise ModelError for embeddings or head of a network whose layers wait elsewhere.

    The base's own head could not be kept beside the changed one.
    """
    ends = [component.name for component in components if component.is_end]
    if ends and is_offloaded(network):
        raise ModelError(
            f"{ends[0]} cannot be changed while layers wait outside the device; exclude it, or "
            "load the model whole"
        )


@torch.no_grad()
def _compressed(parameter: Tensor, held: list[Component], plan: Plan) -> Tensor:
    """A copy of the parameter's storage in which the components are compressed."""
    storage = parameter.detach().clone()
    for component in held:
        weight = component_view(parameter, component)
        compressed = plan.schemes[component.name].compress(weight, component)
        component_view(storage, component).copy_(compressed)
    return storage


# --- inputs ---


def _quantize_inputs(
    stack: ExitStack, network: PreTrainedModel, holders: Sequence[_Holder], plan: Plan
) -> None:
    """Quantize what goes into the components whose scheme says so, until the stack is closed."""
    active: list[tuple[nn.Parameter, Component, Activations]] = []
    for parameter, held in holders:
        for component in held:
            activations = plan.schemes[component.name].activations
            if activations is not None:
                active.append((parameter, component, activations))
    if not active:
        return
    users: dict[int, list[nn.Module]] = {}  # of each weight; several where modules share it
    for module in network.modules():
        users.setdefault(id(module._parameters.get("weight")), []).append(module)
    stacked: dict[tuple[str, str], dict[Activations, Tensor]] = {}
    for parameter, component, activations in active:
        if component.stack_index is None:
            for module in users[id(parameter)]:
                hook = module.register_forward_pre_hook(partial(_quantized_first, activations))
                stack.callback(hook.remove)
            continue
        masks = stacked.setdefault(component.part_of_stack, {})
        owner = network.get_submodule(component.part_of_stack[0])
        device = running_device(owner) or parameter.device
        none = torch.zeros(len(parameter), dtype=torch.bool, device=device)
        masks.setdefault(activations, none)[component.stack_index] = True
    keep_open(stack, network, [c for _, c, _ in active], partial(_quantized_rows, stacked))


def _quantized_first(
    activations: Activations, _module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """A module's inputs, the first of them quantized."""
    return (activations.quantize(inputs[0]), *inputs[1:])


def _quantized_rows(
    stacked: Mapping[tuple[str, str], Mapping[Activations, Tensor]],
    inputs: ExpertInputs,
    times: Callable[[Tensor], Tensor],
) -> Tensor:
    """The product of a part of all experts, the rows of those whose mask says so quantized."""
    x = inputs.x  # [row, in]
    for activations, experts in stacked.get((inputs.stack, inputs.part), {}).items():
        chosen = experts[inputs.experts][:, None]
        x = torch.where(chosen, activations.quantize(inputs.x), x)
    return times(x)


def _renamed(model: "Model", plan: Plan) -> "Model":
    # Another fingerprint too: nothing that was cached for the base is true of this model.
    fingerprint = hashlib.sha256(f"{model.fingerprint} {plan.digest}".encode()).hexdigest()
    return replace(model, reference=f"{model.reference} [{plan.name}]", fingerprint=fingerprint)
