# Headrace in a container. On a CPU, which is the default (the volume keeps models that were downloaded):
#
#   docker build -t headrace .
#   docker run --rm -p 127.0.0.1:30000:30000 -e HEADRACE_API_KEY -v headrace:/home/headrace/.cache \
#     headrace serve Qwen/Qwen3-0.6B --host 0.0.0.0
#
# HEADRACE_API_KEY is yours to set first: without a key no other address than loopback is served.
#
# With CUDA, from an image that has Python 3.11 or newer with its headers, a C compiler (Triton builds launchers with
# it) and a CUDA build of torch (2.11 or newer):
#
#   docker build -t headrace-cuda --build-arg BASE=YOUR_IMAGE --build-arg TORCH_INDEX= --build-arg EXTRAS=cuda .
#   docker run --rm --gpus all --shm-size 8g -p 127.0.0.1:30000:30000 -e HEADRACE_API_KEY headrace-cuda serve ...
#
# A trainer in another container sends weights as bytes over HTTP. With `--pid container:NAME` and the same user id they
# go through shared memory; what a trainer shares by torch's files or handles needs `--ipc` in common too.
ARG BASE=python:3.11-slim
FROM ${BASE}

# Where torch comes from; empty: what the base has, or the package index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=

WORKDIR /opt/headrace
COPY pyproject.toml README.md LICENSE ./
COPY headrace ./headrace
# An image may have a user of id 1000 already, as Ubuntu's have.
RUN if [ -n "${TORCH_INDEX}" ]; then python -m pip install --no-cache-dir "torch>=2.11" --index-url "${TORCH_INDEX}"; fi \
    && python -m pip install --no-cache-dir ".${EXTRAS:+[${EXTRAS}]}" \
    && useradd --create-home --non-unique --uid 1000 headrace \
    && install --directory --owner=headrace /home/headrace/.cache

USER headrace
WORKDIR /home/headrace
EXPOSE 30000
# `headrace serve` drains on SIGTERM: running requests get 30 s to finish (`--drain-timeout`), but docker kills after 10 s
# unless `docker run --stop-timeout 60` says otherwise.
STOPSIGNAL SIGTERM
# It asks no proxy that the environment names. While a model loads, the answer is 503.
HEALTHCHECK --start-period=600s CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 30000, timeout=20); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["headrace"]
CMD ["--help"]
