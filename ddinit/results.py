"""One result format: JSON with what is needed to repeat it."""
import contextlib
import importlib.metadata
import json
import math
import platform
import sys
from typing import Any, Dict, Optional, Sequence

from ddinit import files

VERSION = "0.1.0"
# Packages whose versions a result depends on, with all the names that they are distributed under.
PACKAGES = {"numpy": ["numpy"], "scipy": ["scipy"],
            "cv2": ["opencv-python-headless", "opencv-contrib-python-headless", "opencv-python"],
            "caffe": ["kendryte-caffe"]}


def provenance(seed: Optional[int], argv: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """Return the command, seed and versions that a result came from.

    `argv` is the command line without the program's name, None for the process's own. Nothing is
    imported: a process that draws a figure need not have Caffe.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    versions = {"magic_init": VERSION, "python": platform.python_version()}
    for module, names in PACKAGES.items():
        loaded = getattr(sys.modules.get(module), "__version__", None)
        versions[module] = str(loaded or _installed(names))
    return {"command": [sys.argv[0], *arguments], "seed": seed, "versions": versions}


def _installed(names: Sequence[str]) -> str:
    """Return the version of the first package of these names that pip knows."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def write_json(path: str, value: Any) -> None:
    """Write `value` as JSON, whole or not at all; numbers that are not finite become null."""
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(_plain(value), file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: str) -> Any:
    """Return the value in a JSON file.

    Raises ValueError naming the file where it is missing or no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise ValueError("%s: cannot read it (%s)" % (path, error.strerror)) from error
    except ValueError as error:
        raise ValueError("%s: not JSON: %s" % (path, error)) from error


def _plain(value: Any) -> Any:
    """A value that JSON can hold: numpy numbers and arrays as Python's, no NaN or infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
