# make demo: initialize CaffeNet from photographs; make test: all tests; make bench: speed, memory
# and quality; make gpu-check: whether a GPU computes what the CPU does.  Everything is installed
# into .venv and written below build/.

# Caffe's CPU wheel needs CPython 3.9 or 3.8; the shims that pyenv puts on PATH may not run.
WORKING = import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 9), (3, 8)))
CANDIDATES = python3.9 python3.8 python3 $(wildcard $(HOME)/.pyenv/versions/3.9*/bin/python \
  $(HOME)/.pyenv/versions/3.8*/bin/python $(HOME)/*conda*/envs/*/bin/python $(HOME)/*conda*/bin/python)
PYTHON ?= $(shell for python in $(CANDIDATES); do \
  $$python -c "$(WORKING)" 2>/dev/null && echo $$python && break; done)

EXTRAS ?= cpu,dev
RUN = .venv/bin/python
# Selective search is in OpenCV's contrib wheel.  Both wheels own the folder cv2, so one has to go.
CONTRIB = 'opencv-contrib-python-headless>=4.4,<4.12'
# Two processes take 0.6 times as long as one; a file's tests share what its fixtures make.
PYTEST = -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests

.PHONY: venv test lint oldest newest newest-venv gpu-check demo bench study workflow clean

venv: .venv/installed

.venv/installed: setup.py Makefile
	@if .venv/bin/python -c "$(WORKING)" 2>/dev/null; then :; \
	elif [ -n "$(PYTHON)" ]; then "$(PYTHON)" -m venv --clear .venv; \
	elif command -v uv >/dev/null; then uv venv --seed --clear --python 3.9 .venv; \
	else echo "magic_init: error: install CPython 3.9 or 3.8 (pyenv, conda or your system's" \
	  "packages) or uv, or name one: make PYTHON=/path/to/python3.9" >&2; exit 2; fi
	$(RUN) -m pip install --quiet --disable-pip-version-check --use-pep517 -e '.[$(EXTRAS)]'
	$(RUN) -m pip uninstall --quiet --yes opencv-python-headless
	$(RUN) -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $(CONTRIB)
	@touch $@

test: venv
	$(RUN) $(PYTEST)

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# all tests with the oldest packages that setup.py allows
oldest: venv
	$(RUN) -m venv --clear build/oldest
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c tests/oldest.txt -e '.[$(EXTRAS)]'
	build/oldest/bin/python -m pip uninstall --quiet --yes opencv-python-headless
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c tests/oldest.txt --force-reinstall --no-deps $(CONTRIB)
	build/oldest/bin/python $(PYTEST)

# all tests on NEWEST, a Python that has a pycaffe of its own, with the newest packages that
# setup.py allows; if CAFFE is set, pycaffe is the one that docker/build_caffe put there
NEWEST ?= python3
LIBRARIES = $(if $(CAFFE),LD_LIBRARY_PATH='$(wildcard $(abspath $(CAFFE))/usr/lib/*-linux-gnu)')
FIND_CAFFE = import sys, importlib.util as u; sys.path += sys.argv[1:]; sys.exit(not u.find_spec("caffe"))

newest: newest-venv
	$(LIBRARIES) build/newest/bin/python $(PYTEST)

# whether a GPU computes what the CPU does, with a pycaffe for CUDA that is found as for `newest`
gpu-check: newest-venv
	$(LIBRARIES) build/newest/bin/python experiments/gpu_check.py --out build/gpu_check.json

newest-venv:
	@$(NEWEST) -c '$(FIND_CAFFE)' $(addsuffix /usr/lib/python3/dist-packages,$(CAFFE)) || { \
	  echo "make: error: $(NEWEST) finds no caffe. Build one with docker/build_caffe in Debian 12 and" \
	  "name its folder: make $(or $(MAKECMDGOALS),newest) CAFFE=FOLDER" >&2; exit 2; }
	docker/make_venv build/newest $(NEWEST) $(abspath $(CAFFE))

demo: venv
	$(RUN) data/photographs.py build/photographs
	$(RUN) magic_init.py models/caffenet/deploy.prototxt build/caffenet.caffemodel \
	  --data 'build/photographs/*' --type kmeans --calibrate \
	  --report build/caffenet.html
	@echo "Look at build/caffenet.html: figure 1 of this net, its filters and its layers' rates."

# other photographs: make bench PHOTOS='init/*' MEASURE='others/*'
PHOTOS ?= build/photographs/*
MEASURE ?= build/photographs_to_measure/*

bench: venv
	$(RUN) data/photographs.py build/photographs
	$(RUN) data/photographs.py build/photographs_to_measure --count 60 --seed 1
	$(RUN) experiments/bench.py --data '$(PHOTOS)' --measure '$(MEASURE)' --out build/bench.json

# tables 1 and 2 in small, on any small images with labels: make study DATA=file.npz
DATA ?= cifar10_mini.npz

study: venv
	$(RUN) experiments/study.py --data '$(DATA)' --out build/study

# every rule of experiments/Snakefile, on generated data
workflow: venv
	$(RUN) -m snakemake --snakefile experiments/Snakefile --configfile experiments/tiny.yaml \
	  --cores 2 --rerun-incomplete --quiet -- all

clean:
	rm -rf build .venv *.egg-info
