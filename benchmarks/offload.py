"""A model larger than the device memory it is allowed, beside the same model on the device.

Random weights in bfloat16. A quarter of the weights may lie on the device; the other layers wait in
page-locked CPU memory. Reads are counted, and held against the bytes over the measured rate of
copies from there. With several GPUs the layers are spread over them as well.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model
from accelerate.utils.offload import OffloadedWeightsLoader
from hardware import SHAPES, random_model
from machine import machine, seconds_of, write_result
from random_completions import random_completions

from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.layers import decoder_layers
from divergent_tokens.measure.batches import BatchSize
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.states import base_states
from divergent_tokens.models import Model
from divergent_tokens.offload import pin_weights, placement
from divergent_tokens.probe import probe
from divergent_tokens.sweep import sweep

Found = dict[str, Any]
ROWS = 7
"""Measured rows: those of one layer, in the middle."""


def main() -> None:
    arguments = parse()
    model = random_model(arguments.shapes, arguments.device)
    weights = sum(p.nbytes for p in model.network.parameters())
    rate = copy_rate(model.device)
    completions = random_completions(
        arguments.n_prompts,
        vocabulary=SHAPES[arguments.shapes]["vocab_size"],
        prefix=arguments.prefix,
        new_tokens=arguments.new_tokens,
    )
    found = {"resident": measured(arguments, model, completions)}
    with tempfile.TemporaryDirectory() as folder:  # on a CPU layers wait on disk
        if torch.cuda.device_count() > 1:
            both = [torch.device("cuda", i) for i in range(2)]
            found["spread"] = measured(
                arguments, dispatch(model, both, weights * 6 // 10, folder), completions
            )
            gather(model)
        offloaded = dispatch(model, [model.device], int(weights * arguments.share), folder)
        found["offloaded"] = measured(arguments, offloaded, completions)
    report(arguments, found, weights, rate)


def copy_rate(device: torch.device) -> float:
    """Bytes a second from page-locked memory (on a CPU: from one place to another)."""
    host = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8)
    host = host.pin_memory() if device.type == "cuda" else host
    there = torch.empty_like(host, device=device)
    there.copy_(host)
    return 4 * host.nbytes / seconds_of(lambda: [there.copy_(host) for _ in range(4)])


def dispatch(model: Model, devices: list[torch.device], most: int, folder: str) -> Model:
    """The same network with so many bytes of weights on each device."""
    network: Any = model.network
    places = placement(network, devices, dtype=model.dtype, max_memory=most)
    assert places is not None
    network.to("cpu")
    main = "cpu" if devices[0].type == "cpu" else devices[0].index
    dispatch_model(network, places, main_device=main, offload_dir=folder, force_hooks=True)
    network.hf_device_map = places
    if model.device.type == "cuda":
        pin_weights(network)
        torch.cuda.empty_cache()
    return model


def gather(model: Model) -> None:
    """Everything on the first device again."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model.network)
    model.network.to("cuda:0")


def measured(arguments: argparse.Namespace, model: Model, completions: Completions) -> Found:
    """Seconds, memory, reads of each layer, and numbers of a pass of each kind."""
    components = find_components(model.network)
    scheme = parse_scheme("int8")
    head = find_head(model.network)
    middle = len(decoder_layers(model.network)[1]) // 2
    few = [c for c in components if c.layer == middle][:ROWS]
    found: Found = {}

    def note(
        name: str, run: Callable[[], Any], value: Callable[[Any], Any], times: int = 2
    ) -> None:
        for _ in range(times):  # the first warms up
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            kept: list[Any] = []
            with counted(model) as reads:
                seconds = seconds_of(lambda: kept.append(run()))  # noqa: B023
        peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
        found[name] = {
            "seconds": seconds,
            "peak_gib": peak / 2**30,
            "reads_of_layers": [reads[i] for i in range(2 * middle)],
            "bytes_read": reads["bytes"],
            "value": value(kept[0]),
        }
        print(name, {k: v for k, v in found[name].items() if k not in ("value", "reads_of_layers")})

    size = arguments.batch_size
    note(
        "score",
        lambda: base_states(model, head, completions, batch_size=BatchSize(size)),
        lambda states: float(np.abs(states.array.astype(np.float64)).mean()),
    )
    note(
        "probe",
        partial(probe, model, components, [scheme], completions, batch_size=size, compiled=False),
        lambda p: np.square(p.draws.astype(np.float64)).mean((1, 2, 3)).tolist(),
    )
    with tempfile.TemporaryDirectory() as place:
        rows = partial(
            sweep,
            model,
            few,
            [scheme],
            completions.prompts,
            Path(place) / "sweep.db",
            method="measure",
            new_tokens=4,  # completions are not what is measured here
            ignore_eos=True,
            batch_size=size,
            compiled=False,
            cache=Path(place),
        )
        rows(only=[])
        note("rows", rows, lambda s: [row.kl for row in s.rows], times=1)
    return found


@contextmanager
def counted(model: Model) -> Iterator[Counter[Any]]:
    """How often each layer was read from where it waits (its most read matrix), and all bytes."""
    name = decoder_layers(model.network)[0]
    reads: Counter[Any] = Counter()
    own = OffloadedWeightsLoader.__getitem__

    def counting(self: Any, key: str) -> Any:
        value = own(self, key)
        reads["bytes"] += value.nbytes
        reads[key] += 1
        if key.startswith(f"{name}."):
            layer = int(key.removeprefix(f"{name}.").partition(".")[0])
            reads[layer] = max(reads[layer], reads[key])
        return value

    OffloadedWeightsLoader.__getitem__ = counting
    try:
        yield reads
    finally:
        OffloadedWeightsLoader.__getitem__ = own


def report(arguments: argparse.Namespace, found: Found, weights: int, rate: float) -> None:
    print(f"weights {weights / 2**30:.2f} GiB, copies at {rate / 2**30:.1f} GiB/s")
    for name, off in found["offloaded"].items():
        resident = found["resident"][name]["seconds"]
        floor = resident + off["bytes_read"] / rate
        off["over_resident_and_copies"] = off["seconds"] / floor
        print(
            f"{name:8} resident {resident:7.3f} s, offloaded {off['seconds']:7.3f} s, "
            f"{off['seconds'] / floor:5.2f} times resident and copies; layers read "
            f"{sorted(Counter(off['reads_of_layers']).items())} (times, layers), "
            f"{off['bytes_read'] / 2**30:.1f} GiB; peak {off['peak_gib']:.1f} GiB"
        )
    for where, values in found.items():
        for name, one in values.items():
            a, b = np.array(one["value"]), np.array(found["resident"][name]["value"])
            one["largest_difference"] = float(np.abs(a / b - 1).max())
            print(f"{where} {name}: values differ by {one['largest_difference']:.1e} at most")
    result = {"shapes": SHAPES[arguments.shapes], "weights_bytes": weights, "copy_rate": rate}
    result |= {"prompts": f"{arguments.n_prompts} of {arguments.prefix} + {arguments.new_tokens}"}
    print(machine()["device"], "written to", write_result("offload", result | found, arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="7b")
    parser.add_argument("--n-prompts", type=int, default=128)
    parser.add_argument("--prefix", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.25, help="of the weights on the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
