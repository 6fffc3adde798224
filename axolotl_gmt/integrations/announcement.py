"""What a user must be told in a run: through the log where it is shown, else directly."""

from __future__ import annotations

import logging
import sys


def announce(log: logging.Logger, message: str) -> None:
    """Tell the user, whatever the level of the log.

    A script that sets up no logging hides what is below WARNING. Call it on one process only.
    """
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info(message)
    else:
        print(message, file=sys.stderr, flush=True)
