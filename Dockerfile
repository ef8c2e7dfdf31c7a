# syntax=docker/dockerfile:1
# The server, with or without a GPU. The root file system may be read-only.
#
#   docker build -t fanin .
#   docker run --rm --read-only -p 8000:8000 -v "$PWD/bundle:/bundle:ro" fanin
#
#   docker build --target gpu -t fanin:gpu .
#   docker run --rm --read-only --gpus all -v fanin-cache:/cache -p 8000:8000 -v "$PWD/bundle:/bundle:ro" fanin:gpu
#
# Other settings follow the bundle: docker run … fanin /bundle --host 0.0.0.0 --threads 4

FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++
WORKDIR /source
COPY constraints.txt pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY models models
COPY train train
COPY export export
COPY serve serve
# The wheel holds the kernels for every instruction set of this architecture; the server picks one at run time.
RUN PIP_CONSTRAINT=/source/constraints.txt PIP_BUILD_CONSTRAINT=/source/constraints.txt \
    python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS server
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /srv
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["python", "-m", "serve"]

# CUDA comes with torch, from the package index and in the version that torch was built with; of the system only the driver
# is needed (580 or later for CUDA 13). Triton compiles its kernels when they first run: for that a C compiler, and a folder
# that may be written to and executed from. A volume keeps what was compiled for the next container.
FROM server AS gpu
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -r /var/lib/apt/lists
COPY constraints.txt /tmp/
COPY --from=build /wheels /tmp/wheels
RUN python -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /tmp/wheels/*.whl)[gpu,otel]" \
    && rm -r /tmp/wheels /tmp/constraints.txt && install --directory --owner=10001 --group=10001 /cache
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/cache/triton TMPDIR=/cache
VOLUME /cache
USER 10001:10001
CMD ["/bundle", "--host", "0.0.0.0", "--device", "cuda"]

FROM server AS cpu
COPY constraints.txt /tmp/
COPY --from=build /wheels /tmp/wheels
# The wheel by its file name: a package index is asked for its requirements only.
RUN python -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /tmp/wheels/*.whl)[cpu,otel]" \
    && rm -r /tmp/wheels /tmp/constraints.txt
USER 10001:10001
CMD ["/bundle", "--host", "0.0.0.0"]
