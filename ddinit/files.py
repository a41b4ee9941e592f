"""Read text of any encoding, and replace files whole or not at all."""
import contextlib
import os
import secrets
import tempfile
from typing import Iterator

BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_text(path: str) -> str:
    """Return the text of a file in UTF-8 or UTF-16, with or without a byte order mark.

    Bytes that are not UTF-8 (comments in GBK, paths in Latin-1) become surrogates, as in
    `os.fsdecode`, so that the paths among them still open their files.
    Raises ValueError naming the file where it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError("%s: cannot read the file (%s)" % (path, error.strerror)) from error
    encoding = BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig")
    if encoding == "utf-16" and len(content) % 2:
        encoding = "utf-8-sig"
    return content.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield a temporary name beside `path` and rename it to `path` only if the block succeeds.

    An existing file stays whole until the new one is, whatever happens in between, and a link to a
    file stays a link.  Raises ValueError or OSError naming the path where it cannot be written.
    """
    _check_place(path)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, ".%s.%s.part" % (name[:200], secrets.token_hex(8)))
    # The kernel takes the umask off 0o666, as it does for any new file of the user's.
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
