"""The error for mistakes that a user can fix."""


class UserError(ValueError):
    """A mistake of the user: the message names the file or key, and the fix.

    Commands print it without a traceback and exit with code 2.
    """
