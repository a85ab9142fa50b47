"""The errors that end a command, and the exit code each of them has."""

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again and it goes on


class LmxError(Exception):
    """A failure that a sentence explains better than a traceback does. The command ends with exit code 1."""

    exit_code = EXIT_FAILURE


class UserError(LmxError):
    """Bad input: the message names the value, what was expected and what to do. Exit code 2, no traceback."""

    exit_code = EXIT_USER_ERROR


class Interrupted(LmxError):
    """The work was stopped from outside, was saved, and goes on when the command is run again. Exit code 75."""

    exit_code = EXIT_INTERRUPTED
