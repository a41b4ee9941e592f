"""PASCAL VOC: reading its folders and databases of them, and its average precision."""
