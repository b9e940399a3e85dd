# The service with its weights.
#
# Which torch? By default the one in pip's own index for the platform. On x86-64 Linux that is the CUDA build: several
# gigabytes, but it runs everywhere, with and without a GPU. For a much smaller CPU-only image, give the address of
# PyTorch's index of CPU wheels (the "CPU" choice on its installation page has it):
#
#     TORCH_VARIANT=cpu TORCH_INDEX_URL=<address> docker compose build
#
# TORCH_VARIANT (any, cpu, cuda) selects nothing: it says which build is expected, so that a wrong one fails here and
# not in production.
#
# LOCK=cluster adds Ray Serve (requirements-cluster.txt): the same image is then also that of Ray's pods, as
# docker/kubernetes/ray has them.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS packages
ARG TORCH_INDEX_URL=
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
ARG LOCK=serve
COPY requirements-serve.txt requirements-cluster.txt ./
# torch first and alone, so that its index is used for nothing else; the lock then finds it installed.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' "requirements-$LOCK.txt")"; \
    fi \
    && pip install --requirement "requirements-$LOCK.txt"
ARG TORCH_VARIANT=any
RUN python -c "import sys, torch; got = 'cuda' if torch.version.cuda else 'cpu'; \
    sys.exit(None if '$TORCH_VARIANT' in ('any', got) else f'TORCH_VARIANT=$TORCH_VARIANT, but this torch is {got}')"

FROM ${BASE_IMAGE}
# OpenVINO's converter sends telemetry unless this file opts out. A volume mounted at /cache takes its owner from here.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin ddpm \
    && mkdir /home/ddpm/intel \
    && printf 0 > /home/ddpm/intel/openvino_telemetry \
    && install --directory --owner 10001 --group 10001 /cache

COPY --from=packages /opt/venv /opt/venv
# KubeRay starts Ray from a login shell, which has a PATH of its own.
RUN if [ -x /opt/venv/bin/ray ]; then ln --symbolic /opt/venv/bin/ray /usr/local/bin/; fi
# On a GPU, noise is drawn by a Triton kernel, and Triton compiles a C file at run time to launch it.
# hadolint ignore=DL3008
RUN if /opt/venv/bin/python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
WORKDIR /app
COPY LICENSE docker/healthcheck.py docker/leave.py ./
COPY model model
COPY service service
COPY weights weights
# Only /tmp is writable at run time, so compile here. Freshly trained weights may be readable by their owner only.
RUN /opt/venv/bin/python -m compileall -q model service \
    && chmod -R a+rX /app

# /cache is for models of the Hub, and for what Triton compiles and then loads as a library, which a tmpfs forbids where it
# is mounted with `noexec`, Docker's default.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/tmp/cache \
    CUDA_CACHE_PATH=/tmp/cache/cuda \
    TRITON_CACHE_DIR=/cache/triton \
    HF_HOME=/cache/huggingface \
    DDPM_HOST=0.0.0.0 \
    DDPM_PORT=8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "/app/healthcheck.py"]
# The exec form: Python is process 1 and receives SIGTERM. Flags of the service may follow `docker run IMAGE`.
ENTRYPOINT ["python", "-m", "service"]

# Last, since a new revision leaves all layers above as they are.
ARG BASE_IMAGE
ARG REVISION=
LABEL org.opencontainers.image.title="ddpm-service" \
      org.opencontainers.image.description="Diffusion models over HTTP, with continuous batching of denoising steps" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.licenses="Apache-2.0"
