"""The program that loads a folder as anybody would: what it writes down, and that it is alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import tiny
from divergent_tokens import reload
from divergent_tokens.quiet import quietly


@pytest.fixture
def folder(tmp_path):
    with quietly():
        tiny.network("gemma3").save_pretrained(tmp_path / "m")  # its head is the embedding
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def reloaded(folder, out):
    out.mkdir()
    with quietly():
        reload.main(folder, out)
    return json.loads((out / "report.json").read_text())


def test_every_tensor_is_there_and_tied_ones_twice(folder, tmp_path):
    report = reloaded(folder, tmp_path / "out")
    assert (report["error"], report["missing"], report["unexpected"]) == (None, [], [])
    state = load_file(tmp_path / "out" / "state.safetensors")
    wanted = tiny.network("gemma3").state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert report["tokenizer"] == reload.tokenizer_parts(tiny.tokenizer())


def test_a_folder_that_does_not_load_leaves_no_state(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    report = reloaded(folder, tmp_path / "out")
    assert report["error"].startswith("OSError: ")
    assert isinstance(report["tokenizer"], dict)
    assert not (tmp_path / "out" / "state.safetensors").exists()


def test_a_tokenizer_that_does_not_load_is_no_fault_of_the_network(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{")
    report = reloaded(folder, tmp_path / "out")
    assert report["error"] is None
    assert "Error" in report["tokenizer"]


def test_what_a_tokenizer_was_used_for_does_not_count():
    core = tiny.tokenizer().backend_tokenizer
    used = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    before = reload.tokenizer_parts(used)
    used(["a b c d", "e"], truncation=True, max_length=2, padding="max_length", verbose=False)
    assert reload.tokenizer_parts(used) == before
    used.chat_template = "{{ messages }}"
    changed = reload.tokenizer_parts(used)
    assert [part for part in before if changed[part] != before[part]] == ["chat template"]


def test_generation_settings_are_those_of_generate():
    network = tiny.network("llama")
    before = reload.generation_settings(network)
    assert before["eos_token_id"] == 1
    assert "transformers_version" not in before
    network.generation_config.repetition_penalty = 2.0
    assert reload.generation_settings(network) == before | {"repetition_penalty": 2.0}


def test_it_runs_without_anything_of_ours(folder, tmp_path):
    """`-P` keeps the package's own folder, where modules have common names, off the path."""
    (tmp_path / "out").mkdir()
    code = (
        "import runpy, sys\n"
        "sys.modules['divergent_tokens'] = None\n"  # importing it would fail
        f"sys.argv = ['reload', {str(folder)!r}, {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(Path(reload.__file__))!r}, run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["error"] is None
