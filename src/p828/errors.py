"""The error that is the user's to mend: shown as one line, without a traceback, with exit code 2."""


class UserError(ValueError):
    """Wrong input: the message names the key or file, what was given and what is accepted."""


class RunStopped(Exception):
    """A run that ended by its own guard (three non-finite steps, say): shown as one line, exit code 1."""
