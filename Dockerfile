# clip-train for clusters (DEVICE=cuda) or for processors alone (DEVICE=cpu): docs/container.md

# Debian or Ubuntu with Python 3.11 to 3.13, its headers and venv. CUDA's libraries come with torch, from uv.lock.
ARG BASE_IMAGE=python:3.13-slim-trixie


FROM ${BASE_IMAGE} AS uv
ARG UV_VERSION=0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never
# Secrets are optional and kept nowhere: env is sourced (another package index, a proxy), ca holds certificates it names.
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=env --mount=type=secret,id=ca \
    set -eu; [ ! -f /run/secrets/env ] || . /run/secrets/env; \
    python3 -m venv /opt/uv; /opt/uv/bin/pip install uv==${UV_VERSION}
WORKDIR /src


# The lock file as a list with hashes: only when the list changes are the dependencies installed again.
FROM uv AS requirements
ARG DEVICE=cuda
ARG EXTRAS="remote parquet tensorboard sweep"
COPY pyproject.toml uv.lock ./
# Torch of the lock file cannot be imported without most of CUDA; on a processor it does without these two.
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=env --mount=type=secret,id=ca \
    set -eu; [ ! -f /run/secrets/env ] || . /run/secrets/env; \
    for extra in ${EXTRAS}; do set -- "$@" --extra "$extra"; done; \
    case "${DEVICE}" in \
        cuda) ;; \
        cpu) set -- "$@" --no-emit-package triton --no-emit-package nvidia-cusolver ;; \
        *) echo "DEVICE=${DEVICE}: there are cuda and cpu" >&2; exit 1 ;; \
    esac; \
    /opt/uv/bin/uv export --quiet --locked --no-dev --no-emit-project --no-header -o /opt/requirements.txt "$@"; \
    touch --date=@0 /opt/requirements.txt


FROM uv AS dependencies
COPY --from=requirements /opt/requirements.txt /opt/requirements.txt
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=env --mount=type=secret,id=ca \
    set -eu; [ ! -f /run/secrets/env ] || . /run/secrets/env; \
    /opt/uv/bin/uv venv /opt/venv; \
    /opt/uv/bin/uv pip sync --python /opt/venv --require-hashes /opt/requirements.txt


FROM uv AS project
COPY pyproject.toml README.md LICENSE ./
COPY clip_train clip_train
COPY hydra_plugins hydra_plugins
COPY configs configs
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=env --mount=type=secret,id=ca \
    set -eu; [ ! -f /run/secrets/env ] || . /run/secrets/env; \
    /opt/uv/bin/uv build --wheel --out-dir /opt/wheel


FROM ${BASE_IMAGE}
ARG DEVICE=cuda
# tini passes signals on from process 1. On GPUs Triton compiles the launcher of its kernels with a C compiler
# (without one the loss falls back to plain PyTorch), trainer.compile wants one of C++, and NCCL talks to InfiniBand through libibverbs.
RUN set -eu; \
    [ "${DEVICE}" = cpu ] || set -- g++ libibverbs1 ibverbs-providers; \
    apt-get update; apt-get install -y --no-install-recommends tini "$@"; rm -rf /var/lib/apt/lists/*

COPY --from=dependencies /opt/venv /opt/venv
# The project in small layers of its own, so that new code is a small push and pull. The wheel is copied, not mounted:
# podman takes a step from its cache whatever has changed in a mount.
COPY --from=project /opt/wheel /opt/wheel
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/mnt \
    /mnt/bin/uv pip install --python /opt/venv --offline --no-cache --no-deps --compile-bytecode /opt/wheel/*.whl

# Any user id will do: what is written goes to the mounts, to /work and to /tmp. Without a name in /etc/passwd,
# USER is where Python looks for one.
RUN useradd --uid 1000 --no-create-home --home-dir /tmp clip && mkdir --mode=1777 /work
ENV PATH=/opt/venv/bin:${PATH} HOME=/tmp USER=clip \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
ENTRYPOINT ["tini", "-s", "--", "clip-train"]
