# magic_init with a Caffe of its own for the CPU or for NVIDIA GPUs, or on an image of yours.
#
#   docker build --target cpu -t magic_init .
#   docker build --target gpu -t magic_init:gpu .
#   docker build --target given --build-arg BASE=my/pycaffe -t magic_init:mine .
#
#   docker run --rm -v "$PWD/photos:/data:ro" -v "$PWD/out:/output" magic_init \
#     models/caffenet/deploy.prototxt /output/caffenet.caffemodel -d '/data/*.jpg' -t kmeans -cs
#   docker run --rm magic_init python -m pytest
#   docker run --rm --gpus all magic_init:gpu gpu-check
#
# What follows the image's name are arguments of magic-init, or a command if the first one is the
# name of a program.  gpu-check compares what a GPU computes with what the CPU does
# (experiments/gpu_check.py) and takes that script's options.
#
# Both cpu and gpu compile Caffe from Debian 11's source package (docker/build_caffe) for Python
# 3.11 and numpy 1.24 of Debian 12.  When Debian 11 leaves the mirrors, its source package has to
# come from Debian's archive of past releases: name that with --build-arg MIRROR.
#
# The gpu target uses CUDA 11.8 and has native code for Pascal, Volta, Turing, Ampere, Ada and
# Hopper; later GPUs compile its PTX code when they first run it.  Fewer architectures take less
# time: --build-arg ARCHS="80 90" has Ampere and later alone.  The image runs with `docker run --gpus
# all`, which takes NVIDIA's container toolkit and, by NVIDIA's rules, driver 450.80 or later (520
# for PTX code).  The authors of this file have run the gpu target without a GPU only.

ARG BASE=runtime

FROM debian:bookworm-slim AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        libboost-filesystem1.74.0 libboost-python1.74.0 libboost-thread1.74.0 libgoogle-glog0v6 \
        libhdf5-103-1 libhdf5-hl-100 libleveldb1d liblmdb0 libopenblas0-pthread \
        libopencv-core406 libopencv-imgcodecs406 libopencv-imgproc406 libprotobuf32 \
        libpython3.11 libsnappy1v5 python3-datrie python3-numpy python3-protobuf python3-six \
        python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Everything but Caffe itself, so that the three targets share these lines.
FROM ${BASE} AS common
USER root
COPY . /magic_init
RUN /magic_init/docker/install
ENV PATH=/opt/magic_init/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba
USER magic
VOLUME ["/data", "/output"]
WORKDIR /magic_init
ENTRYPOINT ["/magic_init/docker/entrypoint"]

# BASE is any image whose python3 (3.8 or later, with venv) imports caffe.  Snakemake's datrie is
# compiled where the image has none, which takes a C compiler and Python's headers.
FROM common AS given
RUN python -c "import caffe"

FROM debian:bookworm-slim AS caffe_cpu
ARG JOBS
ARG MIRROR
COPY docker/build_caffe docker/caffe.patch /build/
RUN /build/build_caffe cpu /caffe

FROM common AS cpu
COPY --from=caffe_cpu /caffe /
RUN python -c "import caffe"

FROM debian:bookworm-slim AS caffe_gpu
ARG ARCHS
ARG PTX
ARG JOBS
ARG MIRROR
COPY docker/build_caffe docker/caffe.patch /build/
# CUDA's compiler and libraries would keep 8 GB of this stage in the build cache.
RUN /build/build_caffe gpu /caffe && apt-get purge -y --auto-remove nvidia-cuda-toolkit

FROM common AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=caffe_gpu /caffe /
RUN python -c "import caffe"
