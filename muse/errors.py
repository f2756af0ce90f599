"""Errors whose message is all that a user is shown."""


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message names the option and what is allowed.

    Attributes:
        of_all_ranks: whether every rank should raise it, so that the first one may say it for all.
    """

    of_all_ranks = True


class RunError(RuntimeError):
    """A run that cannot go on; the message says what happened and what is kept.

    Attributes:
        of_all_ranks: whether every rank should raise it, so that the first one may say it for all.
    """

    of_all_ranks = False


def of_all_ranks(message: str) -> RunError:
    """An error that every rank raises."""
    error = RunError(message)
    error.of_all_ranks = True
    return error
