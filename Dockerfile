# magic_init with a Caffe of the distribution's, for the CPU, for NVIDIA GPUs, or on your own image.
#
#   docker build --target cpu -t magic_init .
#   docker build --target gpu -t magic_init:gpu .
#   docker build --target given --build-arg BASE=my/pycaffe -t magic_init:mine .
#
#   docker run --rm -v "$PWD/photos:/data:ro" -v "$PWD/out:/output" magic_init \
#     models/caffenet/deploy.prototxt /output/caffenet.caffemodel -d '/data/*.jpg' -t kmeans -cs
#   docker run --rm magic_init python -m pytest
#
# What follows the image's name is magic-init's arguments, or a command where it names a program.
# GPUs: `docker run --gpus all ...` with NVIDIA's container toolkit.  Ubuntu 20.04 builds Caffe with
# CUDA 10.1, which knows no GPU after Turing (compute capability 7.5); Caffe's own list of
# architectures ends with Pascal (6.1).  So: Kepler, Maxwell and Pascal (the paper's Titan X) should
# run, Volta and Turing may, Ampere and later cannot: give those a BASE with a newer build of Caffe.
# The gpu target has not been run by the authors of this file; the cpu target has.

ARG BASE=debian:bullseye-slim

FROM debian:bullseye-slim AS cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        python3-caffe libopenblas0-pthread python3-venv python3-datrie \
    && rm -rf /var/lib/apt/lists/*
COPY . /magic_init
RUN /magic_init/docker/install
ENV PATH=/opt/magic_init/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba
USER magic
VOLUME ["/data", "/output"]
WORKDIR /magic_init
ENTRYPOINT ["/magic_init/docker/entrypoint"]

# Ubuntu's numpy 1.17 is older than magic_init needs; 1.19 still runs what is built for 1.17.
FROM ubuntu:20.04 AS gpu
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3-caffe-cuda libopenblas0-pthread python3-venv python3-pip python3-datrie \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m pip install --no-cache-dir numpy==1.19.5
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . /magic_init
RUN /magic_init/docker/install
ENV PATH=/opt/magic_init/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba
USER magic
VOLUME ["/data", "/output"]
WORKDIR /magic_init
ENTRYPOINT ["/magic_init/docker/entrypoint"]

# Any image whose python3 (3.8 or later, with venv) imports caffe.  Snakemake's datrie is built
# from source where the image has none: that takes a C compiler and Python's headers.
FROM ${BASE} AS given
USER root
COPY . /magic_init
RUN /magic_init/docker/install
ENV PATH=/opt/magic_init/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba
USER magic
VOLUME ["/data", "/output"]
WORKDIR /magic_init
ENTRYPOINT ["/magic_init/docker/entrypoint"]
