"""Every default of a pretraining run, with its meaning, unit and range.

A leaf file in `configs/` takes `get_config()` and changes what differs; the command line
changes the rest (`--config.optim.learning_rate=1e-3`). The config is locked, so that a
misspelt key fails with a suggestion.
"""


class UserError(ValueError):
    """Something that the user can mend: the message is one line naming it and the mend.

    Entry points print it without a traceback and exit with code 2.
    """
