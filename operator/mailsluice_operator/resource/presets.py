"""Upstream presets: what a provider's name stands for.

Adding a provider is one line of `PRESETS`; the enumeration in the CustomResourceDefinition, the CEL rules about regions
and the documentation follow from the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from mailsluice_relay.config import UpstreamTLSMode

OAUTH_MECHANISMS: Final = ("XOAUTH2", "OAUTHBEARER")
_PASSWORD: Final = ("PLAIN", "LOGIN")
_PASSWORD_OR_OAUTH: Final = ("XOAUTH2", "PLAIN", "LOGIN")
_OAUTH: Final = ("XOAUTH2",)


@dataclasses.dataclass(frozen=True)
class Preset:
    host: str
    """`{region}` in it makes the upstream's `region` required."""
    port: int = 587
    tls: UpstreamTLSMode = UpstreamTLSMode.START_TLS
    mechanisms: tuple[str, ...] = _PASSWORD
    """SASL mechanisms, best first; those that need OAuth are used when the Secret holds an OAuth grant."""
    regions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Hosts of regions that may be chosen; left out, `host` stands."""
    spf: str | None = None
    """What a sender domain's SPF record includes; None where domains of one's own are not sent for."""

    @property
    def needs_region(self) -> bool:
        return "{region}" in self.host

    @property
    def takes_region(self) -> bool:
        return self.needs_region or bool(self.regions)

    @property
    def is_oauth_only(self) -> bool:
        return set(self.mechanisms) <= set(OAUTH_MECHANISMS)

    def host_of(self, region: str | None) -> str | None:
        """The host name to connect to; None when the region is missing or none of this provider."""
        if self.needs_region:
            return self.host.format(region=region) if region else None
        return self.regions.get(region) if region else self.host


PRESETS: Final[Mapping[str, Preset]] = {
    # https://docs.aws.amazon.com/ses/latest/dg/smtp-connect.html
    "AmazonSES": Preset("email-smtp.{region}.amazonaws.com", spf="amazonses.com"),
    # https://support.google.com/mail/answer/7126229 (an app password, or XOAUTH2)
    "Gmail": Preset("smtp.gmail.com", mechanisms=_PASSWORD_OR_OAUTH, spf="_spf.google.com"),
    # https://help.yahoo.com/kb/SLN4724.html (an app password)
    "Yahoo": Preset("smtp.mail.yahoo.com", 465, UpstreamTLSMode.IMPLICIT_TLS),
    # https://yandex.com/support/yandex-360/customers/mail/en/mail-clients/others (an app password)
    "Yandex": Preset("smtp.yandex.com", 465, UpstreamTLSMode.IMPLICIT_TLS, spf="_spf.yandex.net"),
    # https://help.mail.ru/mail/mailer/popsmtp (an app password)
    "MailRu": Preset("smtp.mail.ru", 465, UpstreamTLSMode.IMPLICIT_TLS, spf="_spf.mail.ru"),
    # https://support.microsoft.com/office/d088b986-291d-42b8-9564-9c414e2aa040 (passwords ended in 2024)
    "Outlook": Preset("smtp-mail.outlook.com", mechanisms=_OAUTH),
    # https://learn.microsoft.com/exchange/mail-flow-best-practices/how-to-set-up-a-multifunction-device-or-application
    "Microsoft365": Preset("smtp.office365.com", mechanisms=_OAUTH, spf="spf.protection.outlook.com"),
    # https://www.twilio.com/docs/sendgrid/for-developers/sending-email/integrating-with-the-smtp-api (user `apikey`)
    "SendGrid": Preset("smtp.sendgrid.net", regions={"eu": "smtp.eu.sendgrid.net"}, spf="sendgrid.net"),
    # https://documentation.mailgun.com/docs/mailgun/user-manual/sending-messages/send-smtp
    "Mailgun": Preset("smtp.mailgun.org", regions={"eu": "smtp.eu.mailgun.org"}, spf="mailgun.org"),
    # https://postmarkapp.com/developer/user-guide/send-email-with-smtp
    "Postmark": Preset("smtp.postmarkapp.com", spf="spf.mtasv.net"),
}
