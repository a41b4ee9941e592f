"""Read the images of a VOC folder from an LMDB that data/make_voc_lmdb.py has made."""
import os
from typing import Union

from ddinit.prototxt import caffe_messages
from training.databases import open_database
from voc.folders import Voc, VocLists


class VocLmdb(VocLists):
    """The images and labels of a split; threads and forked processes may share it.

    Raises ValueError where `root` holds no such database.
    """

    def __init__(self, root: str) -> None:
        open_database(os.path.realpath(root))
        super().__init__(root)

    def read_bytes(self, image: str) -> bytes:
        """Return the encoded image (JPEG) with the id `image`."""
        with open_database(os.path.realpath(self.root)).begin() as transaction:
            record = transaction.get(image.encode())
        if record is None:
            raise ValueError("%s: there is no image %s in the database" % (self.root, image))
        return caffe_messages().Datum.FromString(record).data


def open_voc(path: str) -> Union[Voc, VocLmdb]:
    """Return the reader of a VOC folder, or of an LMDB that was made from one."""
    return VocLmdb(path) if os.path.isfile(os.path.join(path, "data.mdb")) else Voc(path)
