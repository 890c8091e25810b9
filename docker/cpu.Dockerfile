# raygr with an LLM on processors, from the locked packages: docs/install.md
#   docker build -f docker/cpu.Dockerfile -t raygr:cpu .
FROM python:3.11-slim-bookworm
# vLLM's build for CPUs is linked with libnuma
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
ENV RAYGR_CACHE=/opt/raygr-cache
WORKDIR /raygr
COPY requirements/cpu.lock requirements/
RUN pip install --no-cache-dir --no-deps -r requirements/cpu.lock --extra-index-url https://download.pytorch.org/whl/cpu
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . && python -m raygr.score.default_model
ENTRYPOINT ["raygr"]
CMD ["--help"]
