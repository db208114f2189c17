"""The one error that users of the package meet: something they gave is not as it should be."""

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no more room: of the disk, of a quota, of a file."""


class InputError(ValueError):
    """A config, a file, a row, a checkpoint or an argument that cannot be used.

    The message says what was expected, what was found, where, and what to do. Commands print it without a
    traceback and exit with status 2.
    """
