"""A tiny checkpoint loaded whole, and with layers that wait on disk; reads are counted."""

from collections import Counter
from contextlib import contextmanager

import pytest
from accelerate.utils.offload import OffloadedWeightsLoader

import tiny
from divergent_tokens.layers import decoder_layers
from divergent_tokens.models import load_model


def n_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def checkpoint(folder, architecture="llama"):
    network = tiny.network(architecture)
    network.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return network


def both(folder, architecture="llama", room=0.0):
    """Whole, and with room for so many layers besides the one that is at hand."""
    network = checkpoint(folder, architecture)
    layers = decoder_layers(network)[1]
    widest = max(map(n_bytes, layers))
    most = n_bytes(network) - n_bytes(layers) + int((1 + room) * widest) + 16
    whole = load_model(folder, device="cpu")
    return whole, load_model(folder, device="cpu", max_memory=most)


@contextmanager
def counted_reads():
    """How often each weight is read from where it waits."""
    reads = Counter()
    own = OffloadedWeightsLoader.__getitem__

    def counting(self, name):
        reads[name] += 1
        return own(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
        yield reads
