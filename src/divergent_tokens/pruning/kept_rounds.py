"""The last finished round, so that a pruning that was stopped goes on."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from divergent_tokens.allocation import Cut
from divergent_tokens.compress.components import weight_of
from divergent_tokens.errors import RecordError
from divergent_tokens.pruning.run import Run
from divergent_tokens.store import clear_disk_errors, replacing_file, write_text

_RUN = "run.json"
LONG = 40
"""Characters of a value that is not shown: a digest."""


def rounds_folder(out: Path) -> Path:
    """Where the rounds of a pruning into `out` are kept."""
    return out.with_name(f"{out.name}.rounds")


def finished_rounds(out: Path) -> int:
    """How many rounds of a pruning into `out` are kept; 0 where none can be read."""
    try:
        kept = json.loads((rounds_folder(out) / _RUN).read_text(encoding="utf-8"))
        return len(kept["records"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


class KeptRounds:
    """The last finished round, beside the folder that is to come."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        """`key`: everything that must be the same to go on."""
        self._folder, self._key = folder, json.loads(json.dumps(key))

    def check(self) -> dict[str, Any] | None:
        """What is kept; None for nothing.

        Raises RecordError for rounds of another run, for what is damaged, and for a folder that is
        not ours.
        """
        if not self._folder.exists() or (self._folder.is_dir() and not any(self._folder.iterdir())):
            return None
        if not (self._folder / _RUN).is_file():
            raise RecordError(
                f"{self._folder} is where rounds would be kept, and holds something else; move it, "
                "or give another --out"
            )
        try:
            kept: dict[str, Any] = json.loads((self._folder / _RUN).read_text(encoding="utf-8"))
            differing = list(_differing(kept["key"], self._key))
            whole = (self._folder / kept["file"]).is_file() and isinstance(kept["records"], list)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged() from error
        if differing:
            raise RecordError(
                f"{self._folder} holds rounds of another run ({'; '.join(differing)}); give the "
                "options of that run to go on with it, delete the folder, or give another --out"
            )
        if not whole:
            raise self._damaged()
        return kept

    def _damaged(self) -> RecordError:
        return RecordError(f"{self._folder} is damaged, and no round can be read; delete it")

    def load(self, run: Run) -> list[dict[str, Any]]:
        """Records of the finished rounds, the run set to where they ended; raises as `check`."""
        kept = self.check()
        if kept is None:
            return []
        try:
            tensors = load_file(self._folder / kept["file"])
        except (OSError, SafetensorError) as error:
            raise self._damaged() from error
        network = run.model.network
        masks = [f"mask.{c.name}" for c in run.components]
        weights = {f"weight.{name}": own for name, own in network.named_parameters()}
        if not {*masks, *weights} <= set(tensors):
            raise self._damaged()
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(tensors[name])
        places = [weight_of(network, c).device for c in run.components]
        run.cut = Cut(
            tuple(tensors[m].bool().to(place) for m, place in zip(masks, places, strict=True))
        )
        run.set_masks()
        if run.recovery is not None:
            of_optimizer = {
                name.removeprefix("optimizer."): tensor
                for name, tensor in tensors.items()
                if name.startswith("optimizer.")
            }
            run.recovery.load_state(of_optimizer)
        found: list[dict[str, Any]] = kept["records"]
        return found

    def save(self, run: Run, records: list[dict[str, Any]]) -> None:
        """Keep a round; the one before goes when this one is there."""
        assert run.cut is not None
        network = run.model.network
        tensors = {
            f"weight.{name}": parameter.detach().cpu().contiguous()
            for name, parameter in network.named_parameters()
        }
        for component, mask in zip(run.components, run.cut.masks, strict=True):
            tensors[f"mask.{component.name}"] = mask.to("cpu", torch.uint8).contiguous()
        if run.recovery is not None:
            for name, tensor in run.recovery.state().items():
                tensors[f"optimizer.{name}"] = tensor.contiguous()
        file = f"round-{len(records)}.safetensors"
        with clear_disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(self._folder / file) as path:
                save_file(tensors, path)
            written = {"key": self._key, "file": file, "records": records}
            write_text(self._folder / _RUN, json.dumps(written))
        for old in self._folder.glob("round-*.safetensors"):
            if old.name != file:
                old.unlink()

    def clear(self) -> None:
        """The pruned model is there: nothing has to go on."""
        for path in (self._folder / _RUN, *self._folder.glob("round-*.safetensors")):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are in it
            self._folder.rmdir()


def _differing(there: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What is another, in words; of settings each by itself."""
    for name, value in now.items():
        before = there.get(name)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            yield from _differing(before, value)
        elif isinstance(value, dict | list) or len(str(value)) > LONG:
            yield f"{name} differs"
        else:
            yield f"{name} {before} there, {value} now"
