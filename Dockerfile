# negpipe in a container. Checked by a linter (hadolint), never built: there was no builder.
# CPU (the default), and GPU, whose torch brings CUDA's libraries:
#   docker build -t negpipe .
#   docker build -t negpipe:gpu --build-arg VARIANT=gpu .
# The working directory is /work, run directories are in the volume /work/runs, hub and models are cached in /cache:
#   docker run --rm -v "$PWD/configs:/work/configs:ro" -v "$PWD/data:/work/data:ro" -v negpipe-runs:/work/runs \
#     -v negpipe-cache:/cache negpipe mine scifact.yaml
# GPU: docker run --gpus all … negpipe:gpu mine scifact.yaml
FROM python:3.11-slim-bookworm AS build
ARG VARIANT=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
RUN python -m venv /opt/negpipe
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY negpipe negpipe
RUN case "$VARIANT" in \
      cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
      gpu) ;; \
      *) echo "VARIANT is cpu or gpu, not $VARIANT" >&2; exit 1 ;; \
    esac \
    && /opt/negpipe/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[offline,http,train]'

FROM python:3.11-slim-bookworm
COPY --from=build /opt/negpipe /opt/negpipe
RUN useradd --create-home --uid 1000 negpipe \
    && install -d -o negpipe -g negpipe /work /work/runs /cache
ENV PATH=/opt/negpipe/bin:$PATH HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
VOLUME ["/work/runs", "/cache"]
ENTRYPOINT ["negpipe"]
CMD ["--help"]
