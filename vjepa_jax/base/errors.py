"""The error that a user can fix."""


class UserError(ValueError):
    """Something that the user can mend: the message names the thing and the mend.

    Entry points print it without a traceback and exit with code 2.
    """
