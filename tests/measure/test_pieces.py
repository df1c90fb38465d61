import runs
import tiny
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.pieces import pieces


def in_bytes(ids):
    return bytes(ids).decode("utf-8", "replace")


def test_together_the_pieces_are_the_text():
    base = runs.model()
    completions = complete(base, runs.prompts(), new_tokens=24)
    decode = tiny.tokenizer().decode
    for row, length in zip(completions.ids, completions.lengths, strict=True):
        ids = row[:length].tolist()
        found = pieces(decode, ids)
        assert len(found) == len(ids)
        assert "".join(found) == decode(ids)


def test_a_character_belongs_to_the_token_that_completes_it():
    assert pieces(in_bytes, [*"é!".encode()]) == ["", "é", "!"]
    text = "aé日本\N{GRINNING FACE}z" * 3
    found = pieces(in_bytes, [*text.encode()])
    assert "".join(found) == text
    assert [piece for piece in found if piece] == list(text)


def test_a_character_that_never_ends_is_shown_as_half_of_one():
    assert pieces(in_bytes, [*"aé".encode()[:2]]) == ["a", "\ufffd"]
    assert pieces(in_bytes, []) == []
