"""What a result was measured on, and where it is kept."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from divergent_tokens.measure.comparison import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Device, cores and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def synchronize() -> None:
    """Wait for the device, so that a clock can be read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
    """How long it takes, what it leaves to the device included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def write_result(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Keep a result with its machine and command, as benchmarks/results/NAME.json."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    record = {"command": " ".join(command), **machine(), **result}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
