"""A local folder that one process at a time writes to.

What it is: a lock on a file in it, which a kill frees too. What it is not: one for readers, or for
object stores.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path, remedy: str) -> Iterator[None]:
    """Keeps other processes from writing here; the folder is made if need be.

    A file system without locks, as Lustre may be mounted, is written to all the same, with a
    warning. Raises ValueError, which ends with `remedy`, if another process holds the lock; OSError
    where the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {directory}; {remedy}") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logging.getLogger(__name__).warning(
                "%s cannot be locked (%s): nothing keeps a second process from writing there",
                directory,
                error.strerror,
            )
        yield
