"""What a command says and how it ends. Needs no torch."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable

from omni.config import UserError

log = logging.getLogger("omni")


class _StandardOutput(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.stream = sys.stdout
        super().emit(record)


def setup_logging() -> None:
    """Send the log to standard output, one plain line a message."""
    if not log.handlers:
        handler = _StandardOutput()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def user_errors(main: Callable[[], int | None]) -> int:
    """Run a command; a :class:`UserError` becomes one line on standard error and the exit code, not a traceback."""
    setup_logging()
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `omni inspect checkpoints | head`: who read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 141  # 128 + SIGPIPE
    except OSError as error:  # of what no module expected: a full disk, a folder that may not be written
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {where}cannot be written or read ({error.strerror}); the same command continues", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
