"""A program of its own: what plain transformers makes of a folder. Imports nothing of ours.

    python -P reload.py FOLDER OUT

loads FOLDER as anybody would, runs one token (which unpacks what is in codes), and writes into OUT
`report.json` and, if it loaded, `state.safetensors` with every tensor of the network.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path, out: Path) -> None:
    """Load, run, and write down what came of it."""
    report: dict[str, Any] = {"error": None, "missing": [], "unexpected": [], "mismatched": []}
    try:
        network, info = _load(folder)
    except Exception as error:  # whatever it is, it is what a user would meet
        report["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    else:
        report["missing"] = sorted(map(str, info.get("missing_keys", ())))
        report["unexpected"] = sorted(map(str, info.get("unexpected_keys", ())))
        report["mismatched"] = sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
        _save(network, out / "state.safetensors")
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    network, info = found
    with torch.no_grad():
        network.eval()(torch.zeros(1, 1, dtype=torch.long))
    return network, info


def _save(network: Any, file: Path) -> None:
    from safetensors.torch import save_file

    # Tied tensors are one storage, which the format does not hold twice.
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file(state, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
