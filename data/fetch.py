"""Download, check and unpack the data sets and reference models of the paper (section 4).

    python data/fetch.py voc2007 caffenet --to datasets

data/sources.json has the addresses of each file, its checksum and the folder that it unpacks to.
Downloads that were interrupted continue, and files that were put into the folder by hand are
checked in the same way.
"""
import argparse
import contextlib
import logging
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

import pooch
from tqdm import tqdm

from ddinit import processes, results
from download import DownloadError, Resuming

log = logging.getLogger("fetch")

SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sources.json")
DIGITS = {"md5": 32, "sha1": 40, "sha256": 64}  # hexadecimal, of a checksum


class Source(NamedTuple):
    """A file to download.

    name         of the file
    hash         'md5:...', 'sha1:...' or 'sha256:...'
    urls         addresses, which are tried in turn
    unpacks_to   folder that a tar archive fills; '' for other files
    """
    name: str
    hash: str
    urls: List[str]
    unpacks_to: str


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Fetch the data sets that the command line names; return the exit status."""
    parser = processes.Parser(prog="fetch.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="+",
                        help="voc2007, selective-search, caffenet, googlenet or vgg16")
    parser.add_argument("--to", metavar="DIR", default="datasets",
                        help="folder for the files (default: datasets)")
    parser.add_argument("--sources", metavar="FILE.json", default=SOURCES,
                        help="other addresses and checksums, such as those of your own mirror "
                             "(default: data/sources.json)")
    processes.log_to_stderr()
    pooch.get_logger().setLevel(logging.WARNING)
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    sources = read_sources(arguments.sources)
    for name in arguments.names:
        if name not in sources:
            raise ValueError("There is no data set '%s'. There are %s."
                             % (name, ", ".join(sources)))
    for name in arguments.names:
        places = [fetch(source, arguments.to) for source in sources[name]]
        for place in dict.fromkeys(places):
            print("%s: %s" % (name, place))


def read_sources(path: str) -> Dict[str, List[Source]]:
    """Return the files of each data set in a JSON file like data/sources.json.

    Raises ValueError naming the file and the data set where something is missing or wrong.
    """
    table = results.read_json(path)
    if not isinstance(table, dict):
        raise ValueError("%s: the file is not an object of data sets" % path)
    return {name: [_source(entry, "%s: %s" % (path, name)) for entry in entries]
            for name, entries in table.items()}


def fetch(source: Source, folder: str) -> str:
    """Return the path of a file, or of the folder of an archive, after downloading it if needed.

    Whatever has its final name is whole. Raises ValueError where no address has the file or its
    checksum is wrong, and OSError where the disk is full.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, source.name)
    place = os.path.join(folder, source.unpacks_to) if source.unpacks_to else path
    marker = os.path.join(place, ".%s.unpacked" % source.name)
    if source.unpacks_to and os.path.exists(marker):
        log.info("%s is already unpacked", source.name)
        return place
    with _naming(path):
        if os.path.exists(path):
            _verify(path, source.hash)
            log.info("%s is already there", path)
        else:
            _download(source, folder)
        if source.unpacks_to:
            log.info("unpacking %s", path)
            unpack(path, folder)
            with open(marker, "w", encoding="ascii") as file:
                file.write(source.hash + "\n")
    return place


def unpack(archive: str, folder: str) -> None:
    """Unpack a tar archive into `folder`, where each file appears whole.

    Raises ValueError, and moves nothing into the folder, where the archive is broken or has links,
    devices or paths that lead out of the folder.
    """
    with tempfile.TemporaryDirectory(prefix=".unpacking.", suffix=".part", dir=folder) as temporary:
        try:
            with tarfile.open(archive) as members:
                for member in tqdm(members, unit="file", desc="unpacking", disable=None):
                    _extract(archive, members, member, temporary)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise ValueError("%s: the archive is broken (%s)" % (archive, error)) from error
        _merge(temporary, folder)


# ---------------------------------------------------------------------------------------------
# One file
# ---------------------------------------------------------------------------------------------

def _download(source: Source, folder: str) -> None:
    """Download a file from the first address that has it.

    It stays in the folder NAME.part until it is whole and checked.
    """
    path = os.path.join(folder, source.name)
    unfinished = os.path.abspath(path + ".part")
    os.makedirs(unfinished, exist_ok=True)
    failures = []
    try:
        for url in source.urls:
            log.info("downloading %s", url)
            failure = _try(url, source, unfinished)
            if failure is None:
                os.replace(os.path.join(unfinished, source.name), path)
                shutil.rmtree(unfinished)
                return
            log.info("%s", failure)
            failures.append("%s: %s" % (url, failure))
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(unfinished)  # if it is empty
    raise ValueError("%s: no address has the file (%s). It may also be put there by hand." % (
        path, "; ".join(failures)))


def _try(url: str, source: Source, folder: str) -> Optional[str]:
    """Download from one address; return what went wrong, or None."""
    part = os.path.join(folder, "received")
    resumed = os.path.exists(part)
    try:
        pooch.retrieve(url, source.hash, fname=source.name, path=folder, downloader=Resuming(part))
    except DownloadError as error:
        return str(error)
    except ValueError:  # pooch's error for a wrong checksum; the file is gone
        if resumed:
            log.info("wrong checksum; trying again from the start")
            return _try(url, source, folder)
        return "wrong checksum"
    return None


def _verify(path: str, expected: str) -> None:
    algorithm, digits = expected.split(":")
    digest = pooch.file_hash(path, alg=algorithm)
    if digest != digits:
        raise ValueError("%s: its %s is %s, not %s. Delete the file to download it again." % (
            path, algorithm, digest, digits))


def _extract(archive: str, members: tarfile.TarFile, member: tarfile.TarInfo,
             folder: str) -> None:
    """Write one member of an archive, with the permissions of any new file."""
    target = os.path.normpath(os.path.join(folder, member.name))
    if target != folder and not target.startswith(folder + os.sep):
        raise ValueError("%s: %s leads out of the folder" % (archive, member.name))
    if member.isdir():
        os.makedirs(target, exist_ok=True)
        return
    content = members.extractfile(member) if member.isfile() else None
    if content is None:
        raise ValueError("%s: %s is neither file nor folder" % (archive, member.name))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with content, open(target, "wb") as file:
        shutil.copyfileobj(content, file)


def _merge(source: str, destination: str) -> None:
    """Move all files below `source` to the same places below `destination`."""
    for folder, _, names in os.walk(source):
        place = os.path.join(destination, os.path.relpath(folder, source))
        os.makedirs(place, exist_ok=True)
        for name in names:
            os.replace(os.path.join(folder, name), os.path.join(place, name))


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the file in errors of the operating system, which do not always do so."""
    try:
        yield
    except OSError as error:
        raise OSError("%s: %s" % (path, error.strerror or error)) from error


def _source(entry: Any, where: str) -> Source:
    """The source that a JSON object describes."""
    if not isinstance(entry, dict) or not {"name", "hash", "urls"} <= entry.keys():
        raise ValueError("%s: a file needs name, hash and urls" % where)
    source = Source(entry["name"], entry["hash"], entry["urls"], entry.get("unpacks_to", ""))
    algorithm, _, digits = str(source.hash).partition(":")
    if not re.fullmatch("[0-9a-f]{%d}" % DIGITS.get(algorithm, 0), digits) or not digits:
        raise ValueError("%s: hash '%s' is not md5:, sha1: or sha256: and its digits" % (
            where, source.hash))
    if not source.name or os.path.basename(source.name) != source.name:
        raise ValueError("%s: '%s' is not a file's name" % (where, source.name))
    if not isinstance(source.urls, list) or not source.urls:
        raise ValueError("%s: urls must be a list of addresses" % where)
    return source


if __name__ == "__main__":
    sys.exit(main())
