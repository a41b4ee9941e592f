"""What Caffe is like: importing it, reading definitions, walking nets (in progress)."""
import os
from typing import Any


def import_caffe() -> Any:
    """Return the caffe module, imported without glog's chatter."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    import caffe
    return caffe
