"""What the models are written with: base classes, CEL rules, list kinds, and the scalar types that many fields share.

A field's docstring is its description in the CustomResourceDefinition. A rule of one object stands in its `RULES`; a
rule of one list or scalar stands in the field's `Meta` by `rules(...)`. CEL is the only source of rules beyond the
schema: the API server evaluates it, and `validation` evaluates the same text offline.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

Reason = Literal["FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired"]
"""What kind of error a broken rule is. FieldValueDuplicate is left out: the API server drops its message."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One item of x-kubernetes-validations. The message names the field and says what to do."""

    rule: str
    message: str
    field_path: str | None = None
    """Where the error is shown, relative to the object that has the rule: `.holdAt`."""
    reason: Reason | None = None
    optional_old_self: bool = False
    """The rule reads `oldSelf`, and holds for a creation too (then `oldSelf.hasValue()` is false)."""

    def to_schema(self) -> dict[str, Any]:
        item: dict[str, Any] = {"rule": self.rule, "message": self.message}
        if self.field_path is not None:
            item["fieldPath"] = self.field_path
        if self.reason is not None:
            item["reason"] = self.reason
        if self.optional_old_self:
            item["optionalOldSelf"] = True
        return item


class Struct(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """Immutable; an unknown field is an error, so that a field of a newer release is never silently ignored."""

    RULES: ClassVar[tuple[Rule, ...]] = ()


class TolerantStruct(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """For what others write as well (metadata) or what a newer operator may have written (status)."""

    RULES: ClassVar[tuple[Rule, ...]] = ()


def rules(*items: Rule) -> Meta:
    """Rules of one list or scalar."""
    return Meta(extra_json_schema={"x-kubernetes-validations": [item.to_schema() for item in items]})


def list_map(*keys: str) -> Meta:
    """A list whose items these fields tell apart: repetitions are refused, and server-side apply merges by them."""
    return Meta(extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)})


SET = Meta(extra_json_schema={"x-kubernetes-list-type": "set"})
ATOMIC = Meta(extra_json_schema={"x-kubernetes-list-type": "atomic"})

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN_PATTERN = rf"^{LABEL}(\.{LABEL})*$"
_DOMAIN = r"[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?(\.[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?)*"
DOMAIN_PATTERN = rf"^(\*\.)?{_DOMAIN}$"
"""Of ASCII, internationalised names in A-labels (xn--): what looks alike must not be taken for the same."""
ADDRESS_PATTERN = rf"^[!-?A-~]+@{_DOMAIN}$"
OPTIONAL_ADDRESS_PATTERN = rf"^([!-?A-~]+@{_DOMAIN})?$"
SENDER_PATTERN = rf"^(<>|\*@(\*\.)?{_DOMAIN}|[^@*\s\x00-\x1f\x7f]+@{_DOMAIN})$"
"""No pattern that the relay could not read passes: one SmtpUser's would keep everybody's configuration from it."""
LOGIN_PATTERN = rf"^[!#-)+-9;-?A-\[\]-~]+(@{_DOMAIN})?$"
"""ASCII without the colon of htpasswd, the star of patterns, and quotes and backslashes, by which one address has
several spellings and two logins could be the same sender."""
DURATION_PATTERN = r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"
"""The form of the Gateway API (GEP-2257): `48h`, `1h30m`, `500ms`."""
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|K|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)?(k|K|M|G|T|Ki|Mi|Gi|Ti)?$"

PATTERN_REMEDIES: Final = {
    DURATION_PATTERN: "write it like 90s, 10m, 48h or 1h30m",
    QUANTITY_PATTERN: "write it like 500m, 2G or 25Mi",
    SIZE_PATTERN: "write it like 1000000, 2G or 25Mi",
    SENDER_PATTERN: "write it like shop@example.com, *@example.com, *@*.example.com or <>",
    ADDRESS_PATTERN: "write it like shop@example.com",
    OPTIONAL_ADDRESS_PATTERN: "write it like shop@example.com",
    LOGIN_PATTERN: "write it like shop@example.com",
    DOMAIN_PATTERN: "write it like example.com or *.example.com",
    SUBDOMAIN_PATTERN: "use lower-case letters, digits, hyphens and dots",
}
"""What to say to somebody whose text does not match."""


def well_formed(*fields: str) -> str:
    """CEL for: these durations have the right form. A rule asks first: a wrong form does not keep it from running."""
    return " && ".join(f"{field}.matches('{DURATION_PATTERN}')" for field in fields)


POSITIVE_DURATION = rules(
    Rule(f"!({well_formed('self')}) || duration(self) > duration('0s')", "must be longer than 0s")
)

# Names of Kubernetes objects, and of items in our lists.
ObjectName = Annotated[str, Meta(min_length=1, max_length=253, pattern=SUBDOMAIN_PATTERN)]
NamespaceName = Annotated[str, Meta(min_length=1, max_length=63, pattern=rf"^{LABEL}$")]
SecretKey = Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
ItemName = Annotated[str, Meta(min_length=1, max_length=63, pattern=rf"^{LABEL}$")]
Port = Annotated[int, Meta(ge=1, le=65535)]

# Mail.
Hostname = Annotated[str, Meta(min_length=1, max_length=253, pattern=SUBDOMAIN_PATTERN)]
DomainPattern = Annotated[str, Meta(min_length=1, max_length=255, pattern=DOMAIN_PATTERN)]
Address = Annotated[str, Meta(min_length=3, max_length=320, pattern=ADDRESS_PATTERN)]
SenderPattern = Annotated[str, Meta(min_length=2, max_length=320, pattern=SENDER_PATTERN)]
Network = Annotated[str, Meta(min_length=2, max_length=43)]

# Quantities. The parsers are in `quantities`.
Duration = Annotated[str, Meta(min_length=2, max_length=32, pattern=DURATION_PATTERN), POSITIVE_DURATION]
Positive = Annotated[int, Meta(ge=1, le=2_147_483_647)]
Size = Annotated[int, Meta(ge=1)] | Annotated[str, Meta(max_length=24, pattern=SIZE_PATTERN)]
Quantity = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(max_length=24, pattern=QUANTITY_PATTERN)]
Score = Annotated[float, Meta(ge=0, le=1000)]

IS_NETWORK = Rule(
    "self.all(network, isCIDR(network))",
    "must be networks in CIDR notation, such as 192.0.2.0/24 or 2001:db8::/32; write a single address as 192.0.2.1/32",
)
HAS_NO_HOST_BITS = Rule(
    "self.all(network, !isCIDR(network) || cidr(network) == cidr(network).masked())",
    "networks must have no bits set beyond their prefix: write 10.0.0.0/8, or 10.0.0.1/32 for one address",
)
Networks = Annotated[tuple[Network, ...], Meta(max_length=64), SET, rules(IS_NETWORK, HAS_NO_HOST_BITS)]
Senders = Annotated[tuple[SenderPattern, ...], Meta(max_length=256), SET]
Domains = Annotated[tuple[DomainPattern, ...], Meta(max_length=256), SET]
Labels = Annotated[dict[str, Annotated[str, Meta(max_length=63)]], Meta(max_length=64)]
Annotations = Annotated[dict[str, Annotated[str, Meta(max_length=4096)]], Meta(max_length=64)]
