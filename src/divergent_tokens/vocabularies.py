"""Where two tokenizers part: the first token or the first line that they see differently."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

# Mixed scripts, digits, spaces, code, emoji, a combining accent and text that looks like special
# tokens: what tokenizers with one vocabulary but other rules differ on.
_PROBES = (
    "Hello, world! Zwölf Boxkämpfer jagen Виктора 12345 быстро\n\tdef f(x):  return x ** 2",
    " 東京は日本の首都です。 مرحبا بالعالم 😀 e\u0301 <s></s>",
)


def first_difference(
    base: PreTrainedTokenizerBase, candidate: PreTrainedTokenizerBase
) -> str | None:
    """In words, the first thing that the two do differently; None if nothing was found.

    Compared are the vocabularies (added tokens included) and how both encode two lines of mixed
    scripts with their special tokens, so that a beginning-of-sequence token of only one is seen.
    """
    base_vocabulary, candidate_vocabulary = base.get_vocab(), candidate.get_vocab()
    if base_vocabulary != candidate_vocabulary:
        return _vocabulary_difference(base_vocabulary, candidate_vocabulary)
    for text in _PROBES:
        here, there = base(text)["input_ids"], candidate(text)["input_ids"]
        if here != there:
            return _encoding_difference(base, text, here, there)
    return None


def _vocabulary_difference(base: Mapping[str, int], candidate: Mapping[str, int]) -> str:
    sizes = f"{len(base)} and {len(candidate)} tokens"
    base_tokens = {number: token for token, number in base.items()}
    candidate_tokens = {number: token for token, number in candidate.items()}
    for number in sorted(base_tokens.keys() | candidate_tokens.keys()):
        here, there = base_tokens.get(number), candidate_tokens.get(number)
        if here != there:
            return (
                f"id {number} is {_named(here)} in the base and {_named(there)} in the candidate "
                f"(they have {sizes})"
            )
    return sizes  # tokens that share an id


def _named(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _encoding_difference(
    tokenizer: PreTrainedTokenizerBase, text: str, base: list[int], candidate: list[int]
) -> str:
    shared = zip(base, candidate, strict=False)
    place = next(
        (place for place, (here, there) in enumerate(shared) if here != there),
        min(len(base), len(candidate)),
    )
    here, there = (
        repr(tokenizer.convert_ids_to_tokens(ids[place])) if place < len(ids) else "no token"
        for ids in (base, candidate)
    )
    return (
        f"their tokens are the same, but token {place} of {text[:16]!r}... is {here} in the base "
        f"and {there} in the candidate"
    )
