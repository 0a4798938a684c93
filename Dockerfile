# One image for a machine with GPUs and for Slurm with enroot: CUDA 13, PyTorch, Transformer Engine, DeepSpeed, DeepEP.
#     docker build --tag hysparse .                  how to run it: docs/container.md
# Every version is pinned but those of Ubuntu's packages, whose archive keeps no old ones (the base image fixes the rest)
# and of the CUDA bindings that torch brings from its own index.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates git libaio-dev libibverbs-dev make ninja-build python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# Architectures to compile for: Hopper. MAX_JOBS limits the compilers' memory.
ENV VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    CUDA_HOME=/usr/local/cuda \
    TORCH_CUDA_ARCH_LIST=9.0 \
    NVTE_CUDA_ARCHS=90 \
    MAX_JOBS=8
RUN python3.12 -m venv "$VENV" \
    && pip install pip==25.3 setuptools==80.9.0 wheel==0.45.1 packaging==26.3 ninja==1.13.2

# The PyTorch whose Triton the kernels are tuned for. constraints.txt holds the one of machines without a GPU.
RUN pip install torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130

WORKDIR /opt/hysparse
COPY pyproject.toml constraints.txt README.md LICENSE ./
# onnx and what it needs is not in constraints.txt: only Transformer Engine imports it.
RUN grep --invert-match '^torch==' constraints.txt > /opt/constraints.txt \
    && printf '%s\n' torch==2.11.0+cu130 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 ml_dtypes==0.6.0 \
        >> /opt/constraints.txt

# The newest that megatron-core 0.16.1 is made for. Its PyTorch part is compiled here.
RUN pip install --no-build-isolation --constraint /opt/constraints.txt 'transformer-engine[pytorch,core_cu13]==2.11.0'

# DeepEP 1.2.1 needs NVSHMEM, and CUDA 13's headers where it looks for those of CUDA 12. To leave it out:
# docker build --build-arg DEEPEP=none
ARG DEEPEP=9af0e0d0e74f3577af1979c9b9e1ac2cad0104ee
RUN if [ "$DEEPEP" != none ]; then \
        pip install --constraint /opt/constraints.txt nvidia-nvshmem-cu13==3.4.5 \
        && CPLUS_INCLUDE_PATH=/usr/local/cuda/include/cccl pip install --no-build-isolation --no-deps \
            "git+https://github.com/deepseek-ai/DeepEP.git@$DEEPEP"; \
    fi

COPY . .
RUN pip install --constraint /opt/constraints.txt --editable '.[dev,wandb,deepspeed,slurm]' \
    && touch "$VENV/.ready" \
    && useradd --create-home --uid 10001 hysparse \
    && chown --recursive 10001:10001 /opt/hysparse

# Compiled kernels; a folder that any user of the container may write to
ENV TRITON_CACHE_DIR=/tmp/triton
USER 10001
CMD ["python", "train.py", "--help"]
