"""Download by HTTP for pooch, and continue where a download was interrupted.

The caller checks the content by a checksum.
"""
import errno
import logging
import os
import shutil
from typing import Any, Optional
from urllib.parse import urlsplit

import requests  # type: ignore
import urllib3
from tqdm import tqdm

log = logging.getLogger("download")

TIMEOUT = (20, 60)  # seconds to connect, and between two packets
CHUNK = 1 << 18  # bytes
INVALID_URL = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema,
               requests.exceptions.MissingSchema)


class DownloadError(Exception):
    """A server did not send the file; the message says why in a few words."""


class Resuming:
    """A downloader for `pooch.retrieve` that keeps the received bytes in the file `part`."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __call__(self, url: str, output_file: str, _: Any) -> None:
        complete(url, self.part)
        os.replace(self.part, output_file)


def complete(url: str, part: str) -> None:
    """Append the missing bytes of the file at `url` to the file `part`.

    A broken connection is opened again as long as that brings bytes. Raises DownloadError where the
    server fails, and OSError where the disk is full.
    """
    while True:
        before = _size(part)
        try:
            if _receive(url, part):
                return
            reason = "the connection broke"
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = _reason(error)
        if _size(part) <= before:
            raise DownloadError(reason)
        log.info("%s after %.1f MB; continuing", reason, _size(part) / 1e6)


def _receive(url: str, part: str) -> bool:
    """Receive from one connection; return whether the file is complete."""
    start = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = "bytes=%d-" % start
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        content_range = response.headers.get("Content-Range", "")
        if start and response.status_code == requests.codes.requested_range_not_satisfiable:
            if content_range == "bytes */%d" % start:
                return True
            os.unlink(part)  # longer than the file, so it was of another one
            return _receive(url, part)
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            start = 0  # the server sends the whole file
        elif not content_range.startswith("bytes %d-" % start):
            raise DownloadError("the server sent another part than requested")
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        _save(response.raw, part, start, total, os.path.basename(urlsplit(url).path))
    return total is None or _size(part) == total


def _save(stream: Any, part: str, start: int, total: Optional[int], name: str) -> None:
    """Write a stream after the first `start` bytes of the file `part`."""
    if total is not None:
        _check_space(os.path.dirname(os.path.abspath(part)), total - start)
    with open(part, "ab" if start else "wb") as file, \
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name,
                 disable=None) as bar:
        # Not decoded: some servers call a .tgz a gzip-encoded tar.
        for chunk in stream.stream(CHUNK, decode_content=False):
            file.write(chunk)
            bar.update(len(chunk))


def _check_space(folder: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, "No space left on device: %.1f MB are needed, %.1f MB free" % (
            needed / 1e6, free / 1e6))


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _reason(error: BaseException) -> str:
    """Return what went wrong with a request, without the exceptions around it."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return "%d %s" % (error.response.status_code, error.response.reason)
    if isinstance(error, INVALID_URL):
        return "Invalid URL"  # each version of requests words this in its own way
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
        return "no answer within %d s" % TIMEOUT[1]
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return "the connection broke" if _is_break(error) else str(error)


def _is_break(error: BaseException) -> bool:
    return isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError,
                              urllib3.exceptions.ProtocolError))
