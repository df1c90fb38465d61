"""Calling transformers without its progress bars, warnings and many kinds of exception."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
import transformers

from divergent_tokens.errors import ModelError

_LONGEST_CHARACTERS = 400


@contextmanager
def loading(reference: str, part: str) -> Iterator[None]:
    """Quiet inside; what transformers raises for this part of a model comes out as ModelError."""
    try:
        with quietly():
            yield
    except ImportError as error:
        raise ModelError(
            f"{reference}: its {part} cannot be loaded without another package: {one_line(error)}"
        ) from error
    except Exception as error:
        if _is_out_of_memory(error):
            raise ModelError(
                f"{reference}: out of memory while loading its {part} ({one_line(error)}); load it "
                "in bfloat16 (dtype), on another device, or take a smaller model"
            ) from error
        raise ModelError(
            f"{reference}: transformers {transformers.__version__} cannot load its {part} "
            f"({type(error).__name__}: {one_line(error)}); expected a checkpoint that it can read"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """No warnings, log lines or progress bars inside; everything is as it was afterwards."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # Some progress bars of transformers have no switch, but all of them go to stderr.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened; its class's name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_CHARACTERS else text[:_LONGEST_CHARACTERS] + " ..."


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )
