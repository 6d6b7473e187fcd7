"""The errors a user can cause or meet, each with its exit code: 3 refused, 4 a check failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 300  # characters of what somebody else's error says
# What runtimes say when an allocation fails, besides raising MemoryError.
EXHAUSTED = (
    *("allocate memory", "not enough memory", "failed to allocate", "out of memory", "bad_alloc", "bad alloc"),
    *("cannot allocate", "can't start new thread"),
)


class SlimvlmError(Exception):
    """Refused: the message says what was wrong with the value, what is accepted and what to do next."""

    exit_code = 3


class UnsupportedModelError(SlimvlmError):
    """The model type has no row in the family table, or its modules are not where the row says."""


class InfeasibleBudgetError(SlimvlmError):
    """No plan reaches the asked ratio within the floors."""


class CheckpointError(SlimvlmError):
    """A checkpoint folder is missing, incomplete, corrupted or does not match its plan."""


class SampleError(SlimvlmError):
    """The data cannot be read, or too many of its samples are bad."""


class CalibrationError(SlimvlmError):
    """The statistics of a calibration run are unusable (for example not finite)."""


class RecoveryError(SlimvlmError):
    """A training cannot go on: its loss is not finite, or what it left on disk is damaged or another training's."""


class MissingDependencyError(SlimvlmError):
    """An optional package is needed; the message names the pip command."""


class UnsuitableOptionError(SlimvlmError):
    """Options that contradict each other."""


class DeviceError(SlimvlmError):
    """The device asked for is not there."""


class ProcessLostError(SlimvlmError):
    """Another process of the same job has ended before it was done."""


class OutputError(SlimvlmError):
    """The output folder cannot be written, is not empty, or the disk is full."""


class InUseError(OutputError):
    """Another process writes there."""


class HubError(SlimvlmError):
    """The Hub refuses, cannot be reached, or asks for a token that is not there."""


class CheckFailedError(SlimvlmError):
    """A result was made but a check on it failed; the files are kept. `result`: what was made, if complete."""

    exit_code = 4

    def __init__(self, message: str, result: object | None = None) -> None:
        super().__init__(message)
        self.result = result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a runtime (Python, torch, ONNX Runtime, CUDA) says with it that memory ended."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in EXHAUSTED)


def one_line(error: BaseException) -> str:
    """What an error of somebody else says, on one line of at most LONGEST characters; else the name of its type."""
    said = " ".join(str(error).split())
    if len(said) > LONGEST:
        said = f"{said[:LONGEST].rstrip()} ..."
    named = isinstance(error, KeyError | IndexError | AttributeError | TypeError | ZeroDivisionError)
    return f"{type(error).__name__}: {said}" if said and named else said or type(error).__name__


@contextmanager
def foreign(what: str, then: str = "", kind: type[Exception] = CheckpointError) -> Iterator[None]:
    """Around a single call of foreign code on foreign data: whatever it raises becomes `kind`.

    The message says `what` is wrong, why, and what to do `then`.

    Nothing of ours stands inside, so that our own mistakes stay what they are. Want of memory stays that, too.
    """
    try:
        yield
    except (SlimvlmError, kind):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise kind(_sentence(what, error, then)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust: tokenizers and safetensors raise it past Exception
            raise
        raise kind(_sentence(what, error, then)) from error


def _sentence(what: str, error: BaseException, then: str) -> str:
    return f"{what} ({one_line(error)}){then and '; ' + then}"
