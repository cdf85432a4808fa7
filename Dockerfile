# Two images from one file: `--target relay` and `--target operator`.
#
# BASE_IMAGE is any image with Debian's layout and Python 3.11 or newer including venv. `tools/build-images` makes one
# where no image registry can be reached. Where packages come from is the builder's business: a pip.conf given as the
# secret `pip` is used while building and is in no layer.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What installs is apart from what is installed: /opt/mailsluice has no pip. What changes seldom comes first.
FROM ${BASE_IMAGE} AS tools
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/mailsluice

FROM tools AS wheel
COPY requirements-build.lock ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    tools/bin/pip install --require-hashes --only-binary :all: --requirement requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY relay relay
COPY operator operator
# What builds the wheel is there already, and nothing else may be fetched.
RUN tools/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir wheel .

FROM tools AS relay-tree
COPY requirements-relay.lock ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    tools/bin/pip --python /opt/mailsluice/bin/python install --require-hashes --only-binary :all: \
        --requirement requirements-relay.lock
COPY --from=wheel /build/wheel wheel
# The relay knows neither Kubernetes nor the operator: of the wheel only its own half stays.
RUN tools/bin/pip --python /opt/mailsluice/bin/python install --no-deps --no-index wheel/*.whl \
    && rm -r /opt/mailsluice/lib/python3*/site-packages/mailsluice_operator \
    && rm /opt/mailsluice/bin/mailsluice /opt/mailsluice/bin/kubectl-mailsluice /opt/mailsluice/bin/mailsluice-operator

FROM tools AS operator-tree
COPY requirements-operator.lock ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    tools/bin/pip --python /opt/mailsluice/bin/python install --require-hashes --only-binary :all: \
        --requirement requirements-operator.lock
COPY --from=wheel /build/wheel wheel
RUN tools/bin/pip --python /opt/mailsluice/bin/python install --no-deps --no-index wheel/*.whl

FROM ${BASE_IMAGE} AS runtime
# Nothing that runs installs anything: pip goes, where the base image brings it, and so do ensurepip's bundles.
RUN rm -rf /usr/local/lib/python3*/site-packages/* /usr/local/bin/pip* /usr/local/bin/wheel \
        /usr/local/lib/python3*/ensurepip /usr/lib/python3*/ensurepip /usr/share/python-wheels \
    # Programs that ask for their user's name get one.
    && echo 'nonroot:x:65532:65532:nonroot:/:/usr/sbin/nologin' >>/etc/passwd \
    && echo 'nonroot:x:65532:' >>/etc/group
ENV PATH=/opt/mailsluice/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, because `runAsNonRoot` cannot be checked against a name. It owns nothing: the root may be read-only.
USER 65532:65532
WORKDIR /
LABEL org.opencontainers.image.title="Mailsluice" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="The Mailsluice authors"

FROM runtime AS relay
LABEL org.opencontainers.image.description="Authenticated, rate-limited outgoing SMTP relay"
COPY --from=relay-tree /opt/mailsluice /opt/mailsluice
# SMTP with STARTTLS, implicit TLS, submission, and the HTTP of metrics and probes.
EXPOSE 2025 2465 2587 9090
ENTRYPOINT ["mailsluice-relay"]

FROM runtime AS operator
LABEL org.opencontainers.image.description="Kubernetes operator that runs Mailsluice relays"
COPY --from=operator-tree /opt/mailsluice /opt/mailsluice
# The HTTP of metrics and probes.
EXPOSE 8080
ENTRYPOINT ["mailsluice-operator"]
