# The image of the API, the dispatcher and the migrations: no torch, no numpy, no Pillow. From the repository's root:
#
#   docker build --file deploy/docker/api.Dockerfile --tag upscaled-api .

# The Python that the tests run on.
FROM python:3.11-slim-trixie AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# Dependencies come with an empty project, which is then taken out again: their layer stays the same until one of these
# files changes, however often our code does.
FROM base AS dependencies
WORKDIR /src
RUN python -m venv --without-pip /opt/upscaled && mkdir api cli core db migrations worker
COPY constraints.txt pyproject.toml LICENSE README.md ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/upscaled/bin/python install --constraint constraints.txt . \
    && pip --python /opt/upscaled/bin/python uninstall --yes upscaled

FROM base AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /dist .

FROM base
# The numbers are the same in both images: the volume of the storage folder belongs to whoever mounts it first.
RUN groupadd --gid 10001 upscaled \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --shell /usr/sbin/nologin upscaled \
    && install --directory --owner=10001 --group=10001 /var/lib/upscaled/storage
COPY --from=dependencies /opt/upscaled /opt/upscaled
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip --python /opt/upscaled/bin/python install --no-cache-dir --no-index --no-deps /dist/*.whl
# Compiled above; when the processes run the files are not theirs to write. Libraries look for their caches at home.
ENV PATH=/opt/upscaled/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /var/lib/upscaled
# A number, so that Kubernetes can see that it is not root's.
USER 10001:10001
EXPOSE 8000
CMD ["upscaled", "api", "--host", "0.0.0.0", "--port", "8000"]
