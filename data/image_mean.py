"""Write the mean image of an LMDB as Caffe's `mean_file` (section 4.5).

    python data/image_mean.py build/train.lmdb build/mean.binaryproto

The records are read once, and a few of them are in memory at a time. The sums are exact integers.
"""
import argparse
import collections
import concurrent.futures
import itertools
import logging
import os
from typing import Deque, Iterator, Optional, Sequence

import numpy as np
from tqdm import tqdm

from ddinit import files, processes
from ddinit.prototxt import caffe_messages
from image_database import ImageDatabase, read_record

log = logging.getLogger("image_mean")

AHEAD = 256  # records that are decoded before they are added


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the mean of the database that the command line names; return the exit status."""
    parser = processes.Parser(prog="image_mean.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lmdb", metavar="LMDB", help="database of images of one size")
    parser.add_argument("out", metavar="OUT.binaryproto", help="file to write")
    processes.log_to_stderr()
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    files.check_writable(arguments.out)
    mean = mean_image(arguments.lmdb)
    write_mean(mean, arguments.out)
    log.info("%s: the mean by channel (blue, green, red) is %s", arguments.out,
             ", ".join("%.3f" % value for value in mean.mean(axis=(1, 2))))


def mean_image(path: str) -> np.ndarray:
    """Return the mean image, float64 (channels, height, width), of all records in a database.

    Raises ValueError naming the first record whose size differs from that of the first.
    """
    with ImageDatabase(path) as database:
        total: Optional[np.ndarray] = None
        for number, pixels in enumerate(tqdm(_decoded(database), total=len(database),
                                             unit=" images", disable=None)):
            if total is None:
                total = np.zeros(pixels.shape, np.uint64)
            if pixels.shape != total.shape:
                raise ValueError("%s: image %d is %d x %d x %d, but those before it are %d x %d x "
                                 "%d. Make the database with --resize."
                                 % ((path, number) + pixels.shape + total.shape))
            total += pixels
    assert total is not None  # because an ImageDatabase is never empty
    return total / (number + 1)


def _decoded(database: ImageDatabase) -> Iterator[np.ndarray]:
    """Yield the images of a database in order, decoded by threads ahead of their use."""
    records = database.records()
    waiting: Deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            for key, record in itertools.islice(records, AHEAD - len(waiting)):
                waiting.append(pool.submit(read_record, record,
                                           "%s: record %s" % (database.path, key)))
            if not waiting:
                return
            yield waiting.popleft().result()[0]


def write_mean(mean: np.ndarray, path: str) -> None:
    """Write a mean image (channels, height, width) as the BlobProto that Caffe reads."""
    channels, height, width = mean.shape
    blob = caffe_messages().BlobProto(num=1, channels=channels, height=height, width=width,
                                      data=mean.astype(np.float32).ravel())
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(blob.SerializeToString())


if __name__ == "__main__":
    raise SystemExit(main())
