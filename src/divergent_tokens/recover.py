"""Training of what is left between rounds of pruning, the zeros held at zero."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import cos, isfinite, pi
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from divergent_tokens.compiled import (
    can_compile,
    compiled,
    compiled_layers,
    compiler_works,
    compiling_pays,
)
from divergent_tokens.errors import DivergentTokensError, RecordError
from divergent_tokens.layers import operations_a_token
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.replicas import Replicas

Loss = Literal["distill", "ce", "both"]
WARM_UP = 50
"""Steps over which the learning rate rises; then it falls on a cosine to a twentieth."""


@dataclass(frozen=True)
class Training:
    """How it is trained."""

    steps: int = 200
    """Of each round; 0: none."""
    batch_size: int = 16
    """Sequences of a step."""
    micro_batch: int = 16
    """Sequences at once on a device, at most; gradients of a step's are added up."""
    learning_rate: float = 3e-4
    loss: Loss = "distill"
    """KL(base ‖ model), cross-entropy of the text, or half of each."""
    lifted: bool = False
    """Half of a round's steps, before its cut, are taken with the masks lifted: what was cut may
    come back (AC/DC, Peste et al. 2021)."""
    checkpointing: bool = False
    """Activations are made again in the backward pass."""

    def __post_init__(self) -> None:
        """Raise DivergentTokensError for what makes no sense."""
        if self.loss not in get_args(Loss):
            raise DivergentTokensError(
                f"unknown loss {self.loss!r}; expected one of {', '.join(get_args(Loss))}"
            )
        if self.steps < 0 or self.batch_size < 1 or self.micro_batch < 1:
            raise DivergentTokensError(
                f"{self.steps} steps of {self.batch_size} sequences, {self.micro_batch} at once; "
                "expected no less than 0, 1 and 1"
            )
        if not (isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise DivergentTokensError(
                f"a learning rate of {self.learning_rate}; expected a number from 0 on"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class NotFiniteError(DivergentTokensError):
    """The loss became NaN or infinite."""


class Recovery:
    """A network in training, with its optimizer; steps count on from round to round."""

    def __init__(
        self,
        network: PreTrainedModel,
        teacher: PreTrainedModel,
        sequences: Sequences,
        training: Training,
        *,
        total_steps: int,
        seed: int,
        devices: Sequence[torch.device | str] = (),
        compiles: bool | None = None,
    ) -> None:
        """All parameters are trained; on a GPU in bfloat16 autocast, weights in float32.

        `devices`: the network's own, and others that compute a part of each step on copies of
        network and teacher; the optimizer is on the first alone. Layers and the loss run compiled
        where it pays (on one GPU, for long work), or `compiles` asks for it. Results are the same
        but for rounding, whatever they are.
        """
        self._training, self._total, self._seed = training, total_steps, seed
        self._sequences = torch.from_numpy(sequences.ids)
        if training.steps and network.dtype != torch.float32:
            raise DivergentTokensError(
                f"weights of {network.dtype} would not move by small steps; train in float32 "
                "(--dtype float32; on a GPU products are in bfloat16 all the same)"
            )
        network.requires_grad_(True)
        if training.checkpointing:
            _make_activations_again(network)
        self._names = {id(p): name for name, p in network.named_parameters()}
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=training.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
        )
        # accelerate would leave its autocast in the network's forward, and so in all measurements.
        self._network: Any = network
        self._optimizer = optimizer
        wanted = None if training.loss == "ce" else teacher
        # No copy for which a step has no sequence.
        self._replicas = Replicas(network, wanted, devices[: training.batch_size])
        if compiles is None:
            compiles = compiling_pays(network, self._operations(wanted is not None))
        able = len(self._replicas) == 1 and can_compile(network) and can_compile(teacher)
        self.compiles = compiles and able and compiler_works(network.device)
        """Whether layers and the loss run compiled."""
        self._teacher = teacher
        self.step = 0
        """Steps that were taken, of all rounds."""

    def run(
        self,
        n_steps: int,
        masks: Mapping[str, Tensor],
        *,
        name: str = "recover",
        progress: Progress = silent,
    ) -> float:
        """The mean loss of so many steps; parameters with a mask [as stored] keep their zeros.

        Raises NotFiniteError at the first loss that is no number.
        """
        losses = []
        with self._training_mode():
            for done in range(n_steps):
                losses.append(self._take_step(masks))
                progress(name, done + 1, n_steps, f"steps, loss {losses[-1]:.3f}")
        return float(np.mean(losses)) if losses else float("nan")

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Layers compiled or not; no gradient is left behind."""
        with ExitStack() as stack:
            for network in (self._network, self._teacher):
                stack.enter_context(compiled_layers(network, self.compiles))
            self._replicas.train(self._training.checkpointing)
            try:
                yield
            finally:
                self._replicas.clear_gradients()
                self._replicas.train(False)

    def _operations(self, has_teacher: bool) -> float:
        """Of all steps: forward once and back twice, and the teacher's forward.

        Products are in bfloat16, so that they take less than others of float32 weights; but of
        what a step of a small network takes they are the least.
        """
        n_tokens = self._total * self._training.batch_size * self._sequences.shape[1]
        return (3 + has_teacher) * n_tokens * operations_a_token(self._network)

    def _take_step(self, masks: Mapping[str, Tensor]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        ids = self._drawn()
        n_devices = len(self._replicas)
        size = min(self._training.micro_batch, -(-len(ids) // n_devices))
        self._replicas.send_weights()
        losses = self._replicas.backward(torch.split(ids, size), self._backward)
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise NotFiniteError(f"gradients are not finite at step {self.step + 1}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        hold(self._network, masks)
        self.step += 1
        return sum(losses)

    def _backward(self, network: Any, teacher: Any, ids: Tensor) -> float:
        """The part of a step's loss that these sequences are; its gradients are added up."""
        loss = self._loss(network, teacher, ids) * (len(ids) / self._training.batch_size)
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())  # waits for the device, so it comes last
        if not isfinite(value):
            raise NotFiniteError(f"the loss is {value} at step {self.step + 1}")
        return value

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / WARM_UP)
        falling = 0.5 * (1 + cos(pi * self.step / max(1, self._total)))
        return self._training.learning_rate * warm * (0.95 * falling + 0.05)

    def _drawn(self) -> Tensor:
        """A step's sequences [sequence, token]; they depend on seed and step."""
        rng = np.random.default_rng([self._seed, self.step])
        rows = rng.integers(0, len(self._sequences), self._training.batch_size)
        return self._sequences[rows]

    def _loss(self, network: Any, teacher: Any, ids: Tensor) -> Tensor:
        kind = self._training.loss
        on_gpu = ids.device.type == "cuda"
        # Its cache of weights in bfloat16 is one for all threads, and each would clear the others'.
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            logits: Tensor = network(input_ids=ids, use_cache=False).logits
            if kind == "ce":
                return self._made(_cross_entropy)(logits[:, :-1], ids[:, 1:])
            with torch.no_grad():
                wanted: Tensor = teacher(input_ids=ids, use_cache=False).logits
            if kind == "distill":
                return self._made(mean_kl)(logits[:, :-1], wanted[:, :-1])
            return self._made(_both)(logits[:, :-1], wanted[:, :-1], ids[:, 1:])

    def _made(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return compiled(function) if self.compiles else function

    def state(self) -> dict[str, Tensor]:
        """What it takes to go on: the optimizer's moments, by parameter."""
        found = {"step": torch.tensor(self.step)}
        for parameter, values in self._optimizer.state.items():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                found[f"{key}.{self._names[id(parameter)]}"] = values[key].detach().cpu()
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`; RecordError where it is another network's."""
        self.step = int(state["step"])
        if self.step == 0:
            return
        kept = {key.removeprefix("exp_avg.") for key in state if key.startswith("exp_avg.")}
        if not kept or kept - set(self._names.values()):
            raise RecordError("the kept round has the optimizer state of another network")
        for parameter in self._network.parameters():
            name = self._names[id(parameter)]
            if name not in kept:  # it never had a gradient: an expert that no token was sent to
                continue
            moments = {k: state[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq", "step")}
            self._optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device)
                for key, value in moments.items()
            }


def mean_kl(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted ‖ logits) of softmaxes [..., vocabulary], in nats, the mean."""
    return _kl(logits.float().log_softmax(-1), wanted)


def _kl(logps: Tensor, wanted: Tensor) -> Tensor:
    of_base = wanted.float().log_softmax(-1)
    return functional.kl_div(logps, of_base, reduction="none", log_target=True).sum(-1).mean()


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Of logits [..., vocabulary] and the tokens that came [...], in nats, the mean."""
    return functional.cross_entropy(logits.float().flatten(0, -2), ids.flatten())


def _both(logits: Tensor, wanted: Tensor, ids: Tensor) -> Tensor:
    """Half of `mean_kl` and half of `_cross_entropy`, from one softmax."""
    logps = logits.float().log_softmax(-1)
    return 0.5 * (_kl(logps, wanted) + functional.nll_loss(logps.flatten(0, -2), ids.flatten()))


def _make_activations_again(network: Any) -> None:
    """In training mode, by the method's name in this version of transformers."""
    name = "activation_checkpointing_enable"
    getattr(network, name, network.gradient_checkpointing_enable)()


@torch.no_grad()
def hold(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero where a mask says so."""
    for name, mask in masks.items():
        network.get_parameter(name).mul_(mask)


def schedule(sparsity: float, rounds: int, start: float = 0.0) -> Sequence[float]:
    """The sparsity after each round: large steps first (Zhu and Gupta 2017, equation 1)."""
    return [sparsity + (start - sparsity) * (1 - (r + 1) / rounds) ** 3 for r in range(rounds)]
