"""Make an LMDB for Caffe's Data layer from a list of labeled images (section 4.5).

    python data/make_lmdb.py train.txt build/train.lmdb --root ILSVRC2012/train --resize 256 \\
        --shuffle --seed 0
    python data/make_lmdb.py train.txt build/train.lmdb --check

The lines of the list are 'path label'. The same list, options and seed give the same bytes, for any
number of workers. A run that was killed continues after its last transaction.
"""
import argparse
import collections
import hashlib
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from ddinit import files, processes, results
from image_database import MAP_BYTES, ImageDatabase, encoded_record, pixel_record, read_record

log = logging.getLogger("make_lmdb")

CHUNK = 256  # entries in each transaction, which are the most that a killed run loses
AHEAD = 2  # chunks that are decoded before they are written
STATE = "make_lmdb.json"  # beside data.mdb: the list and the options of the database
JPEG_QUALITY = 95
LONGEST_KEY = 500  # LMDB allows 511 bytes


Record = Union[bytes, memoryview]  # a serialized Datum


class Entry(NamedTuple):
    """A line of the list."""

    path: str
    label: int


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make or check the database that the command line names; return the exit status."""
    parser = processes.Parser(prog="make_lmdb.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("list", metavar="LIST", help="text file of lines 'path label'")
    parser.add_argument("out", metavar="OUT.lmdb", help="folder of the database")
    parser.add_argument("--root", metavar="DIR", default="",
                        help="folder that the paths of the list start from")
    parser.add_argument("--resize", metavar="PIXELS", type=int,
                        help="resize images to PIXELS x PIXELS (default: keep their sizes)")
    parser.add_argument("--shuffle", action="store_true", help="store the images in random order")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the order (default: 0)")
    parser.add_argument("--encoded", action="store_true",
                        help="store image files, which are smaller, for a Caffe with OpenCV")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(),
                        help="threads that decode (default: one per core)")
    parser.add_argument("--check", action="store_true",
                        help="compare OUT.lmdb with LIST")
    processes.log_to_stderr()
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise ValueError("--workers has to be at least 1.")
    if arguments.resize is not None and arguments.resize < 1:
        raise ValueError("--resize has to be at least 1 pixel.")
    entries = read_list(arguments.list)
    if arguments.check:
        check(arguments.out, entries)
        return
    settings = {"resize": arguments.resize, "encoded": arguments.encoded,
                "shuffle": arguments.shuffle, "seed": arguments.seed if arguments.shuffle else None}
    make(entries, arguments.out, arguments.root, settings, arguments.workers)


def read_list(path: str) -> List[Entry]:
    """Return the entries of a list of lines 'path label'; a path may contain blanks.

    Raises ValueError naming the file and a line that is something else.
    """
    entries = []
    for number, line in enumerate(files.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        fields = line.strip().rsplit(None, 1)
        if len(fields) != 2 or not fields[1].isdigit():
            raise ValueError("%s: line %d is not 'path label': %s" % (path, number, line))
        entries.append(Entry(fields[0], int(fields[1])))
    if not entries:
        raise ValueError("%s: the list is empty" % path)
    return entries


# ---------------------------------------------------------------------------------------------
# Making
# ---------------------------------------------------------------------------------------------

def make(entries: Sequence[Entry], out: str, root: str, settings: Dict[str, Any],
         workers: int) -> Dict[str, Any]:
    """Write the images of `entries` into the database `out`; return its final state.

    `settings` are resize (pixels or None), encoded, shuffle and seed. Entry i of the stored order
    has the key '%08d_path'. Images that cannot be read are reported and left out. Raises ValueError
    where `out` holds something else, or where no image can be read.
    """
    state: Dict[str, Any] = {"list_sha256": _list_hash(entries), "settings": settings}
    if _finished(out, state):
        log.info("%s is complete already", out)
        return results.read_json(os.path.join(out, STATE))
    stored = _in_stored_order(entries, settings)
    first = _first_to_write(out)
    if first:
        log.info("%s holds the first %d images already; continuing after them", out, first)
    try:
        _write_chunks(out, stored, first, _encoder(root, settings), workers)
    except lmdb.Error as error:
        raise ValueError("%s: cannot write the database (%s)" % (out, error)) from error
    broken = _missing(out, stored)
    state.update(complete=True, images=len(stored) - len(broken), broken=broken)
    results.write_json(os.path.join(out, STATE), state)
    log.info("%s: %d images, %d could not be read", out, state["images"], len(broken))
    return state


def _list_hash(entries: Sequence[Entry]) -> str:
    text = "".join("%s %d\n" % (entry.path, entry.label) for entry in entries)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _in_stored_order(entries: Sequence[Entry], settings: Dict[str, Any]) -> List[Entry]:
    if not settings["shuffle"]:
        return list(entries)
    # RandomState, because numpy promises that its stream never changes.
    order = np.random.RandomState(settings["seed"]).permutation(len(entries))
    return [entries[place] for place in order]


def _finished(out: str, state: Dict[str, Any]) -> bool:
    """Return whether `out` is complete; make its folder if there is none."""
    path = os.path.join(out, STATE)
    if os.path.isdir(out) and os.listdir(out):
        if not os.path.exists(path):
            raise ValueError("%s: the folder has files that this program has not made" % out)
        earlier = results.read_json(path)
        for name in ("list_sha256", "settings"):
            if earlier.get(name) != state[name]:
                raise ValueError("%s: the database was made from another list or with other "
                                 "options (%s). Remove it first." % (out, earlier.get("settings")))
        return bool(earlier.get("complete"))
    os.makedirs(out, exist_ok=True)
    results.write_json(path, state)
    return False


def _first_to_write(out: str) -> int:
    """Return the index of the first entry after the last chunk that was committed."""
    if not os.path.exists(os.path.join(out, "data.mdb")):
        return 0
    with lmdb.open(out, map_size=MAP_BYTES) as environment, environment.begin() as transaction:
        cursor = transaction.cursor()
        last = _place(cursor.key()) if cursor.last() else -CHUNK
    return (last // CHUNK + 1) * CHUNK


def _write_chunks(out: str, stored: Sequence[Entry], first: int,
                  encode: Callable[[Entry], Record], workers: int) -> None:
    """Write the entries from `first` on, each chunk in a transaction.

    The database is opened again for each chunk, because the pages that LMDB uses depend on earlier
    transactions since it was opened, and a resumed run has to give the same bytes.
    """
    processes.keep_freed_memory()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the cores belong to our own threads
    pool = ThreadPoolExecutor(workers)
    chunks: Deque[Tuple[int, List[Future]]] = collections.deque()
    starts = iter(range(first, len(stored), CHUNK))
    try:
        with tqdm(total=len(stored), initial=min(first, len(stored)), unit=" images",
                  disable=None) as bar:
            while True:
                while len(chunks) < AHEAD:
                    start = next(starts, None)
                    if start is None:
                        break
                    chunks.append((start, [pool.submit(encode, entry)
                                           for entry in stored[start:start + CHUNK]]))
                if not chunks:
                    break
                _write_chunk(out, stored, *chunks.popleft(), bar)
    finally:
        for _, futures in chunks:
            for future in futures:
                future.cancel()
        pool.shutdown()
        cv2.setNumThreads(threads)


def _write_chunk(out: str, stored: Sequence[Entry], start: int, futures: Sequence[Future],
                 bar: Any) -> None:
    # metasync=False: a power failure may lose the last transaction, but not the database.
    with lmdb.open(out, map_size=MAP_BYTES, metasync=False) as environment, \
            environment.begin(write=True) as transaction:
        for place, future in enumerate(futures, start):
            try:
                record = future.result()
            except (ValueError, OSError) as error:
                log.warning("left out: %s", error)
            else:
                if not transaction.put(_key(place, stored[place].path), record, append=True):
                    raise ValueError("%s: another process is writing into it" % out)
            bar.update()


def _encoder(root: str, settings: Dict[str, Any]) -> Callable[[Entry], Record]:
    """Return the function from an entry to its record."""
    size, encoded = settings["resize"], settings["encoded"]

    def encode(entry: Entry) -> Record:
        path = os.path.join(root, entry.path)
        with open(path, "rb") as file:
            content = file.read()
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) \
            if content else None
        if image is None:
            raise ValueError("%s is not an image that OpenCV can read" % path)
        if size:
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        if not encoded:
            return pixel_record(image, entry.label).data
        if size:
            quality = (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)
            content = cv2.imencode(".jpg", image, quality)[1].tobytes()
        return encoded_record(content, entry.label)

    return encode


def _key(place: int, path: str) -> bytes:
    return (b"%08d_" % place + path.encode("utf-8", "surrogateescape"))[:LONGEST_KEY]


def _place(key: bytes) -> int:
    return int(bytes(key).split(b"_", 1)[0])


def _missing(out: str, stored: Sequence[Entry]) -> List[str]:
    """Return the paths of entries that are not in the database.

    Raises ValueError where these are all.
    """
    with lmdb.open(out, map_size=MAP_BYTES) as environment, environment.begin() as transaction:
        held = {_place(key) for key in transaction.cursor().iternext(keys=True, values=False)}
    if not held:
        raise ValueError("%s: none of the %d images could be read" % (out, len(stored)))
    return [entry.path for place, entry in enumerate(stored) if place not in held]


# ---------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------

def check(out: str, entries: Sequence[Entry]) -> None:
    """Compare the key and label of each record of `out` with its list.

    Raises ValueError naming the first record that cannot be read or has a wrong key or label.
    """
    state = results.read_json(os.path.join(out, STATE))
    if state["list_sha256"] != _list_hash(entries):
        raise ValueError("%s: the database was made from another list" % out)
    if not state.get("complete"):
        raise ValueError("%s: the database is not complete. Run the command without --check."
                         % out)
    stored = _in_stored_order(entries, state["settings"])
    shapes: Dict[Tuple[int, ...], int] = collections.Counter()
    for place, shape in _checked_shapes(out, stored):
        shapes[shape] += 1
        size = state["settings"]["resize"]
        if size and shape[1:] != (size, size):
            raise ValueError("%s: record %d has %d x %d pixels"
                             % (out, place, shape[1], shape[2]))
    count = sum(shapes.values())
    if count != state["images"]:
        raise ValueError("%s: there are only %d of %d images" % (out, count, state["images"]))
    usual = max(shapes, key=lambda shape: shapes[shape])
    log.info("%s: %d images as in the list, %d could not be read when it was made; %d of them are "
             "%d x %d x %d", out, count, len(state["broken"]), shapes[usual], *usual)


def _checked_shapes(out: str, stored: Sequence[Entry]) -> Iterator[Tuple[int, Tuple[int, ...]]]:
    """Yield place and shape (channels, height, width) of every record."""
    with ImageDatabase(out) as database:
        for key, record in tqdm(database.records(), total=len(database), unit=" images",
                                disable=None):
            place = _place(key.encode("utf-8"))
            pixels, label = read_record(record, "%s: record %s" % (out, key))
            if place >= len(stored) or label != stored[place].label:
                raise ValueError("%s: record %s has the label %d, but not in the list"
                                 % (out, key, label))
            yield place, pixels.shape


if __name__ == "__main__":
    raise SystemExit(main())
