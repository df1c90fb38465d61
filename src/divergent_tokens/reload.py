"""A program of its own: what plain transformers makes of a folder. Imports nothing of ours.

    python -P reload.py FOLDER OUT

loads FOLDER as anybody would, runs one token (which unpacks what is in codes), and writes into OUT
`report.json` and, if it loaded, `state.safetensors` with every tensor of the network.
"""

import hashlib
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
        report["error"] = _said(error)
    else:
        report["missing"] = sorted(map(str, info.get("missing_keys", ())))
        report["unexpected"] = sorted(map(str, info.get("unexpected_keys", ())))
        report["mismatched"] = sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
        report["generation"] = generation_settings(network)
        _save(network, out / "state.safetensors")
    try:
        report["tokenizer"] = tokenizer_parts(_load_tokenizer(folder))
    except Exception as error:
        report["tokenizer"] = _said(error)
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


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


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _save(network: Any, file: Path) -> None:
    from safetensors.torch import save_file

    state, seen = {}, set()
    for name, tensor in network.state_dict().items():
        place = tensor.untyped_storage().data_ptr()
        # Tied tensors are one storage, which the format does not hold twice.
        state[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    save_file(state, file)


def generation_settings(network: Any) -> dict[str, Any]:
    """What `generate` goes by where it is told nothing, as plain values."""
    found: dict[str, Any] = json.loads(network.generation_config.to_json_string(use_diff=False))
    return {name: value for name, value in found.items() if name not in _NO_SETTINGS}


_NO_SETTINGS = {"transformers_version", "_from_model_config", "_commit_hash"}


def tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    """All that decides how text becomes tokens, as texts or digests, by name."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        # Its last call left its cuts and fillings in there.
        kept = json.loads(core.to_str()) | {"truncation": None, "padding": None}
        content = json.dumps(kept, sort_keys=True)
    return {
        "vocabulary and rules": hashlib.sha256(content.encode()).hexdigest(),
        "special tokens": json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        "chat template": json.dumps(tokenizer.chat_template, sort_keys=True),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
