"""The exceptions of nasdeploy, each with the exit code that the command line returns for it.

::

    NasdeployError                 1   unexpected error
    ├── UsageError                 2   bad usage
    │   ├── ConfigError            2   a profile or a setting is wrong
    │   ├── DataError              2   the image set is wrong
    │   └── RunFolderError         2   the run folder is locked, foreign or of another build
    ├── InfeasibleError            3   no architecture of the space meets the budget
    ├── BudgetViolatedError        3   the exported file breaks a cap
    ├── GateError                  4   parity or accuracy gate failed
    ├── NoisyMeasurementError      5   the machine is too noisy to certify a cap
    └── InterruptedRunError        6   interrupted; the same command continues

The message of each is one line that names the key or file, the value, what was expected and what would work.
"""

from __future__ import annotations

from typing import ClassVar


class NasdeployError(Exception):
    """Base of every error that nasdeploy raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(NasdeployError):
    """The request cannot be understood or carried out as it stands."""

    exit_code = 2


class ConfigError(UsageError):
    """A profile, a configuration file or an option holds a wrong key or value."""


class DataError(UsageError):
    """The image set is missing, corrupt or unusable."""


class RunFolderError(UsageError):
    """The run folder is in use, belongs to another build, or is damaged."""


class InfeasibleError(NasdeployError):
    """No architecture of the search space meets the budget of a profile."""

    exit_code = 3


class BudgetViolatedError(NasdeployError):
    """The exported file breaks a cap that its architecture was expected to meet."""

    exit_code = 3


class GateError(NasdeployError):
    """The exported file does not compute what the network computes, or loses accuracy."""

    exit_code = 4


class NoisyMeasurementError(NasdeployError):
    """The machine is too busy or unstable for a cap to be certified."""

    exit_code = 5


class InterruptedRunError(NasdeployError):
    """The run was interrupted; what was finished is stored, and the same command continues."""

    exit_code = 6


# product.md's order: where profiles end differently the command exits with the most serious code.
SEVERITY: tuple[int, ...] = (1, 2, 6, 4, 3, 5, 0)


def most_serious(exit_codes: list[int]) -> int:
    """Return the exit code that a command reports when its profiles ended with ``exit_codes``."""
    return min(exit_codes, key=SEVERITY.index, default=0)
