"""The errors that are meant for users, and what a command says of each in place of a traceback."""

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no more room: of the disk, of a quota, of a file."""

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""What the system says of a file that was given but is not to be had."""

_OF_BUCKETS = ("gcsfs", "google", "aiohttp")
"""Packages with errors of their own for no network, no credentials, no such bucket and no permission."""


class InputError(ValueError):
    """A config, a file, a row, a checkpoint or an argument that cannot be used.

    The message says what was expected, what was found, where, and what to do. Commands print it without a
    traceback and exit with status 2.
    """


class OperationError(RuntimeError):
    """What was given is as it should be, and yet what was asked for could not be done.

    Commands print the message without a traceback and exit with status 1.
    """


def explanation(error: BaseException) -> tuple[str, int] | None:
    """What a command prints of an error, and its exit status; None for a fault of the program itself."""
    match error:
        case InputError():
            return str(error), 2
        case OperationError():
            return str(error), 1
        case ImportError() if "gcsfs" in str(error):
            return "gs:// needs gcsfs: pip install 'jaxembed[gcs]'", 2
        case ImportError() if str(error).startswith("Install ") and "to access" in str(error):  # of fsspec
            return f"{error}; of remote file systems gs:// is known to work", 2
        case Exception() if type(error).__module__.partition(".")[0] in _OF_BUCKETS:
            return f"gs:// cannot be reached, or refuses: {error}; see `gcloud auth application-default login`", 1
        case RuntimeError() if "home directory" in str(error):  # of pathlib
            return "a path begins with ~NAME, where NAME is no user of this machine", 2
        case OSError() if error.errno in _REFUSED:
            return str(error), 2
        case OSError() if error.errno in FULL_DISK:
            return f"{error}; make room and run it again", 1
    return None
