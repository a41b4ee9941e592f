"""Files of the user's: replaced whole or not at all, and checked before minutes of work.

    python -c "from ddinit import files; files.check_writable('out.caffemodel')"
"""
import contextlib
import os
import secrets
import tempfile
from typing import Iterator


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield a temporary name beside `path`; rename it to `path` only if the block succeeds.

    A file that existed stays whole until the new one is, whatever happens in between; a link to a
    file stays a link.  Raises ValueError or OSError naming the path where it cannot be written.
    """
    _check_place(path)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, ".%s.%s.part" % (name[:200], secrets.token_hex(8)))
    # 0o666 less the umask, which the kernel takes off: as any new file of the user's
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(path: str) -> None:
    """Raise ValueError now, not after minutes of work, where `path` cannot be written."""
    _check_place(path)
    folder = os.path.dirname(os.path.realpath(path))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError("%s: cannot write there (%s)" % (path, error.strerror)) from error


def _check_place(path: str) -> None:
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ValueError("%s: the folder %s does not exist" % (path, folder))
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("%s is a folder or device, not a file to write" % path)
