"""Installs magic_init: `pip install .[cpu]` (with Caffe's CPU wheel) or `pip install .` beside
a pycaffe of one's own (a CUDA build on PYTHONPATH, Debian's python3-caffe)."""
from setuptools import setup

# The wheel's protobuf files need protobuf < 3.21 and its extension numpy < 2.
CAFFE_CPU = [
    "kendryte-caffe==1.0.0.20210829; python_version < '3.10'",
    "protobuf>=3.12,<3.21; python_version < '3.10'",
]
DEVELOPMENT = [
    "pytest>=7,<9",
    "pytest-xdist>=3,<4",
    "ruff>=0.4,<0.18",
    "mypy>=1.4,<1.20",
    "scikit-image>=0.19,<0.25",  # ships the photographs of `make demo` and of the tests
    "line_profiler>=4,<6",
    "pycocotools>=2.0.4,<2.1",  # the other opinion on average precision
]
EXPERIMENTS = [
    "matplotlib>=3.3,<3.10",
    "scikit-learn>=1.0,<1.7",
    "lmdb>=1.2,<2; python_version < '3.9'",  # what pip builds of later ones does not load there
    "lmdb>=1.2,<4; python_version >= '3.9'",
    "pooch>=1.6,<2",
    "requests>=2.20,<3",
    "numba>=0.53,<0.61",
    "PyYAML>=5.3,<7",
    "jsonschema>=3.2,<5",
]
WORKFLOW = [
    "snakemake[reports]==7.32.4",
    "pulp<2.8",  # snakemake 7 calls a function that later ones do not have
]

setup(
    name="magic-init",
    version="0.1.0",
    description="Data-dependent initialization of Caffe networks",
    license="BSD-2-Clause",
    python_requires=">=3.8",
    packages=["ddinit"],
    py_modules=["magic_init"],
    install_requires=[
        "numpy>=1.19,<2",
        "scipy>=1.5,<1.14",
        "opencv-python-headless>=4.4,<4.12",  # contrib, for selective search, replaces it
        "tqdm>=4.50,<5",
        "threadpoolctl>=3,<4",
    ],
    extras_require={
        "cpu": CAFFE_CPU,
        "experiments": EXPERIMENTS,
        "workflow": EXPERIMENTS + WORKFLOW,
        "dev": DEVELOPMENT + EXPERIMENTS + WORKFLOW,
    },
    entry_points={"console_scripts": ["magic-init=magic_init:main"]},
)
