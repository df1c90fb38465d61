"""The command line, mostly within this process; what only a process can show, in real ones."""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import lm_tasks
import runs
import tiny
from divergent_tokens.measure import batches

DTM = Path(sys.executable).with_name("dtm")
N_PROMPTS, PREFIX, NEW_TOKENS = 6, 8, 12
SETTINGS = ["--n-prompts", N_PROMPTS, "--prefix", PREFIX, "--new-tokens", NEW_TOKENS]


def save(model, folder):
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a noisy copy of it, prompts with domains, a text, and a cache that gets warm."""
    place = tmp_path_factory.mktemp("cli")
    save(runs.model(), place / "base")
    save(runs.noisy(runs.model(), 0.1), place / "noisy")
    rows = [
        {"text": f"{sentence} {i}", "domain": f"domain {i % 2}", "language": "en"}
        for i, sentence in enumerate(tiny.SENTENCES * 3)
    ]
    rows.insert(1, {"text": "short"})
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "text.txt").write_text("\n".join(tiny.SENTENCES * 20))
    return place


@pytest.fixture
def compare(dtm, place):
    """`dtm compare BASE ...` on the prompts and with the cache of `place`."""

    def run(*arguments, prompts=place / "prompts.jsonl", cache=place / "cache", base=None):
        common = [*SETTINGS, "--prompts", prompts, "--cache", cache]
        return dtm("compare", base or place / "base", *common, *arguments)

    return run


# --- what it does ---


def test_help_needs_no_torch_and_names_every_option():
    code = (
        "import sys; sys.argv = ['dtm', 'compare', '--help']\n"
        "from divergent_tokens import cli\n"
        "try: cli.main()\n"
        "finally: print({'torch', 'transformers', 'numpy', 'scipy'} & sys.modules.keys())"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert left.stdout.endswith("set()\n")
    for option in ("--scheme", "--scores", "--out", "--fail-if", "--prompts", "--allow-pickle"):
        assert option in left.stdout


def test_a_model_two_schemes_and_the_floors_in_a_table_best_first(compare, place, monkeypatch):
    monkeypatch.chdir(place)
    left = compare("noisy", "--scheme", "int8", "--scheme", "int4:g8")
    assert (left.code, left.err) == (0, "")
    table = left.out.split("\n\n")[1].splitlines()[1:]
    names = [line.split("  ")[0] for line in table if line[0] != " "]
    assert names[:3] == ["noise floor", "rounding", "int8"]
    assert sorted(names[3:5]) == ["int4:g8", "noisy"]
    words = " ".join(left.out.split())
    assert f"on {N_PROMPTS} prompts of {PREFIX} tokens from" in words
    assert "1 of the documents read (too short for the prefix)" in words
    assert "SDT by domain" in words
    assert "SDT by language" not in words  # there is only one
    assert max(map(len, left.out.splitlines())) <= 80


def test_out_and_json_hold_the_same_record(compare, place, tmp_path):
    out = tmp_path / "comparison.json"
    out.write_text("old")
    left = compare(place / "noisy", "--format", "json", "--out", out)
    record = json.loads(out.read_text())
    assert json.loads(left.out) == record
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]
    assert record["command"][:2] == ["dtm", "compare"]
    assert record["command"][-1] == str(out)
    assert record["prompts"]["left_out"] == 1
    assert record["prompts"]["n_prompts"] == N_PROMPTS
    (candidate,) = record["candidates"]
    assert candidate["name"] == str(place / "noisy")
    assert candidate["metrics"]["kl"]["value"] > record["rounding"]["kl"]["value"]


def test_a_second_run_is_the_same_whatever_the_cache_held(compare, place, tmp_path):
    first = compare(place / "noisy", "--format", "json", cache=tmp_path / "new")
    again = compare(place / "noisy", "--format", "json", cache=tmp_path / "new")
    one, two = (json.loads(left.out) for left in (first, again))
    assert one == two
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]


def test_markdown_has_the_whole_table_and_the_examples(compare):
    left = compare("--scheme", "int4:g8", "--format", "markdown", "--examples", 2)
    assert left.code == 0
    header = "|  | FDT | SDT | KL | DPPL | survival | acceptance | identical |"
    table = left.out[left.out.index(header) :].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| noise floor",
        "| rounding",
        "| int4:g8",
    ]
    assert {line.count("|") for line in table} == {9}
    assert left.out.count("~~~text") == 2


def test_examples_level_seed_and_settings_reach_the_record(compare):
    settings = ["--examples", 2, "--level", 0.8, "--seed", 7, "--skip-prompts", 2, "--ignore-eos"]
    left = compare("--scheme", "int4:g8", "--format", "json", "--batch-size", 2, *settings)
    record = json.loads(left.out)
    (candidate,) = record["candidates"]
    assert len(candidate["examples"]) == 2
    assert candidate["metrics"]["fdt"]["level"] == 0.8
    assert record["seed"] == candidate["metrics"]["kl"]["seed"] == 7
    assert record["prompts"]["skipped"] == 2
    assert {row["n_tokens"] for row in candidate["rows"]} == {NEW_TOKENS}


def test_a_text_gives_perplexities(compare, place):
    left = compare("--scheme", "int8", "--text", place / "text.txt", "--format", "json")
    record = json.loads(left.out)
    base, own = (m["ppl"] for m in (record["noise_floor"], record["candidates"][0]["metrics"]))
    assert base["conventional"]["value"] != own["conventional"]["value"] > 1


def test_include_and_exclude_narrow_a_scheme(compare):
    def kl(*arguments):
        record = json.loads(compare("--scheme", "int4:g8", "--format", "json", *arguments).out)
        return record["candidates"][0]["metrics"]["kl"]["value"]

    included = kl("--include", "*.mlp.*")
    assert 0 < kl("--include", "*.mlp.*", "--exclude", "re:layers.0") < included < kl()


def test_prompts_from_the_base_itself(compare, tmp_path):
    left = compare("--scheme", "int8", "--format", "json", prompts="self", cache=tmp_path)
    record = json.loads(left.out)
    assert record["prompts"]["source"] == "self"
    assert record["candidates"][0]["metrics"]["by_domain"] == {}


def test_chat_prompts_are_whole_turns(compare, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "chat")
    template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    left = compare("--scheme", "int8", "--chat", "--format", "json", base=tmp_path / "chat")
    record = json.loads(left.out)
    assert record["prompts"]["prefix"] is None
    assert record["prompts"]["texts"][1].endswith("short")


def test_quiet_and_a_stream_that_nobody_watches_show_no_bar(compare, monkeypatch):
    assert compare("--scheme", "int8").err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert compare("--scheme", "int8").err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "completions" in compare("--scheme", "int8", "--seed", 1, "--new-tokens", 5).err
    assert compare("--scheme", "int8", "--seed", 1, "--quiet").err == ""


# --- other engines ---


@pytest.fixture
def completions(dtm, place, tmp_path):
    """The file that `dtm complete` writes, as rows."""
    out = tmp_path / "completions.jsonl"
    common = [*SETTINGS, "--prompts", place / "prompts.jsonl", "--cache", place / "cache"]
    left = dtm("complete", place / "base", "--out", out, *common)
    assert left.code == 0
    assert left.out.startswith(f"{N_PROMPTS} prompts, ")
    return [json.loads(line) for line in out.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_completions_go_out_and_scores_come_back(compare, completions, tmp_path):
    rows = [row | {"argmax_ids": list(row["completion_ids"])} for row in completions]
    same = write_rows(tmp_path / "same.jsonl", rows)
    rows[2]["argmax_ids"][3] = (rows[2]["argmax_ids"][3] + 1) % 200
    other = write_rows(tmp_path / "other.jsonl", rows)
    left = compare(
        *("--scores", f"same={same}", "--scores", f"other={other}"),
        *("--scheme", "int8", "--format", "json", "--fail-if", "fdt<1"),
    )
    assert (left.code, left.err) == (0, "")
    candidates = {c["name"]: c for c in json.loads(left.out)["candidates"]}
    assert list(candidates) == ["int8", "same", "other"]
    assert candidates["same"]["metrics"]["identical"] == 1
    assert candidates["same"]["metrics"]["kl"] is None
    rows = candidates["other"]["rows"]
    assert [(row["prompt"], row["fdt"]) for row in rows if not row["censored"]] == [(2, 3)]
    text = compare("--scores", f"other={other}", "--examples", 1)
    assert text.code == 0
    assert "prompt 2, after 3 tokens" in text.out


# --- conditions ---


def test_a_condition_that_is_true_of_a_candidate_fails(compare, place, tmp_path):
    out = tmp_path / "comparison.json"
    conditions = ["--fail-if", "fdt<400 and kl>1e-9", "--fail-if", "sdt>2"]
    left = compare(place / "noisy", "--scheme", "int8", *conditions, "--out", out)
    assert left.code == 1
    assert left.err.startswith("dtm: failed: ")
    assert left.err.count("\n") == 1
    assert f"{place / 'noisy'}: fdt<400 and kl>1e-09 (fdt is " in left.err
    assert "int8: fdt<400 and" in left.err
    assert "sdt>2" not in left.err
    assert "noise floor" in left.out
    assert json.loads(out.read_text())["candidates"]


def test_conditions_that_hold_of_nobody_pass(compare):
    left = compare("--scheme", "int8", "--fail-if", "fdt<0.1", "--fail-if", "fdt<99 and kl>50")
    assert (left.code, left.err) == (0, "")


# --- tasks ---


def test_tasks_stand_beside_divergence(compare, tmp_path):
    out = tmp_path / "comparison.json"
    lm_tasks.multiple_choice(tmp_path / "mine")
    tasks = ["--tasks", "choices", "--task-path", tmp_path / "mine", "--limit", 8]
    left = compare("--scheme", "int2", *tasks, "--out", out, "--fail-if", "flips>0")
    assert left.code == 1
    assert "int2: flips>0 (flips is 0." in left.err
    assert "Tasks by lm-eval" in left.out
    record = json.loads(out.read_text())
    assert record["tasks"]["settings"]["limit"] == 8
    (candidate,) = record["candidates"]
    assert [task["n_documents"] for task in candidate["tasks"]] == [8, 8]
    assert "| choices | acc | " in compare("--scheme", "int8", *tasks, "--format", "markdown").out


def test_wrong_tasks_are_refused_before_any_work(refused, tmp_path):
    file = lm_tasks.multiple_choice(tmp_path / "mine")
    assert "no --tasks is given" in refused("--scheme", "int8", "--limit", 3)
    assert "name some with --tasks" in refused("--scheme", "int8", "--fail-if", "flips>0.1")
    assert "no task file" in refused("--scheme", "int8", "--tasks", tmp_path / "gone.yaml")
    assert "the limit 0 leaves" in refused("--scheme", "int8", "--tasks", file, "--limit", 0)
    file.write_text("task: [")
    assert "choices.yaml cannot be read" in refused("--scheme", "int8", "--tasks", file)


# --- bad input ---


@pytest.fixture
def refused(compare, dtm, tmp_path):
    """Checks that a command is refused by one line, leaving everything as it was."""
    out = tmp_path / "out" / "comparison.json"
    out.parent.mkdir()
    out.write_text("before")

    def check(*arguments, **settings):
        left = compare("--out", out, *arguments, **settings)
        assert left.code == 2
        assert left.out == ""
        assert left.err.startswith("dtm: ")
        assert left.err.count("\n") == 1
        assert "Traceback" not in left.err
        assert out.read_text() == "before"
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        return left.err

    return check


@pytest.mark.parametrize("part", ["base", "candidate"])
def test_a_reference_that_is_not_there(part, refused, place):
    gone = place / "nosy"
    err = refused("--scheme", "int8", base=gone) if part == "base" else refused(gone)
    assert re.search(r"nosy does not exist; expected .*; did you mean .*noisy\?", err)


@pytest.fixture
def copy(place, tmp_path):
    """A candidate's folder that may be damaged."""
    return shutil.copytree(place / "noisy", tmp_path / "copy")


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def plant_nan(folder, bad=float("nan")):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def plant_infinity(folder):
    plant_nan(folder, float("inf"))


def swap_tokens(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    drop_weights(folder)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def need_code(folder):
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("raise SystemExit('it ran')")


def become_an_encoder(folder):
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    edit_config(folder, architectures=["\x1b[31mBert\nBert"])  # a message quotes it


BAD_FOLDERS = [
    (drop_weights, r"weights are missing: expected model\.safetensors .*found none; download"),
    (cut_weights, r"model\.safetensors is truncated or corrupt .*download it again"),
    (plant_nan, r"1 of 1536 weights of model\.layers\.1\.mlp\.up_proj\.weight are NaN or infinite"),
    (plant_infinity, r"weights of model\.layers\.1\.mlp\.up_proj\.weight are NaN or infinite"),
    (pickle_weights, r"only as pickle \(pytorch_model\.bin\).*--allow-pickle"),
    (need_code, r"needs Python code of its own .*--trust-remote-code"),
    (become_an_encoder, r"is an encoder-only model; expected a decoder-only language model"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS)
@pytest.mark.parametrize("part", ["base", "candidate"])
def test_a_folder_that_is_no_whole_decoder(part, damage, message, refused, copy):
    damage(copy)
    err = refused("--scheme", "int8", base=copy) if part == "base" else refused(copy)
    assert re.search(message, err)
    assert str(copy) in err
    assert "\x1b" not in err


def test_a_candidate_that_is_not_whole_is_refused_before_the_base_runs(refused, copy, tmp_path):
    for damage in (cut_weights, drop_weights):
        damage(copy)
        refused(copy, cache=tmp_path / "cold")
        assert not (tmp_path / "cold").exists()


def test_another_vocabulary_is_refused_with_the_first_difference(refused, copy):
    swap_tokens(copy)
    message = (
        r"different tokenizers: id \d+ is '[ab]' in the base and '[ab]' in the candidate .*; "
        "expected the base's own tokenizer"
    )
    assert re.search(message, refused(copy))


def test_other_rows_of_logits_are_refused(refused, tmp_path):
    save(runs.model("llama-padded"), tmp_path / "padded")
    assert "256 in the base and 293 in the candidate" in refused(tmp_path / "padded")


@pytest.mark.parametrize("kept", [20, -64])
def test_a_truncated_gguf(kept, refused, tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:kept])
    assert re.search(r"model\.gguf.*truncated.*download it again", refused(path))


def test_a_file_that_is_no_gguf(refused, place):
    assert "is a file, but not a GGUF" in refused(place / "text.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no document; expected at least one"),
        ("blank.txt", b"\n \n", "holds no document"),
        ("latin.txt", "für".encode("latin-1"), "is not UTF-8 .*convert it"),
        ("other.jsonl", b'{"body": "words"}', "has no field 'text', only body; .*--text-field"),
        ("number.jsonl", b'{"text": 3}', "'text' in line 1 of .* is int, not a string"),
        ("broken.jsonl", b'{"text": ', "line 1 of .* is not JSON"),
        ("list.jsonl", b"[1]", "line 1 of .* holds list, not an object"),
        ("bad.parquet", b"PAR1", "is not a parquet file"),
        ("prompts.csv", b"a,b", "is no source of texts; expected builtin, self"),
        (
            "short.txt",
            b"one two\n",
            r"no document .* has 8 tokens or more \(left out: 1\); each line of it is one",
        ),
    ],
)
def test_prompt_files_that_hold_no_prompts(name, content, message, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused("--scheme", "int8", prompts=tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"no candidate to compare .*; name a model, or give --scheme int8, --plan"),
        (["--scheme", "imt8"], "unknown scheme 'imt8'; did you mean 'int8'"),
        (["--scheme", "int9"], "AbsMax takes 2 to 8"),
        (["--scheme", "int4:g64"], r"groups of 64 do not divide the 32 .*Group sizes that fit all"),
        (["--scheme", "int8", "--scheme", "int8"], "two candidates are called 'int8'"),
        (["--scheme", "int4:asym:g8", "--scheme", "int4:g8:asym"], "is not known|are called"),
        (["--scheme", "int8", "--include", "nothing"], "nothing"),
        (["NOISY", "--include", "*.mlp.*"], "no --scheme is given"),
        (["NOISY", "NOISY"], "two candidates are called '.*noisy'; give each once"),
        (["NOISY", "--new-tokens", 300], "need 308 positions; .* has 256"),
        (["NOISY", "--prefix", 300], "leaves no room in the 256 positions"),
        (["NOISY", "--prefix", 200], "no document .*--prefix"),
        (["NOISY", "--skip-prompts", 50], "50 are to be skipped; skip fewer"),
        (["NOISY", "--prompts", "gone.jsonl"], "gone.jsonl does not exist; check the path"),
        (["NOISY", "--chat"], "has no chat template; leave out --chat"),
        (["NOISY", "--text", "gone.txt"], "gone.txt does not exist; check the path"),
        (["NOISY", "--device", "abacus"], "device 'abacus' cannot be used .*expected auto, cpu"),
        (["NOISY", "--dtype", "int3"], "dtype int3 is not known; expected auto, float32"),
        (["NOISY", "--level", 95], r"--level is 95\.0; expected a share between 0 and 1"),
        (["NOISY", "--level", "nan"], "--level is nan"),
        (["NOISY", "--seed", -1], r"Invalid value for '--seed'.*see dtm compare --help"),
        (["NOISY", "--n-prompts", 0], "Invalid value for '--n-prompts'"),
        (["NOISY", "--batch-size", "many"], "Invalid value for '--batch-size'.*integer"),
        (["NOISY", "--format", "xml"], "'xml' is not one of 'text', 'markdown', 'json'"),
        (["NOISY", "--nope"], r"No such option.*--nope.*\(see dtm compare --help\)"),
        (["NOISY", "--fail-if", "fd<40"], "no metric 'fd'; did you mean 'fdt'"),
        (["NOISY", "--fail-if", "KL>1"], "no metric 'KL'; did you mean 'kl'"),
        (["NOISY", "--fail-if", "fdt"], "'fdt' is no condition; expected a metric"),
        (["NOISY", "--fail-if", "sdt>10%"], "'10%' .* is no number; expected"),
        (["NOISY", "--fail-if", "ppl>9"], "cannot be decided: ppl is measured on a text; .*--text"),
        (["--scores", "file.jsonl"], "expected NAME=FILE"),
        (["--scores", "a=gone.jsonl"], "the scores file gone.jsonl does not exist"),
        (["NOISY", "--out", "OUT/gone/c.json"], "the folder .*gone does not exist; make it first"),
        (["NOISY", "--out", "OUT"], "is a folder; name the file to write"),
        (["NOISY", "--out", "PROMPTS"], "would replace .*prompts.jsonl, which is read"),
    ],
)
def test_wrong_use(arguments, message, refused, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    names = {"NOISY": place / "noisy", "PROMPTS": place / "prompts.jsonl", "OUT": tmp_path / "out"}
    given = [names.get(a, str(a).replace("OUT", str(tmp_path / "out"))) for a in arguments]
    assert re.search(message, refused(*given))


def test_bad_scores_files(refused, completions, tmp_path):
    rows = [row | {"argmax_ids": list(row["completion_ids"])} for row in completions]
    file = tmp_path / "scores.jsonl"

    def err(rows, *arguments):
        return refused("--scores", f"vllm={write_rows(file, rows)}", *arguments)

    changed = [row | {"prompt_ids": row["prompt_ids"][1:]} for row in rows]
    assert re.search(
        "prompt_ids of prompt 0 of .* are not the base's; score the file", err(changed)
    )
    changed = [row | {"completion_ids": [5]} for row in rows]
    assert "completion_ids of prompt 0" in err(changed)
    assert "scores 5 prompts, without prompt 5" in err(rows[:-1])
    assert "no list 'argmax_ids'" in err(completions)
    assert "cannot be decided for vllm" in err(rows, "--fail-if", "kl>0.1")
    assert "two candidates are called 'int8'" in refused(
        "--scores", f"int8={write_rows(file, rows)}", "--scheme", "int8"
    )
    assert "names 'a' twice" in refused("--scores", f"a={file}", "--scores", f"a={file}")
    assert "would replace" in refused("--scores", f"a={file}", "--out", file)


def test_without_a_command_there_is_help_and_an_unknown_one_is_named(dtm):
    left = dtm()
    assert left.code == 2
    assert "compare" in left.out
    left = dtm("compute")
    assert (left.code, left.out) == (2, "")
    assert re.fullmatch(r"dtm: No such command 'compute'.*\(see dtm --help\)\n", left.err)
    assert "Missing argument" in dtm("compare").err
    assert "--out" in dtm("complete", "base").err


def test_complete_refuses_what_compare_refuses(dtm, place, tmp_path):
    common = [*SETTINGS, "--cache", place / "cache", "--prompts", place / "prompts.jsonl"]
    left = dtm("complete", place / "gone", "--out", tmp_path / "c.jsonl", *common)
    assert (left.code, left.err.count("\n")) == (2, 1)
    left = dtm("complete", place / "base", "--out", place / "prompts.jsonl", *common)
    assert "would replace" in left.err
    assert not list(tmp_path.glob("*"))


def test_pickles_and_foreign_code_run_when_allowed(compare, copy):
    pickle_weights(copy)
    assert compare(copy, "--allow-pickle").code == 0
    edit_config(copy, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (copy / "mine.py").write_text("raise ValueError('it ran')")
    assert "it ran" not in compare(copy, "--allow-pickle").err
    assert "it ran" in compare(copy, "--allow-pickle", "--trust-remote-code").err


def test_running_out_of_memory_is_said_in_words(compare, monkeypatch, tmp_path):
    def fail(*_arguments):
        raise MemoryError

    monkeypatch.setattr(batches, "padded", fail)
    monkeypatch.setattr("divergent_tokens.measure.states.padded", fail)
    left = compare("--scheme", "int8", "--batch-size", 1, cache=tmp_path)
    assert left.code == 2
    assert left.err.startswith("dtm: out of memory")
    assert left.err.count("\n") == 1


def test_a_mistake_of_ours_is_no_failed_condition(compare, monkeypatch):
    monkeypatch.setattr("divergent_tokens.report.text.title", lambda _record: 1 / 0)
    left = compare("--scheme", "int8")
    assert left.code == 3
    assert "ZeroDivisionError" in left.err
    assert "please report" in left.err.splitlines()[-1]


# --- where the output goes ---


def test_a_reader_that_is_gone_changes_nothing(compare, monkeypatch, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        left = compare("--scheme", "int4:g8", "--out", tmp_path / "c.json", "--fail-if", "fdt<99")
        assert left.code == 1  # it was asked for all the same
        assert left.err.startswith("dtm: failed")
        assert (tmp_path / "c.json").is_file()


def test_help_into_a_closed_pipe_is_silent():
    with subprocess.Popen([DTM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as dtm:
        dtm.stdout.close()
        assert dtm.stderr.read() == b""
        assert dtm.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_the_standard_output(compare, monkeypatch):
    with open("/dev/full", "w") as stdout:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", stdout)
        left = compare("--scheme", "int8")
    assert left.code == 2
    assert left.err.startswith("dtm: could not write to the standard output: No space left")


def test_any_terminal_and_any_file_name_will_do(compare, completions, monkeypatch, tmp_path):
    odd = os.fsdecode(b"\xff\xe9")
    rows = [row | {"argmax_ids": list(row["completion_ids"])} for row in completions]
    scores = f"{odd}={write_rows(tmp_path / odd, rows)}"
    for form in ("text", "markdown", "json"):
        with open(tmp_path / form, "w", encoding="ascii") as stdout:  # noqa: PTH123
            monkeypatch.setattr(sys, "stdout", stdout)
            left = compare("--scores", scores, "--format", form, "--out", tmp_path / "c.json")
        assert (left.code, left.err) == (0, "")
    for file in ("json", "c.json"):
        record = json.loads((tmp_path / file).read_bytes())
        assert [candidate["name"] for candidate in record["candidates"]] == [odd]


# --- real processes ---


def command(place, *arguments, cache="cache"):
    settings = [*SETTINGS, "--prompts", place / "prompts.jsonl", "--cache", place / cache]
    return [*map(str, [DTM, "compare", place / "base", *settings, *arguments])]


def environment():
    kept = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return kept | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}


def left_over(*folders):
    """Files in the making."""
    return [path for folder in folders for path in folder.rglob(".*")]


@pytest.mark.parametrize(
    ("cache", "limit_bytes", "what"), [("cold", 4000, "cold"), ("cache", 6000, "comparison.json")]
)
def test_a_disk_that_fills_up(cache, limit_bytes, what, place, compare, tmp_path):
    compare("--scheme", "int8")  # so that the cache is warm
    out = tmp_path / "comparison.json"
    out.write_text("before")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    left = subprocess.run(
        command(place, "--scheme", "int8", "--out", out, cache=cache),
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=environment(),
        check=False,
    )
    assert left.returncode == 2
    assert left.stderr.count("\n") == 1
    assert re.match(rf"dtm: could not write .*{what}.*: File too large; nothing was", left.stderr)
    assert out.read_text() == "before"
    assert not left_over(tmp_path, place / cache)


def interrupt(arguments, ready, number):
    """Exit code and error stream of a process that gets a signal once it is `ready`."""
    master, slave = os.openpty()
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=slave, env=environment()
    ) as process:
        os.close(slave)
        seen, start, sent = b"", time.monotonic(), False
        while time.monotonic() < start + 60:
            if not sent and ready(seen, process.pid):
                process.send_signal(number)
                sent = True
            if select.select([master], [], [], 0.02)[0]:
                try:
                    seen += os.read(master, 1 << 16)
                except OSError:  # the other end is closed
                    break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        process.kill()
    os.close(master)
    assert sent
    return process.returncode, seen.decode(errors="replace")


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("import", signal.SIGINT),
        ("loading", signal.SIGINT),
        ("completions", signal.SIGTERM),
        ("scoring", signal.SIGINT),
    ],
)
def test_a_signal_leaves_nothing_half_written(phase, number, place, tmp_path):
    cache = tmp_path / "cache"
    ready = {
        "import": lambda _seen, pid: "libtorch" in Path(f"/proc/{pid}/maps").read_text(),
        "loading": lambda seen, _pid: b"loading" in seen,
        "completions": lambda seen, _pid: b"completions" in seen,
        # The base's states are in the making.
        "scoring": lambda _seen, _pid: any(cache.glob(".*/hidden.npy")),
    }
    rows = [{"text": f"{sentence} {i}"} for i in range(1000) for sentence in tiny.SENTENCES]
    many = write_rows(tmp_path / "many.jsonl", rows)
    out = tmp_path / "comparison.json"
    out.write_text("before")
    size = ["--n-prompts", 4000, "--new-tokens", 2 if phase == "scoring" else 100]
    arguments = command(place, "--scheme", "int8", "--prompts", many, "--out", out, *size)
    code, err = interrupt([*arguments, "--cache", str(cache)], ready[phase], number)
    assert code == 128 + number
    assert "Traceback" not in err
    word = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert err.splitlines()[-1].endswith(f"dtm: {word}; nothing was left half written")
    assert out.read_text() == "before"
    assert not left_over(tmp_path)


def test_a_reader_of_one_line_is_enough(place):
    with subprocess.Popen(
        command(place, "--scheme", "int4:g8"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout.readline().startswith(str(place)[:40])
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


@pytest.mark.demo
def test_the_demo_model_end_to_end(tmp_path):
    out = tmp_path / "comparison.json"
    settings = ["--n-prompts", "4", "--prefix", "32", "--new-tokens", "16", "--out", out]
    schemes = ["--scheme", "int8", "--scheme", "magnitude:0.5"]
    left = subprocess.run(
        [DTM, "compare", "demo:smollm2", *schemes, *settings],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    record = json.loads(out.read_text())
    floor, rounding = record["noise_floor"], record["rounding"]
    int8, pruned = (candidate["metrics"] for candidate in record["candidates"])
    assert floor["kl"]["value"] == floor["sdt"]["value"] == 0
    assert pruned["fdt"]["value"] < int8["fdt"]["value"] <= floor["fdt"]["value"] == 16
    assert pruned["kl"]["value"] > int8["kl"]["value"] > rounding["kl"]["value"] > 0
    assert int8["fdt"]["low"] < 16  # four prompts cannot tell that nothing ever diverges
    title, table = left.stdout.split("\n\n")[:2]
    assert title.startswith("demo:smollm2 (float32, cpu) on 4 prompts of 32 tokens")
    names = [line.split("  ")[0] for line in table.splitlines()[1:9:2]]
    assert names == ["noise floor", "rounding", "int8", "magnitude:0.5"]


def test_a_file_of_a_model_that_is_read_is_not_replaced(dtm, place):
    before = (place / "base" / "config.json").read_bytes()
    for command in ("compare", "complete"):
        more = ["--scheme", "int8"] if command == "compare" else []
        left = dtm(command, place / "base", *more, "--out", place / "base" / "config.json")
        assert left.code == 2
        assert "would replace a file of" in left.err
    left = dtm("compare", place / "base", place / "noisy", "--out", place / "noisy" / "config.json")
    assert left.code == 2
    assert (place / "base" / "config.json").read_bytes() == before


def test_a_full_standard_output_is_one_message(place):
    with Path("/dev/full").open("w") as full:
        left = subprocess.run(
            command(place, "--scheme", "int8", cache="cache"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            check=False,
        )
    assert left.returncode == 2
    assert left.stderr.count("\n") == 1
    assert "could not write to the standard output: No space left" in left.stderr


def test_the_version(dtm):
    assert dtm("--version").out == f"dtm {version('divergent-tokens')}\n"


@pytest.mark.parametrize("command", ["compare", "sweep", "search", "components", "prune"])
def test_help_says_what_an_option_takes(dtm, command):
    """And not how Python calls it."""
    text = dtm(command, "--help").out
    for option in ("--scheme SCHEME", "--include PATTERN", "--n-prompts N"):
        assert option in text or option.split(" ")[0] not in text
    assert not re.search(r"--[a-z-]+ <list\[", text)


def test_compare_makes_a_page_too(compare, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "comparison.json"
    left = compare("--scheme", "int4", "--report", page, "--out", out)
    assert left.code == 0, left.err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    left = compare("--scheme", "int4", "--report", out, "--out", out)
    assert "two files" in left.err
    left = compare("--scheme", "int4", "--report", tmp_path / "no" / "page.html")
    assert "does not exist" in left.err
