"""Open databases of images, which are LMDBs of Caffe's Datum messages."""
import functools
import os

import lmdb


@functools.lru_cache(maxsize=None)
def open_database(path: str) -> lmdb.Environment:
    """Return the open database at a real path, of which LMDB allows one in each process.

    Raises ValueError where there is none.
    """
    if not os.path.isfile(os.path.join(path, "data.mdb")):
        raise ValueError("%s: not an LMDB, because there is no data.mdb in it" % path)
    try:
        # No lock file: the folder may be read-only, and nobody writes while we read.
        return lmdb.open(path, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError("%s: not an LMDB (%s)" % (path, error)) from error
