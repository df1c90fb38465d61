"""The seam between a model's layers and its head: hidden states in, logits out, chunk by chunk."""

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from divergent_tokens.errors import ModelError
from divergent_tokens.layers import with_forward
from divergent_tokens.offload import is_offloaded, running_device


class _BodyDone(Exception):  # noqa: N818  # not an error: it carries the body's output out of the forward
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


_found: "WeakKeyDictionary[PreTrainedModel, tuple[str, type[ModelOutput]]]" = WeakKeyDictionary()
"""The bodies of networks that were looked into."""


@dataclass(frozen=True)
class Head:
    """A network split after its last layer; both halves are run by the network's own forward.

    The head is more than one matrix: Gemma 2 caps its logits, Granite and Cohere scale them.
    So nothing is rebuilt here. To get hidden states, the forward is left when the body returns;
    to get logits, it runs with a body that hands out hidden states known already.
    """

    network: PreTrainedModel
    body: nn.Module
    """The submodule whose first output is the final hidden state."""
    output: type[ModelOutput]
    """What the body returns."""

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states [prompt, token, hidden] of ids [prompt, token], padded on the right.

        Padding needs no mask: attention and state-space layers look to the left only.
        """

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _BodyDone(output[0])

        hook = self.body.register_forward_hook(leave)
        try:
            self.network(input_ids=ids, use_cache=False)
        except _BodyDone as done:
            return done.hidden.to(ids.device)  # several devices may have shared the layers
        finally:
            hook.remove()
        raise ModelError(
            f"{type(self.network).__name__} did not run the layers it ran when it was loaded"
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The network's logits [token, vocab] in float32 for hidden states [token, hidden]."""

        def forward(*_args: Any, **_kwargs: Any) -> ModelOutput:
            return self.output(last_hidden_state=hidden[None])

        with with_forward(self.body, forward):
            logits: Tensor = self.network(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0].to(hidden.device).float()


@torch.no_grad()
def kept_head(head: Head, hidden: Tensor) -> Head:
    """The same head with the weights of this moment, whatever they are lent for later.

    It runs a copy of the network's structure whose parameters share the storage of the original's,
    so it needs no memory. Who lends a weight gives the parameter other storage for a while
    (`parameter.data = ...`), which the copy does not see. Where a copy does not give the same
    logits of `hidden` [token, hidden] (somebody put a forward there that runs the original), the
    head itself comes back; also where weights wait elsewhere, since nothing there can be lent.
    """
    network = head.network
    if is_offloaded(network):
        return head
    shared: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    for parameter in network.parameters():
        plain = type(parameter) is nn.Parameter  # other kinds (bitsandbytes') are never lent
        alias = nn.Parameter(parameter.data, requires_grad=False) if plain else parameter
        shared[id(parameter)] = alias
    name = next(name for name, module in network.named_modules() if module is head.body)
    kept = copy.deepcopy(network, shared)
    found = Head(kept, kept.get_submodule(name), head.output)
    return found if torch.equal(found.logits(hidden), head.logits(hidden)) else head


@torch.no_grad()
def find_head(network: PreTrainedModel) -> Head:
    """Where the network's layers end, found by watching one short forward pass.

    It is found once for a network: weights may change afterwards, the way that it computes may not.
    Raises ModelError where the two halves do not give the network's own logits, bit for bit.
    """
    if network in _found:
        name, returned = _found[network]
        return Head(network, network.get_submodule(name), returned)
    calls: list[tuple[nn.Module, ModelOutput]] = []

    def watch(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, ModelOutput) and module is not network:
            calls.append((module, output))

    hooks = [module.register_forward_hook(watch) for module in network.modules()]
    embedding: Any = network.get_input_embeddings()
    device = running_device(embedding) or embedding.weight.device
    ids = torch.arange(4, device=device)[None]  # [prompt, token]
    try:
        whole = getattr(network(input_ids=ids, use_cache=False), "logits", None)
    finally:
        for hook in hooks:
            hook.remove()
    if whole is None or not calls:
        raise ModelError(
            f"{type(network).__name__} does not make logits from final hidden states; "
            "expected a decoder-only model in the way of transformers' *ForCausalLM classes"
        )
    body, output = calls[-1]  # the last to return is the outermost
    head = Head(network, body, type(output))
    again = head.logits(head.hidden(ids)[0])
    # NaN equals NaN here: what is not finite is found, and named, when the model is scored.
    if not torch.allclose(again, whole[0].float(), rtol=0, atol=0, equal_nan=True):
        raise ModelError(
            f"the logits of {type(network).__name__} do not follow from its final hidden states "
            "alone; such a model cannot be scored here"
        )
    name = next(name for name, module in network.named_modules() if module is body)
    _found[network] = (name, type(output))
    return head
