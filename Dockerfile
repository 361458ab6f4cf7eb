# Headrace in a container. On a CPU, which is the default:
#
#   docker build -t headrace .
#   docker run --rm -p 127.0.0.1:30000:30000 -e HEADRACE_API_KEY headrace serve Qwen/Qwen3-0.6B --host 0.0.0.0
#
# With CUDA, from an image that has Python 3.11 or newer and a CUDA build of torch (2.11 or newer):
#
#   docker build -t headrace-cuda --build-arg BASE=YOUR_IMAGE --build-arg TORCH_INDEX= --build-arg EXTRAS=cuda .
#   docker run --rm --gpus all --shm-size 8g -p 127.0.0.1:30000:30000 -e HEADRACE_API_KEY headrace-cuda serve ...
#
# Tensors of trainers go through shared memory: give both containers one, or `--ipc=host`.
ARG BASE=python:3.11-slim
FROM ${BASE}

# Where torch comes from; empty: what the base has, or the package index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=

WORKDIR /opt/headrace
COPY pyproject.toml README.md LICENSE ./
COPY headrace ./headrace
RUN if [ -n "${TORCH_INDEX}" ]; then python -m pip install --no-cache-dir "torch>=2.11" --index-url "${TORCH_INDEX}"; fi \
    && python -m pip install --no-cache-dir ".${EXTRAS:+[${EXTRAS}]}" \
    && useradd --create-home --uid 1000 headrace

USER headrace
WORKDIR /home/headrace
EXPOSE 30000
# `headrace serve` drains on SIGTERM: running requests finish first. Its loads take a while before /ready is 200.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=600s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:30000/health')"]
ENTRYPOINT ["headrace"]
CMD ["--help"]
