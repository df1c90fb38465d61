"""Probe and measured sweep at the shapes of a large model, beside the obvious loop over components.

Random weights in bfloat16 and random prompts, or a base of yours (`--base`). The loop swaps one
matrix in, runs transformers' forward over all prompts and takes the argmax of full logits. Some of
its steps are timed and multiplied up to all components; the measured sweep is run in full.
"""

import argparse
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import machine, seconds_of, synchronize, write_result
from random_completions import random_completions
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import Component, find_components
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.layers import operations_a_token
from divergent_tokens.measure.completions import Completions, complete
from divergent_tokens.measure.prompts import read_prompts
from divergent_tokens.models import Model, load_model
from divergent_tokens.probe import probe
from divergent_tokens.sweep import sweep

SHAPES = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "moe": {
        "hidden_size": 1024,
        "moe_intermediate_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 32000,
    },
    "tiny-moe": {
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
}
SCHEMES = ("int8", "int4:g64", "int3:g64", "int6:g64")
LOOP_BATCH = 16
"""As many prompts at once as full logits leave room for."""


def main() -> None:
    arguments = parse()
    model, completions = subject(arguments)
    components = find_components(model.network)
    rate = product_rate(model)
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    weights = torch.cuda.memory_allocated() if model.device.type == "cuda" else 0

    def note(name: str, run: Callable[[], object] | float, times: int = 1) -> None:
        """Seconds and memory of a run; its time counts so many times. Or seconds known already."""
        if isinstance(run, float):
            seconds[name] = run
            print(f"{name:50} {run:9.3f} s", flush=True)
            return
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds[name] = seconds_of(run) * times
        if model.device.type == "cuda":
            memory[name] = (torch.cuda.max_memory_allocated() - weights) / 2**30
        print(f"{name:50} {seconds[name]:9.3f} s  {memory.get(name, 0):5.1f} GiB", flush=True)

    for name in arguments.parts:  # generation first: what it costs a new process shows there
        PARTS[name](arguments, model, components, completions, note)
    some = components[:: len(components) // arguments.loop_steps][: arguments.loop_steps]
    loop(model, some[:1], completions)  # warms up
    note("loop", lambda: loop(model, some, completions), len(components) // len(some))
    report(arguments, model, components, rate, seconds, memory)


def subject(arguments: argparse.Namespace) -> tuple[Model, Completions]:
    if arguments.base:
        base = load_model(arguments.base, device=arguments.device)
        prompts = read_prompts(
            "builtin", base, n_prompts=arguments.n_prompts, prefix=arguments.prefix
        )
        return base, complete(base, prompts, new_tokens=arguments.new_tokens, ignore_eos=True)
    completions = random_completions(
        arguments.n_prompts,
        vocabulary=SHAPES[arguments.shapes]["vocab_size"],
        prefix=arguments.prefix,
        new_tokens=arguments.new_tokens,
    )
    return random_model(arguments.shapes, arguments.device), completions


def random_model(shapes: str, device: str) -> Model:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        if "num_experts" in SHAPES[shapes]:
            network = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPES[shapes]))
        else:
            network = LlamaForCausalLM(LlamaConfig(**SHAPES[shapes]))
    torch.set_default_dtype(torch.float32)
    network.eval().requires_grad_(False)
    return Model(network, None, shapes, shapes)  # type: ignore[arg-type]


def product_rate(model: Model) -> float:
    """Operations a second of a large product in the model's dtype."""
    n = 8192 if model.device.type == "cuda" else 512
    a = torch.randn(n, n, device=model.device, dtype=model.dtype)
    for _ in range(3):
        a @ a
    return 10 * 2 * n**3 / seconds_of(lambda: [a @ a for _ in range(10)])


@torch.no_grad()
def loop(model: Model, components: list[Component], completions: Completions) -> None:
    scheme = parse_scheme("int8")
    rows = torch.tensor(completions.sequences(), device=model.device)
    for component in components:
        plan = Plan({component.name: scheme})
        with lent_plan(model, plan, components=[component]):
            for ids in rows.split(LOOP_BATCH):
                logits = model.network(ids, use_cache=False).logits
                logits[:, -completions.new_tokens - 1 : -1].argmax(-1)


Note = Callable[..., None]


def probes(
    arguments: argparse.Namespace,
    model: Model,
    components: list[Component],
    completions: Completions,
    note: Note,
) -> None:
    few = completions.subset(range(len(completions.prompts) // 4))
    on = arguments.compiled
    for prompts, compiled, schemes in itertools.product(
        (few, completions), (False, True), (SCHEMES[:1], SCHEMES)
    ):
        if (compiled and not on) or (on and not compiled and prompts is completions):
            continue
        parsed = [parse_scheme(text) for text in schemes]
        run = partial(
            probe,
            model,
            components,
            parsed,
            prompts,
            batch_size=arguments.batch_size,
            compiled=compiled,
        )
        name = f"probe, {len(prompts.prompts)} prompts, {len(schemes)} schemes"
        name += ", compiled" if compiled else ""
        note(f"{name}, first time", run)
        note(name, run)


def measured(
    arguments: argparse.Namespace,
    model: Model,
    components: list[Component],
    completions: Completions,
    note: Note,
) -> None:
    """All components: nothing is multiplied up."""
    with tempfile.TemporaryDirectory() as place:
        run = partial(
            sweep,
            model,
            components,
            [parse_scheme("int8")],
            completions.prompts,
            Path(place) / "sweep.db",
            method="measure",
            new_tokens=arguments.new_tokens,
            ignore_eos=True,
            compiled=arguments.compiled,
            cache=Path(place),
        )
        note("sweep, start", lambda: run(only=[]))
        note("sweep, all rows", run)


def generated(
    arguments: argparse.Namespace,
    model: Model,
    components: list[Component],
    completions: Completions,
    note: Note,
) -> None:
    prompts = completions.prompts
    ids = torch.tensor([prompt.ids for prompt in prompts.prompts], device=model.device)
    default = partial(
        model.network.generate,
        ids,
        max_new_tokens=arguments.new_tokens,
        min_new_tokens=arguments.new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    ours = partial(complete, model, prompts, new_tokens=arguments.new_tokens, ignore_eos=True)
    for again in ("", ", again"):
        note(f"completions{again}", ours)
        note(f"transformers' generate{again}", default)


def profiled(
    arguments: argparse.Namespace,
    model: Model,
    components: list[Component],
    completions: Completions,
    note: Note,
) -> None:
    """Where a GPU spends the time of a probe of a quarter of the prompts, by kind of kernel."""
    few = completions.subset(range(len(completions.prompts) // 4))
    run = partial(
        probe,
        model,
        components,
        [parse_scheme(SCHEMES[0])],
        few,
        batch_size=arguments.batch_size,
        compiled=arguments.compiled,
    )
    run()
    with torch.profiler.profile() as profile:
        run()
        synchronize()
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kinds[kernel_kind(event.name)] += event.device_time_total / 1e6
            kernels[event.name[:100]] += event.device_time_total / 1e6
    for kind, seconds in kinds.most_common():
        note(f"kernels of the probe: {kind}", seconds)
    for kernel, seconds in kernels.most_common(20):
        print(f"{1000 * seconds:8.1f} ms {kernel}")


KERNELS = {
    "products": ("gemm", "nvjet", "cutlass"),
    "attention": ("flash", "fmha", "softmax"),
    "compiled": ("triton",),
    "copies": ("memcpy", "memset"),
}


def kernel_kind(name: str) -> str:
    """What a kernel does, by its name."""
    lower = name.lower()
    return next(
        (kind for kind, signs in KERNELS.items() if any(sign in lower for sign in signs)),
        "element by element",
    )


PARTS = {"generate": generated, "probe": probes, "measure": measured, "profile": profiled}


def report(
    arguments: argparse.Namespace,
    model: Model,
    components: list[Component],
    rate: float,
    seconds: dict[str, float],
    memory: dict[str, float],
) -> None:
    tokens = arguments.n_prompts * (arguments.prefix + arguments.new_tokens)
    layers = operations_a_token(model.network) * tokens
    print(f"products: {rate / 1e12:.0f} TFLOP/s; layers' work a pass: {layers / rate:.3f} s")
    ratios = {}  # of the loop over all prompts and schemes, also where a probe needs fewer prompts
    for name, value in seconds.items():
        if not name.startswith(("probe", "sweep, all")):
            continue
        n_schemes = int(name.split(", ")[2].split()[0]) if name.startswith("probe") else 1
        ratios[name] = seconds["loop"] * n_schemes / value
        print(f"{name:50} {value:9.3f} s   {ratios[name]:7.1f} times the loop over all prompts")
    result = {
        "base": arguments.base or {"random": SHAPES[arguments.shapes]},
        "n_components": len(components),
        "n_weights": sum(component.n_parameters for component in components),
        "prompts": f"{arguments.n_prompts} of {arguments.prefix} + {arguments.new_tokens} tokens",
        "loop_steps": arguments.loop_steps,
        "product_rate": rate,
        "layers_operations": layers,
        "seconds": seconds,
        "gib_beside_weights": memory,
        "ratios_to_the_loop_over_all_prompts": ratios,
    }
    print(machine()["device"], "written to", write_result(arguments.name, result, arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="7b")
    parser.add_argument("--base", help="a real model instead, on the built-in prompts")
    parser.add_argument("--n-prompts", type=int, default=128)
    parser.add_argument("--prefix", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--batch-size", type=int, help="of the probe")
    parser.add_argument("--loop-steps", type=int, default=7)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="hardware")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
