"""Where the shared counts of one configuration are, and how they are used."""

from __future__ import annotations

from dataclasses import dataclass

from mailsluice_relay.config import (
    Configuration,
    ConfigurationError,
    Credentials,
    FailureAction,
    StoreAddress,
    parse_store_url,
)


@dataclass(frozen=True, slots=True)
class Target:
    """Equal targets need no new connection."""

    address: StoreAddress
    authorities: str | None
    """PEM of CAs to trust besides the system's."""
    tag: str
    """Tells this relay's keys from those of others in the same database."""
    on_failure: FailureAction


def target_of(configuration: Configuration, credentials: Credentials) -> Target | None:
    """The store of a configuration; None: there is none. Raises ConfigurationError, which never shows the URL."""
    store = configuration.rate_limit_store
    if store is None:
        return None
    file = f"{store.credentials}.url"
    try:
        address = parse_store_url(credentials.get(file, b""))
    except ConfigurationError as error:
        raise ConfigurationError(f"rateLimitStore: credentials/{file} {error}") from None
    relay = configuration.relay
    return Target(
        address,
        authorities=credentials[store.ca].decode("ascii", "replace") if store.ca is not None else None,
        tag=relay.uid or f"{relay.namespace}/{relay.name}",
        on_failure=store.on_failure,
    )
