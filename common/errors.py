"""The two ways a command can fail, shared by every package of the project."""


class InputError(ValueError):
    """Something the user gave is wrong: a path, a file, an option (exit code 2).

    The message is one sentence that names the file or option, what was expected
    and what was found.
    """


class RunError(RuntimeError):
    """The run itself failed, for example by producing NaN (exit code 1)."""
