"""The command `mailsluice-operator`."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from mailsluice_operator.app.process import Options, run
from mailsluice_operator.children.workload import PodSettings

command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@command.command()
def serve(
    relay_image: Annotated[
        str,
        typer.Option(
            envvar="MAILSLUICE_RELAY_IMAGE",
            help="Image of the relay pods, of the same release as this operator. A relay's spec.image overrides it, "
            "if it is allowed.",
        ),
    ],
    allowed_relay_image: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MAILSLUICE_ALLOWED_RELAY_IMAGES",
            help="What a relay's spec.image may be; * stands for any text; may be repeated. Left out: --relay-image "
            "alone.",
        ),
    ] = None,
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MAILSLUICE_NAMESPACES",
            help="Watch this namespace alone; may be repeated. A Role in each is then enough. Left out: the whole "
            "cluster, which needs the ClusterRole.",
        ),
    ] = None,
    relay_bind: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MAILSLUICE_RELAY_BIND",
            help="Address that relay pods listen on; may be repeated. Left out: 0.0.0.0, or :: in a cluster whose "
            "Services have IPv6 addresses.",
        ),
    ] = None,
    lease_namespace: Annotated[
        str | None,
        typer.Option(
            envvar="MAILSLUICE_LEASE_NAMESPACE",
            help="Namespace of the Lease by which one of several processes leads. Left out: there is no election, and "
            "this must be the only process.",
        ),
    ] = None,
    lease_name: Annotated[
        str, typer.Option(envvar="MAILSLUICE_LEASE_NAME", help="Name of that Lease; the same for all that take turns.")
    ] = "mailsluice-operator",
    http_host: Annotated[str, typer.Option(help="Address of /metrics, /healthz and /readyz.")] = "0.0.0.0",  # noqa: S104 - as Options.http_host
    http_port: Annotated[int, typer.Option(help="Port of /metrics, /healthz and /readyz.")] = 8080,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Reconciles that run at the same time.")] = 8,
    log_level: Annotated[str, typer.Option(help="Debug, Info, Warning or Error.")] = "Info",
) -> None:
    """Turn SmtpRelay and SmtpUser resources into running relays.

    In a pod it uses the pod's ServiceAccount. Elsewhere set KUBECONFIG, for example to try it out:

        KUBECONFIG=~/.kube/config mailsluice-operator --relay-image localhost/mailsluice-relay:dev --namespace mail

    Of several processes with one Lease (--lease-namespace) one leads and the others wait for it to end.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s %(message)s")
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # one line an event otherwise
    run(
        Options(
            pods=PodSettings(
                image=relay_image,
                bind=tuple(relay_bind or _default_bind()),
                allowed_images=tuple(allowed_relay_image or ()),
            ),
            namespaces=tuple(namespace or ()),
            kubeconfig=os.environ.get("KUBECONFIG") or None,
            http_host=http_host,
            http_port=http_port,
            workers=workers,
            lease=(lease_namespace, lease_name) if lease_namespace else None,
        )
    )


def _default_bind() -> tuple[str, ...]:
    """The family of the API server's Service is the cluster's first."""
    return ("::",) if ":" in os.environ.get("KUBERNETES_SERVICE_HOST", "") else PodSettings(image="").bind


def main() -> None:
    command()
