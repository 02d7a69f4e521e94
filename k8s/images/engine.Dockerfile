# Engine replicas with vLLM on NVIDIA GPUs. CUDA's libraries come with the lock; the driver's come from the node.
# Written but not built here: no container runtime was at hand. Build from the repository's root:
#   docker build -f k8s/images/engine.Dockerfile -t YOUR/engine:0.1.0 .
# Pin PYTHON by its digest where you build. It must be the router image's: Ray refuses nodes of another Python.
ARG PYTHON=python:3.11.13-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# For the compiled parts of the hot path.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/kvlane
WORKDIR /src
# The lock first: it changes more seldom than the code. What it leaves out stays out.
COPY requirements/gpu.txt requirements/gpu.txt
RUN /opt/kvlane/bin/pip install --no-deps -r requirements/gpu.txt
COPY LICENSE README.md pyproject.toml setup.py ./
COPY router router
COPY engine engine
COPY protos protos
RUN /opt/kvlane/bin/pip install --no-deps --no-build-isolation .

FROM ${PYTHON}
# Triton compiles its launchers with the C compiler when a kernel is first used.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 kvlane \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin kvlane
COPY --from=build /opt/kvlane /opt/kvlane
# /usr/local/nvidia is where GKE mounts the node's driver.
ENV PATH=/opt/kvlane/bin:/usr/local/nvidia/bin:$PATH LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT=/tmp/vllm TRITON_CACHE_DIR=/tmp/triton
USER 10001:10001
WORKDIR /tmp
# KubeRay gives the command: a Ray node, whose workers are the replicas.
CMD ["kvlane", "version"]
