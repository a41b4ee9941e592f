"""Read lists of image files."""
import os
import re
from typing import List

from ddinit import files


def read_paths(path: str, root: str) -> List[str]:
    """Return the image paths in a list of lines 'path' or 'path label', below `root`.

    Raises ValueError naming a file that cannot be read or is empty.
    """
    lines = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError("%s: the list is empty" % path)
    return [os.path.join(root, re.sub(r"\s+\d+$", "", line)) for line in lines]
