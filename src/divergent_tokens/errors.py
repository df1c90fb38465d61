"""What can go wrong: each message says what was found, what was expected, and what to do."""


class DivergentTokensError(Exception):
    """Bad input or wrong use; the command line prints the message and exits with code 2."""


class ModelError(DivergentTokensError):
    """A model that cannot be found, read, or compared with its base."""


class PromptError(DivergentTokensError):
    """Prompts that cannot be read, or of which none is long enough."""


class SchemeError(DivergentTokensError):
    """A compression scheme that is not known, or does not fit a component."""


class RecordError(DivergentTokensError):
    """A file written by this program or another engine that does not hold what it should."""
