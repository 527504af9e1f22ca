"""Every error that moetrain raises on purpose.

A `MoetrainError` is the user's to mend: the command line prints its message and exits with `exit_code`, without a
traceback. Our own broken invariants are `assert`s, so they stay loud and keep their traceback.
"""


class MoetrainError(Exception):
    """Base of all deliberate errors. `exit_code` is what the process returns to the shell."""

    exit_code = 2


class ConfigError(MoetrainError):
    """A setting is unknown, ill-typed, out of range, or contradicts another setting."""


class LayoutError(ConfigError):
    """The parallel sizes do not fit the world size, the model or each other."""


class DataError(MoetrainError):
    """A corpus, tokenizer or indexed dataset is missing, damaged, or does not fit the model."""


class CheckpointError(MoetrainError):
    """A checkpoint is missing, damaged, or contradicts the run that wants to load it."""


class ConversionError(MoetrainError):
    """A checkpoint cannot be expressed in the asked-for format, or failed its own verification."""


class ReportError(MoetrainError):
    """A folder holds nothing that a report could show, or its page cannot be written where it is told to."""


class DependencyError(MoetrainError):
    """A library or compiled part that this command needs is missing or is not what its name says."""
