"""A completion's text, cut where its tokens end."""

from collections.abc import Callable, Sequence

HALF = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""
_CONTEXT = 4
"""Tokens decoded along, since some decoders write a token otherwise at a text's start."""


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the text of all.

    A token that ends within a character adds nothing: the character belongs to the token that
    completes it. Three bytes of "é!" in tokens of one byte each: "", "é", "!".
    """
    found: list[str] = []
    start, read = 0, 0  # of the tokens decoded along, and of those not written yet
    for end in range(1, len(ids) + 1):
        before, text = decode(list(ids[start:read])), decode(list(ids[start:end]))
        if end < len(ids) and text.endswith(HALF):
            found.append("")
            continue
        found.append(text[len(before) :])
        start, read = max(start, end - _CONTEXT), end
        # Never from within a character.
        while start < end and decode(list(ids[start:end])).startswith(HALF):
            start += 1
    return found
