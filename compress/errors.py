"""The errors a user can cause or meet, each with its exit code: 3 refused, 4 a check failed."""


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


class OutputError(SlimvlmError):
    """The output folder cannot be written, is not empty, or the disk is full."""


class CheckFailedError(SlimvlmError):
    """A result was made but a check on it failed; the files are kept. `result`: what was made, if complete."""

    exit_code = 4

    def __init__(self, message: str, result: object | None = None) -> None:
        super().__init__(message)
        self.result = result
