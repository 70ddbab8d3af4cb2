# A server of Weft in a container, for CPUs or CUDA.
#
#     docker build --tag weft .
#     docker build --tag weft:cuda --build-arg DEVICE=cuda .
#
# TORCH_INDEX names an index with wheels of torch for the one or the other, where pip's own does not have them:
# pytorch.org says which. Versions are those of constraints.txt, which are of Linux and Python 3.11.

ARG DEVICE=cpu

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS cpu
ENV EXTRAS=serve,page,diffusion,sentencepiece

FROM base AS cuda
ENV EXTRAS=serve,page,diffusion,sentencepiece,triton,quantize
# the driver is the host's; CUDA itself comes with torch
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${DEVICE}
ARG TORCH_INDEX=
WORKDIR /build
# torch alone first: it is large, and changes less often than the source
COPY constraints.txt ./
RUN python -m pip install --quiet --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY src src
# what builds the package is pinned too
RUN PIP_CONSTRAINT=/build/constraints.txt python -m pip install --quiet --constraint constraints.txt ".[$EXTRAS]"

RUN useradd --create-home --uid 10001 weft
USER 10001
WORKDIR /home/weft
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", "import http.client as http; to = http.HTTPConnection('127.0.0.1', 8000, timeout=4); to.request('GET', '/health'); raise SystemExit(to.getresponse().status != 200)"]
# without a key in WEFT_API_KEY, or --key-file, or --insecure, it refuses to start
ENTRYPOINT ["weft", "serve", "--host", "0.0.0.0"]
CMD ["tiny"]
