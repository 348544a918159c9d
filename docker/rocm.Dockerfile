# wave64 for AMD GPUs: docker build -f docker/rocm.Dockerfile -t wave64:gfx942 .     (docs/containers.md)
#
# The wheel is built in a stage that has neither ROCm nor a GPU; the image that serves is ROCm's torch, the wheel and what
# the server imports. Both images must have the same Python: the wheel is of one version.
ARG BUILD_IMAGE=python:3.12-slim-bookworm
ARG ROCM_IMAGE=rocm/pytorch:latest

FROM ${BUILD_IMAGE} AS wheel
ARG GPU_ARCH=gfx942
WORKDIR /src
COPY . .
RUN python3 setup_rocm.py wheel --archs "${GPU_ARCH}"

FROM ${ROCM_IMAGE} AS server
# AMD's advice for MI300X: arguments of launches in device memory, RCCL's channels, no reclaiming of scratch.
ENV HIP_FORCE_DEV_KERNARG=1 \
    NCCL_MIN_NCHANNELS=112 \
    HSA_NO_SCRATCH_RECLAIM=1 \
    PYTHONUNBUFFERED=1
# A file has its version in its name; what it needs is bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/src/dist,target=/wheels \
    for wheel in /wheels/wave64-*.whl; do python3 -m pip install --no-cache-dir "${wheel}[serve]"; done
RUN groupadd --force video && groupadd --force render && \
    useradd --create-home --uid 10001 --groups video,render wave64
USER 10001
WORKDIR /home/wave64
# Triton's kernels of MODEL, where a server finds them; no GPU is needed to compile them.
ARG GPU_ARCH=gfx942
ARG MODEL=demo-llama
RUN IFS=";"; for arch in ${GPU_ARCH}; do \
        case "${arch}" in \
            gfx942|gfx950) python3 -m wave64 prebuild --arch "${arch}" --model-path "${MODEL}" || exit 1 ;; \
        esac; \
    done
EXPOSE 30000
# ready after weights, Triton's kernels and graphs: minutes for a large model
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=6 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:30000/health', timeout=4)"]
ENTRYPOINT ["python3", "-m", "wave64"]
CMD ["serve", "--host", "0.0.0.0"]
