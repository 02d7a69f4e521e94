# The router, and what else needs no GPU: the head of the Ray cluster, the deploy Job, simulated engines.
# Written but not built here: no container runtime was at hand. Build from the repository's root:
#   docker build -f k8s/images/router.Dockerfile -t YOUR/router:0.1.0 .
# Pin PYTHON by its digest where you build, so that a rebuild is the same image.
ARG PYTHON=python:3.11.13-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# For the compiled parts of the hot path.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/kvlane
WORKDIR /src
# The lock first: it changes more seldom than the code. What it leaves out stays out.
COPY requirements/router.txt requirements/router.txt
RUN /opt/kvlane/bin/pip install --no-deps -r requirements/router.txt
COPY LICENSE README.md pyproject.toml setup.py ./
COPY router router
COPY engine engine
COPY protos protos
RUN /opt/kvlane/bin/pip install --no-deps --no-build-isolation .

FROM ${PYTHON}
# KubeRay starts Ray with bash, which the base image has. No user has a shell or a home; /tmp is a volume at run time.
RUN groupadd --gid 10001 kvlane \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin kvlane
COPY --from=build /opt/kvlane /opt/kvlane
ENV PATH=/opt/kvlane/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 9000
CMD ["kvlane", "serve", "--config", "/etc/kvlane/kvlane.toml"]
