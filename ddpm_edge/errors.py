"""Every error this package raises on purpose: one base, and the matching builtin beside it."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning]) -> None:
    """Warn, with the place outside this package that led to it."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] == "ddpm_edge":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class DdpmEdgeError(Exception):
    """Base of all errors of this package. Its message says what was got, expected, and to do."""


class ConfigError(DdpmEdgeError, ValueError):
    """An argument or setting has a value that cannot work."""


class ScheduleError(ConfigError):
    """A noise schedule or a timestep outside what the mathematics allows."""


class DataError(DdpmEdgeError, ValueError):
    """Training data that cannot be read."""


class RunError(DdpmEdgeError, ValueError):
    """A directory that is not a training run, or a run that cannot be used."""


class TrainingError(DdpmEdgeError, RuntimeError):
    """Training that cannot go on: out of memory, or a loss that is not a number."""


class BundleError(DdpmEdgeError, ValueError):
    """A bundle that is missing, incomplete, changed or not understood."""


class ExportError(DdpmEdgeError, ValueError):
    """A network that cannot be exported as it is."""


class ParityError(DdpmEdgeError, RuntimeError):
    """An exported network whose answers differ from torch's by more than the tolerance."""


class EngineError(DdpmEdgeError, ValueError):
    """Arrays that an engine cannot take, a model that it cannot load, or a run that failed."""


class NonFiniteError(DdpmEdgeError, ArithmeticError):
    """The network answered with NaN or infinity."""


class OutOfMemoryError(DdpmEdgeError, MemoryError):
    """Too little memory for so many samples at once. A smaller batch still works."""


class RuntimeUnavailableError(DdpmEdgeError, RuntimeError):
    """A runtime or device that was asked for and is not there."""


class EngineMissingError(DdpmEdgeError, RuntimeError):
    """An engine that must be built on this device first. Its message says the command."""


class EngineLostError(DdpmEdgeError, RuntimeError):
    """The GPU was lost to this process, and every engine with it: restart the process."""


class BuildError(DdpmEdgeError, RuntimeError):
    """A network that a builder could not turn into an engine."""


class CacheWarning(UserWarning):
    """What was built could not be kept for the next time."""


class ForkError(DdpmEdgeError, RuntimeError):
    """A Generator of the parent process used in a forked child."""


class ClosedError(DdpmEdgeError, RuntimeError):
    """A Generator or an engine that was closed."""
