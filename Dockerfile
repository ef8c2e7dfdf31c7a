# The CPU server: `docker build -t fanin .`, then
#   docker run --rm --read-only -p 8000:8000 -v "$PWD/bundle:/bundle:ro" fanin
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

FROM python:3.11-slim-bookworm
COPY constraints.txt /tmp/
COPY --from=build /wheels /tmp/wheels
# The wheel by its file name: a package index is asked for its requirements only.
RUN python -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /tmp/wheels/*.whl)[cpu]" \
    && rm -r /tmp/wheels /tmp/constraints.txt
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
USER 10001:10001
WORKDIR /srv
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["python", "-m", "serve"]
CMD ["/bundle", "--host", "0.0.0.0"]
