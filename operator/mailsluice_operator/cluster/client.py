"""Requests to the API server: each is counted, bounded in time, and repeated when the server or the network failed."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import ApiClient
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.dynamic import DynamicClient

from mailsluice_operator.cluster.objects import EVENT, Kind, Object, Reference, reference_of

FIELD_MANAGER: Final = "mailsluice-operator"
"""The owner of every field that we write, and the start of the user agent, so that both can be found by one word."""

ATTEMPTS: Final = 4
FIRST_RETRY: Final = 0.25
LONGEST_RETRY: Final = 5.0
REQUEST_TIMEOUT: Final = 30.0
PAGE_SIZE: Final = 100
"""Objects a request: what is read at once is what memory grows by, and it never shrinks again."""

APPLY: Final = "application/apply-patch+yaml"
MERGE: Final = "application/merge-patch+json"

READS: Final = frozenset({"get", "list"})
_RETRIED: Final = frozenset({429, 500, 502, 503, 504})
_PASSING: Final = frozenset({401, 404, 408, 409, 429})
"""Refusals that end without anybody changing the request or a policy: a token is renewed, a namespace is being made or
deleted, another write came first, the server has much to do."""

RequestObserver = Callable[[str, str], None]
"""Told (verb, code) of each request; the code is the status, or `error` when no answer came."""


class ApiError(Exception):
    """The API server refused, or did not answer (status 0)."""

    def __init__(self, what: str, status: int, message: str) -> None:
        super().__init__(f"{what}: {message}")
        self.status = status
        self.message = message

    @property
    def permanent(self) -> bool:
        """The same request will be refused again, until a person changes it or what refuses it."""
        return 400 <= self.status < 500 and self.status not in _PASSING


class NotLeaderError(Exception):
    """This process may not write: it does not lead, or has not heard for too long that it still does."""


class NotFoundError(ApiError):
    """The object, or the kind, or the namespace is not there."""


class ConflictError(ApiError):
    """The object is not the one that was meant, or has changed since."""


class InvalidError(ApiError):
    """The API server will never take this body (422, 400)."""


_ERRORS: Final = {404: NotFoundError, 409: ConflictError, 422: InvalidError, 400: InvalidError}


def _explained(error: ApiException) -> str:
    """The `message` of the Status object that the API server answers with, which is the part for people."""
    status = int(error.status or 0)
    body = error.body or ""
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = body[:200] or str(error.reason)
    return f"{status}: {message}"


async def connect(kubeconfig: str | None, user_agent: str) -> ApiClient:
    """A client for the cluster that the kubeconfig names; without one, for the cluster whose pod this is."""
    configuration = kubernetes_client.Configuration()
    if kubeconfig is not None:
        await kubernetes_config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
    else:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    api = ApiClient(configuration)
    api.user_agent = user_agent
    return api


@dataclass(frozen=True)
class ApiCredentials:
    """How a client reaches and convinces the API server, for another client in this process."""

    server: str
    authority_file: str | None
    verify: bool
    token: str | None = field(repr=False)
    certificate_file: str | None
    key_file: str | None
    proxy: str | None


async def credentials_of(api: ApiClient) -> ApiCredentials:
    """As they are now: a ServiceAccount's token is read from its file anew, since it is exchanged every hour."""
    configuration = api.configuration
    authorization = await configuration.get_api_key_with_prefix("BearerToken")
    return ApiCredentials(
        server=configuration.host,
        authority_file=configuration.ssl_ca_cert,
        verify=configuration.verify_ssl,
        token=authorization.removeprefix("Bearer ").removeprefix("bearer ") if authorization else None,
        certificate_file=configuration.cert_file,
        key_file=configuration.key_file,
        proxy=configuration.proxy,
    )


class Cluster:
    """The verbs that the operator needs, on plain dicts."""

    def __init__(
        self,
        api: ApiClient,
        *,
        observe: RequestObserver,
        rng: random.Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        may_write_for: Callable[[], float] = lambda: math.inf,
        attempts: int = ATTEMPTS,
        timeout: float = REQUEST_TIMEOUT,
    ) -> None:
        """`may_write_for` tells in how many seconds at most a write must have ended; not above 0: it may not begin."""
        self._api = api
        self._dynamic = DynamicClient(api)  # not awaited: that would discover, and the paths are known
        self._observe = observe
        self._rng = rng
        self._sleep = sleep
        self._may_write_for = may_write_for
        self._attempts = attempts
        self._timeout = timeout

    async def close(self) -> None:
        await self._api.close()

    async def get(self, where: Reference) -> Object | None:
        """The object, or None when it is not there."""
        try:
            return await self._request("get", str(where), where.kind.path(where.namespace, where.name))
        except NotFoundError:
            return None

    async def pages(
        self, kind: Kind, namespace: str | None = None, label_selector: str | None = None
    ) -> AsyncIterator[tuple[list[Object], int]]:
        """All objects of a kind, a page at a time, with the resourceVersion at which they were so."""
        following: str | None = None
        while True:
            query: dict[str, str] = {"limit": str(PAGE_SIZE)}
            if label_selector is not None:
                query["labelSelector"] = label_selector
            if following is not None:
                query["continue"] = following
            page = await self._request("list", kind.plural, kind.path(namespace), query=query)
            # Items of a list come without what the list says once.
            items = [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in page.get("items") or ()]
            yield items, int(page["metadata"]["resourceVersion"])
            following = page["metadata"].get("continue")
            if not following:
                return

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server knows the kind."""
        try:
            group = await self._request("get", kind.api_version, f"/apis/{kind.api_version}")
        except NotFoundError:
            return False
        return any(resource["name"] == kind.plural for resource in group["resources"])

    async def apply(self, body: Object) -> Object:
        """Server-side apply. A controller forces: its fields are its own, and what others set beside them stays."""
        return await self._apply(body, None)

    async def create(self, body: Object) -> Object:
        """Make an object that is not there yet (else ConflictError)."""
        where = reference_of(body)
        return await self._request("create", str(where), where.kind.path(where.namespace), body=body)

    async def update(self, body: Object) -> Object:
        """Replace an object, unless it has changed since its resourceVersion (ConflictError)."""
        where = reference_of(body)
        return await self._request("update", str(where), where.kind.path(where.namespace, where.name), body=body)

    async def apply_status(self, body: Object) -> Object:
        """Server-side apply of the status; the body needs nothing of the spec."""
        return await self._apply(body, "status")

    async def _apply(self, body: Object, subresource: str | None) -> Object:
        where = reference_of(body)
        return await self._request(
            "apply",
            str(where),
            where.kind.path(where.namespace, where.name, subresource),
            query={"fieldManager": FIELD_MANAGER, "force": "true"},
            body=body,
            content_type=APPLY,
        )

    async def annotate(self, where: Reference, annotations: Mapping[str, str | None]) -> Object:
        """Set annotations, or take them off (None)."""
        return await self._merge(where, {"metadata": {"annotations": dict(annotations)}})

    async def set_replicas(self, body: Object, replicas: int) -> Object:
        """Set spec.replicas, unless the object has changed since it was read (ConflictError)."""
        version = body["metadata"]["resourceVersion"]
        return await self._merge(
            reference_of(body), {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
        )

    async def set_ports(self, body: Object, ports: list[Object]) -> Object:
        """Replace a Service's ports, unless it has changed since it was read (ConflictError).

        Server-side apply merges them by port and protocol: it takes away no port that somebody else added.
        """
        version = body["metadata"]["resourceVersion"]
        return await self._merge(
            reference_of(body), {"metadata": {"resourceVersion": version}, "spec": {"ports": ports}}
        )

    async def set_finalizers(self, body: Object, finalizers: list[str]) -> Object:
        """Replace the finalizers, unless the object has changed since it was read (ConflictError)."""
        metadata = body["metadata"]
        patch = {"metadata": {"finalizers": finalizers, "resourceVersion": metadata["resourceVersion"]}}
        return await self._merge(reference_of(body), patch)

    async def _merge(self, where: Reference, patch: Object) -> Object:
        return await self._request(
            "patch",
            str(where),
            where.kind.path(where.namespace, where.name),
            query={"fieldManager": FIELD_MANAGER},
            body=patch,
            content_type=MERGE,
        )

    async def delete(self, where: Reference, uid: str) -> None:
        """Delete this very object; that it is gone already is as good."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        body["propagationPolicy"] = "Background"
        try:
            await self._request("delete", str(where), where.kind.path(where.namespace, where.name), body=body)
        except NotFoundError:
            return

    async def post_event(self, about: Object, *, kind: str, reason: str, message: str, at: str) -> None:
        """An Event (core/v1) about an object; `kind` is Normal or Warning, `at` the time in RFC 3339."""
        regarding = reference_of(about)
        metadata = about["metadata"]
        body = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"generateName": f"{regarding.name[:200]}.", "namespace": regarding.namespace},
            "involvedObject": {
                "apiVersion": regarding.kind.api_version,
                "kind": regarding.kind.name,
                "namespace": regarding.namespace,
                "name": regarding.name,
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
            "type": kind,
            "reason": reason,
            "message": message[:1024],
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }
        await self._request("create", f"Event about {regarding}", EVENT.path(regarding.namespace), body=body)

    async def _request(
        self,
        verb: str,
        what: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str | None = None,
    ) -> Object:
        attempt = 1
        while True:
            try:
                return await self._once(verb, path, query or {}, body, content_type)
            except ApiException as error:
                status = int(error.status or 0)
                self._observe(verb, str(status))
                failure = _ERRORS.get(status, ApiError)(what, status, _explained(error))
                if status not in _RETRIED or attempt == self._attempts:
                    raise failure from error
                retry_after = (error.headers or {}).get("Retry-After")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._observe(verb, "error")
                if attempt == self._attempts:
                    text = str(error) or type(error).__name__
                    raise ApiError(what, 0, f"the API server did not answer: {text}") from error
                retry_after = None
            await self._sleep(self._pause(attempt, retry_after))
            attempt += 1

    def _pause(self, attempt: int, retry_after: str | None) -> float:
        if retry_after is not None and retry_after.isdigit():
            return min(float(retry_after), LONGEST_RETRY)
        ceiling: float = min(FIRST_RETRY * 2**attempt, LONGEST_RETRY)
        return ceiling * (0.5 + 0.5 * self._rng.random())

    async def _once(
        self, verb: str, path: str, query: Mapping[str, str], body: Object | None, content_type: str | None
    ) -> Object:
        method = {"list": "get", "apply": "patch", "create": "post", "update": "put"}.get(verb, verb)
        timeout = self._timeout
        if verb not in READS:
            left = self._may_write_for()
            if left <= 0:
                raise NotLeaderError(f"{verb} {path}: this process does not lead any more")
            timeout = min(timeout, left)
        async with asyncio.timeout(timeout):
            response: aiohttp.ClientResponse = await self._dynamic.request(
                method,
                path,
                body=body,
                query_params=list(query.items()),
                content_type=content_type,
                serialize=False,
            )
            answer: Object = await response.json()
        self._observe(verb, str(response.status))
        return answer
