"""The error that a user reads."""


class UserError(Exception):
    """What the user asked for cannot be done; the message says what, why, and what to do.

    The command line prints the message alone and exits with 1. Where code handles one case apart
    from the others, that case is a subclass.
    """
