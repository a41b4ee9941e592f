"""Pack the images and labels of a split of a VOC folder into an LMDB.

    python data/make_voc_lmdb.py --voc datasets/VOCdevkit/VOC2007 --split trainval \\
        build/trainval.lmdb

OUT.lmdb holds `data.mdb`, Caffe Datum messages with the image files as they are by image id, and
`ImageSets/Main`, the lists of the split. A run that is killed leaves no OUT.lmdb, only a hidden
folder .OUT.lmdb.*.part that may be deleted.
"""
import argparse
import contextlib
import glob
import logging
import os
import shutil
import sys
from typing import Dict, Iterator, List, Optional, Sequence

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from ddinit import files, processes
from ddinit.prototxt import caffe_messages
from image_database import MAP_BYTES

log = logging.getLogger("make_voc_lmdb")

LISTS = os.path.join("ImageSets", "Main")
BATCH = 64  # images in each transaction, whose pages LMDB keeps in memory


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make the database that the command line names; return the exit status."""
    parser = processes.Parser(prog="make_voc_lmdb.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT.lmdb", help="folder to write; it must not exist")
    parser.add_argument("--voc", metavar="DIR", required=True,
                        help="VOC folder, such as VOCdevkit/VOC2007")
    parser.add_argument("--split", metavar="NAME", default="trainval",
                        help="split to pack, such as trainval or test (default: trainval)")
    processes.log_to_stderr()
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    if os.path.lexists(arguments.out):
        raise ValueError("%s exists already. Remove it, or use another name." % arguments.out)
    lists = read_lists(arguments.voc, arguments.split)
    images = [line.split()[0] for line in lists[arguments.split]]
    write(arguments.voc, images, lists, arguments.out)
    size = os.stat(os.path.join(arguments.out, "data.mdb")).st_blocks * 512
    log.info("%s: %d images, %d classes, %.1f MB", arguments.out, len(images), len(lists) - 1,
             size / 1e6)


def read_lists(voc: str, split: str) -> Dict[str, List[str]]:
    """Return the lines of SPLIT.txt and of every CLASS_SPLIT.txt, by the names of the files.

    Without a SPLIT.txt, its images are those of the first class. Raises ValueError where the folder
    has no list, or the list of a class has other images.
    """
    lists = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(voc), LISTS, "*_%s.txt" % split))):
        lines = [line for line in files.read_text(path).splitlines() if line.strip()]
        lists[os.path.splitext(os.path.basename(path))[0]] = lines
    if not lists:
        raise ValueError("%s: there is no CLASS_%s.txt. A VOC folder is needed, such as "
                         "VOCdevkit/VOC2007." % (os.path.join(voc, LISTS), split))
    whole = os.path.join(voc, LISTS, split + ".txt")
    first = [line.split()[0] for line in next(iter(lists.values()))]
    images = files.read_text(whole).split() if os.path.exists(whole) else first
    for name, lines in lists.items():
        if {line.split()[0] for line in lines} != set(images):
            raise ValueError("%s.txt does not list the images of split %s"
                             % (os.path.join(voc, LISTS, name), split))
    return {**lists, split: images}


def write(voc: str, images: Sequence[str], lists: Dict[str, List[str]], out: str) -> None:
    """Write a database with these images and lists, whole or not at all.

    An image that cannot be decoded is stored with a warning, because the reader skips it. Raises
    ValueError where an image is missing, and OSError where the disk is full.
    """
    with _new_folder(out) as temporary:
        os.makedirs(os.path.join(temporary, LISTS))
        for name, lines in lists.items():
            with open(os.path.join(temporary, LISTS, name + ".txt"), "w",
                      encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
        try:
            with lmdb.open(temporary, map_size=MAP_BYTES) as environment, \
                    tqdm(total=len(images), unit="image", disable=None) as bar:
                for start in range(0, len(images), BATCH):
                    with environment.begin(write=True) as transaction:
                        for image in images[start:start + BATCH]:
                            transaction.put(image.encode(), _record(voc, image))
                            bar.update()
        except lmdb.Error as error:
            raise OSError("%s: %s" % (out, error)) from error


@contextlib.contextmanager
def _new_folder(path: str) -> Iterator[str]:
    """Yield a new folder beside `path`; rename it to `path` only if the block succeeds."""
    parent, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise ValueError("%s: the folder %s does not exist" % (path, parent))
    temporary = os.path.join(parent, ".%s.%d.part" % (name, os.getpid()))
    os.mkdir(temporary)
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record(voc: str, image: str) -> bytes:
    """Return the Datum of an image file."""
    path = os.path.join(voc, "JPEGImages", image + ".jpg")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError("%s: cannot read the image (%s)" % (path, error.strerror)) from error
    decoded = None
    if content:
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    if decoded is None:
        log.warning("%s is not an image that OpenCV can decode", path)
    return caffe_messages().Datum(encoded=True, data=content).SerializeToString()


if __name__ == "__main__":
    sys.exit(main())
