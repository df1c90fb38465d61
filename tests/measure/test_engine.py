import json

import numpy as np
import pytest

import runs
from divergent_tokens.errors import RecordError
from divergent_tokens.measure.engine import read_scores, write_completions

PROMPTS = runs.prompts(lengths=[3, 2])
COMPLETIONS = runs.written(PROMPTS, [[9, 10, 11], [12]])


def good_rows():
    return [
        {
            "prompt": 0,
            "prompt_ids": list(PROMPTS.prompts[0].ids),
            "completion_ids": [9, 10, 11],
            "argmax_ids": [9, 8, 11],
            "logprobs": [-0.5, -2.0, 1e-7],
            "top_logprobs": [[[9, -0.5], [4, -3]], {"8": -0.25, "10": -2.0}, {"7": -0.1}],
        },
        {
            "prompt": 1,
            "prompt_ids": list(PROMPTS.prompts[1].ids),
            "completion_ids": [12],
            "argmax_ids": [12],
            "logprobs": [-1],
        },
    ]


def read(tmp_path, rows):
    path = tmp_path / "scores.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_scores(path, COMPLETIONS, vocabulary_size=256)


def test_completions_are_written_as_token_ids(tmp_path):
    path = tmp_path / "completions.jsonl"
    write_completions(path, COMPLETIONS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    fields = ("prompt", "prompt_ids", "completion_ids")
    assert rows == [{name: row[name] for name in fields} for row in good_rows()]


def test_scores_come_back_in_any_order(tmp_path):
    for rows in (good_rows(), good_rows()[::-1], ["", *good_rows(), "  "]):
        found = read(tmp_path, rows)
        assert found.argmax_ids[COMPLETIONS.mask].tolist() == [9, 8, 11, 12]
        np.testing.assert_allclose(found.logprobs[COMPLETIONS.mask], [-0.5, -2, 0, -1])
        own = found.argmax_logprobs[COMPLETIONS.mask]
        np.testing.assert_array_equal(own, np.array([-0.5, -0.25, np.nan, np.nan], np.float32))


def test_ids_alone_will_do(tmp_path):
    rows = good_rows()
    for row in rows:
        del row["logprobs"]
        row["top_logprobs"] = None
    found = read(tmp_path, rows)
    assert found.logprobs is None
    assert found.argmax_logprobs is None


def test_line_separators_inside_of_texts_are_no_line_ends(tmp_path):
    rows = [json.dumps({**row, "text": "a\u2028b\x85c"}, ensure_ascii=False) for row in good_rows()]
    read(tmp_path, rows)
    windows = "\ufeff" + "\r\n".join(rows)
    (tmp_path / "scores.jsonl").write_bytes(windows.encode())
    read_scores(tmp_path / "scores.jsonl", COMPLETIONS)


def changed(number, **fields):
    rows = good_rows()
    rows[number] |= fields
    return rows


MALFORMED = {
    "no row": ([], r"scores 0 prompts, without prompt 0; expected the 2"),
    "missing prompt": (good_rows()[:1], "without prompt 1"),
    "doubled prompt": (good_rows() + good_rows()[:1], "scores prompt 0 twice"),
    "extra prompt": ([*good_rows(), {**good_rows()[0], "prompt": 2}], "scores 3 prompts; expected"),
    "not JSON": ([*good_rows(), '{"prompt": 3'], "line 3 of .* is not JSON"),
    "not an object": (["[1]"], "line 1 of .* is no object"),
    "a string": (['"prompt"'], "line 1 of .* is no object"),
    "no number": (changed(0, prompt=None), "line 1 of .* is no object"),
    "half a number": (changed(0, prompt=0.5), "line 1 of .* is no object"),
    "infinite number": (changed(0, prompt=float("inf")), "line 1 of .* is no object"),
    "other prompt": (changed(1, prompt_ids=[1, 2]), "prompt_ids of prompt 1 .* not the base's"),
    "no prompt ids": (changed(1, prompt_ids=None), "prompt_ids of prompt 1 .* not the base's"),
    "other completion": (changed(0, completion_ids=[9, 10, 12]), "completion_ids of prompt 0"),
    "longer completion": (changed(1, completion_ids=[12, 13]), "completion_ids of prompt 1"),
    "short": (changed(0, argmax_ids=[9, 8]), "argmax_ids of prompt 0 .* has 2 items, .* 3 tokens"),
    "long": (changed(1, logprobs=[-1, -1]), "logprobs of prompt 1 .* has 2 items, .* 1 tokens"),
    "nested": (changed(1, argmax_ids=[[12]]), r"holds \[12\]; expected token ids"),
    "no argmax": (changed(1, argmax_ids=None), "no list 'argmax_ids'"),
    "a number": (changed(1, argmax_ids=12), "no list 'argmax_ids'"),
    "float ids": (changed(1, argmax_ids=[12.5]), "holds 12.5; expected token ids"),
    "string ids": (changed(1, argmax_ids=["12"]), "holds '12'; expected token ids"),
    "negative ids": (changed(1, argmax_ids=[-1]), "expected token ids from 0 to 255"),
    "ids too large": (changed(1, argmax_ids=[256]), "expected token ids from 0 to 255"),
    "huge ids": (changed(1, argmax_ids=[10**30]), "expected token ids from 0 to 255"),
    "some logprobs": (changed(1, logprobs=None), "prompt 1 .* has no logprobs, others have"),
    "NaN": (changed(0, logprobs=[-1, float("nan"), -1]), "logprobs of prompt 0 .* holds nan"),
    "null": (changed(0, logprobs=[-1, None, -1]), "holds None; expected natural log-prob"),
    "infinite": (changed(1, logprobs=[-float("inf")]), "holds -inf"),
    "too large": (changed(1, logprobs=[-(10**400)]), "expected natural log-prob"),
    "positive": (changed(1, logprobs=[0.3]), "holds 0.3; expected natural log-prob"),
    "string logprobs": (changed(1, logprobs=["-1"]), "holds '-1'"),
    "tops too short": (changed(1, top_logprobs=[]), "top_logprobs of prompt 1 .* has 0 items"),
    "tops no list": (changed(1, top_logprobs={"12": -1}), "no list 'top_logprobs'"),
    "tops of numbers": (changed(1, top_logprobs=[5]), "must hold, for each token, pairs"),
    "tops of words": (changed(1, top_logprobs=[{"a": -1}]), "must hold, for each token, pairs"),
    "tops null": (changed(1, top_logprobs=[None]), "must hold, for each token, pairs"),
    "tops positive": (changed(1, top_logprobs=[{"12": 5}]), "top_logprobs of .* holds 5"),
    "tops NaN": (changed(1, top_logprobs=[[[12, float("nan")]]]), "top_logprobs of .* holds nan"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_every_malformed_file_is_one_clear_message(tmp_path, name):
    rows, message = MALFORMED[name]
    with pytest.raises(RecordError, match=message):
        read(tmp_path, rows)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecordError, match="does not exist"):
        read_scores(tmp_path / "absent", COMPLETIONS)
    with pytest.raises(RecordError, match="cannot be read"):
        read_scores(tmp_path, COMPLETIONS)
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match="cannot be read as UTF-8"):
        read_scores(tmp_path / "a", COMPLETIONS)
