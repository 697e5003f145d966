"""What can go wrong for a reason that the user can mend.

Every message says what was found, what was expected and what to change, in one line.
`exit_code` is what the command line returns: 2 for bad input, found before anything
expensive starts, and 1 for a run that had to stop and can be resumed.
"""


class StpError(Exception):
    """Base of every error that is reported as one line instead of a traceback."""

    exit_code = 2


class ConfigError(StpError):
    """A recipe or an override that cannot be used."""


class OptionError(ConfigError, ValueError):
    """An option of tracing that is out of range, or a pattern that matches no layer."""


class TraceError(StpError):
    """A model that cannot be traced into a supernet."""


class BudgetError(StpError):
    """A budget that no subnet of the space can meet."""


class DataError(StpError):
    """Missing, empty or unreadable data, or labels that do not fit the model."""


class StorageError(StpError):
    """Storage that cannot be read or written, or an artifact that is damaged."""


class ExportError(StpError):
    """A program that could not be written, or that computes something else."""


class ClusterError(StpError):
    """More resources than the cluster can ever give."""


class RunError(StpError):
    """A stage that had to stop; what it finished is kept and the same command resumes it."""

    exit_code = 1
