"""The rules of suspicion: each one function, in one table with its reason and its default settings.

A rule looks at one message and says what it observed, or None. Scores of all rules that hit are summed; three
thresholds say what a sum means. A new rule is a function and a line in RULES, its reason in `reply`, its schema in the
resource, and a test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec

from mailsluice_relay.config import ConfigurationError, Spam, SpamRule
from mailsluice_relay.envelope import Mailbox
from mailsluice_relay.reply import Reason
from mailsluice_relay.smtp.header import Author, Field
from mailsluice_relay.suspicion import mime
from mailsluice_relay.suspicion.behaviour import Behaviour

BODY_PREFIX: Final = 1024 * 1024
"""Octets of the body that rules see."""


@dataclass(frozen=True)
class Mail:
    """A message as rules see it."""

    fields: Sequence[Field]
    body: bytes
    """At most BODY_PREFIX octets."""
    authors: Sequence[Author]
    owns: Callable[[Mailbox], bool]
    """Whether an address is the sender's own; an author that is not was let through (ownership Log)."""
    recipients: int
    network: str
    """Where the client is; a prefix."""
    now: float
    """Monotonic seconds."""
    behaviour: Behaviour

    @cached_property
    def parts(self) -> Sequence[mime.Part]:
        return tuple(mime.parts(self.fields, self.body))

    @cached_property
    def text(self) -> bytes:
        """All text parts, decoded."""
        return b"\r\n".join(part.decoded(BODY_PREFIX) for part in self.parts if part.content_type.startswith("text/"))


@dataclass(frozen=True, slots=True)
class Hit:
    """A rule that hit, with what it saw and from what on it does; or an engine, by its name."""

    rule: str
    reason: Reason
    score: float
    observed: str
    threshold: str
    is_engine: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    observed: str
    threshold: str = ""


Function = Callable[[Mail, SpamRule], Observation | None]


# --- who is it said to be from --------------------------------------------------------------------------------------

_ADDRESS_IN_TEXT = re.compile(r"([^\s<>\"'(),:;@]{1,64})@((?:[\w-]{1,63}\.)+[^\W\d_]{2,63})")
_SHOWN: Final = 2000
"""Characters of a display name: no program shows more."""


def forged_header_from(mail: Mail, settings: SpamRule) -> Observation | None:
    """A sender of somebody else, or a display name that shows another address than the one that mail came from."""
    for author in mail.authors:
        if not mail.owns(author.mailbox):
            return Observation(f"{author.mailbox} is not the login's")
        shown_part = author.display[:_SHOWN] if "@" in author.display else ""
        for local_part, domain in _ADDRESS_IN_TEXT.findall(shown_part):
            shown = Mailbox(local_part, domain)
            if domain.lower() != author.mailbox.domain.lower() and not mail.owns(shown):
                return Observation(f"{shown} shown for {author.mailbox}")
    return None


# --- how much, and from where ---------------------------------------------------------------------------------------


def recipient_burst(mail: Mail, settings: SpamRule) -> Observation | None:
    """More than `limit` recipients of one identity within `window`."""
    limit, window = _limit_and_window(settings)
    return _over(mail.behaviour.recipients.add(mail.recipients, window, mail.now), "recipients", limit, window)


def new_networks(mail: Mail, settings: SpamRule) -> Observation | None:
    """One identity from more than `limit` networks within `window`: a password that went round."""
    limit, window = _limit_and_window(settings)
    return _over(mail.behaviour.networks.add(mail.network, window, mail.now), "networks", limit, window)


_LOWER = bytes(code + 32 if 65 <= code <= 90 else code for code in range(256))
_VARYING = b"0123456789 \t\r\n"
_SHORT_BODY = 32


def same_body_fan_out(mail: Mail, settings: SpamRule) -> Observation | None:
    """One text to more than `limit` recipients within `window`; digits, blanks and case do not make another text."""
    limit, window = _limit_and_window(settings)
    octets, texts = 0, []
    for part in mail.parts:
        same = part.payload.translate(_LOWER, _VARYING)
        octets += len(same)
        texts.append(hash(same))
    if octets < _SHORT_BODY:  # "test", "OK": sent by many programs again and again
        return None
    # Python's own hash: keyed anew in each process, where all of these counts live, and five times as fast as BLAKE2b.
    count = mail.behaviour.body(hash(tuple(texts)))
    return _over(count.add(mail.recipients, window, mail.now), "recipients of one text", limit, window)


def unknown_recipients(mail: Mail, settings: SpamRule) -> Observation | None:
    """At least `percent` of the recipients within `window` do not exist, of at least `minimum`: a list that was bought.

    What upstreams said of earlier mail; one that bounces later, by a message of its own, is not heard of.
    """
    window = settings.window or 0.0
    unknown = mail.behaviour.unknown.total(window, mail.now)
    if not unknown:
        return None
    settled = mail.behaviour.settled.total(window, mail.now)
    minimum, percent = settings.minimum or 0, settings.percent or 0.0
    if settled < minimum or unknown * 100 < percent * settled:
        return None
    return Observation(f"{unknown} of {settled} recipients unknown", f"{percent:g} % of {minimum} in {window:g} s")


_FEW: Final = 50


def volume_anomaly(mail: Mail, settings: SpamRule) -> Observation | None:
    """More recipients in this hour than in the busiest hour of an identity's usual day, by `deviations`."""
    count = mail.behaviour.volume.add(mail.recipients, mail.now)
    usual = mail.behaviour.volume.usual(settings.deviations or 0.0)
    if usual is None or count <= max(usual, _FEW):
        return None
    return Observation(f"{count} recipients this hour", f"{usual:.0f}")


def _limit_and_window(settings: SpamRule) -> tuple[int, float]:
    if settings.limit is None or settings.window is None:
        raise ConfigurationError("a rule that counts needs limit and window")
    return settings.limit, settings.window


def _over(observed: int, what: str, limit: int, window: float) -> Observation | None:
    return Observation(f"{observed} {what}", f"{limit} in {window:g} s") if observed > limit else None


# --- what is in it --------------------------------------------------------------------------------------------------

SHORTENERS: Final = frozenset(
    {
        *("adf.ly", "bit.do", "bit.ly", "bl.ink", "buff.ly", "clck.ru", "cutt.ly", "goo.gl", "goo.su", "is.gd"),
        *("j.mp", "kutt.it", "lnkd.in", "n9.cl", "ow.ly", "qrco.de", "rb.gy", "rebrand.ly", "s.id", "shorturl.at"),
        *("shorte.st", "surl.li", "t.co", "t.ly", "tiny.cc", "tinyurl.com", "tr.im", "trib.al", "u.to", "urlz.fr"),
        *("v.gd", "vk.cc", "x.co"),
    }
)
"""Hosts that hide where a link goes."""

# Begins with a literal, which `re` finds as fast as bytes.find; the scheme is looked at afterwards.
_HOST_OF_LINK = re.compile(rb"://(?:[^\s/@<>\"']*@)?([A-Za-z0-9.-]{1,253})")
_SCHEMES = (b"http", b"https")


def link_shortener(mail: Mail, settings: SpamRule) -> Observation | None:
    """A link whose host hides where it goes."""
    text = mail.text
    colon = text.find(b":")  # base64 has none, and one octet is found fastest
    for found in _HOST_OF_LINK.finditer(text, colon) if colon >= 0 else ():
        name = found[1].decode("ascii").lower().strip(".").removeprefix("www.")
        if name in SHORTENERS and text[max(0, found.start() - 5) : found.start()].lower().endswith(_SCHEMES):
            return Observation(name)
    return None


EXECUTABLE_EXTENSIONS: Final = frozenset(
    {
        *("ade", "adp", "apk", "appx", "bat", "cab", "chm", "cmd", "com", "cpl", "dll", "exe", "hta", "ins", "isp"),
        *("jar", "js", "jse", "lnk", "mde", "msc", "msi", "msp", "mst", "nsh", "pif", "ps1", "scr", "sct", "shb"),
        *("sys", "vb", "vbe", "vbs", "vxd", "wsc", "wsf", "wsh", "xll"),
    }
)
"""What big receivers refuse as attachment, less disk images."""

_MAGIC: Final = (
    (b"MZ", "Windows executable"),
    (b"\x7fELF", "ELF executable"),
    (b"\xfe\xed\xfa\xce", "Mach-O executable"),
    (b"\xfe\xed\xfa\xcf", "Mach-O executable"),
    (b"\xcf\xfa\xed\xfe", "Mach-O executable"),
)


def executable_attachment(mail: Mail, settings: SpamRule) -> Observation | None:
    """An attachment that runs when it is opened, by its name or its first octets, or one nested out of sight."""
    for part in mail.parts:
        if part.is_too_deep:
            return Observation("nested out of sight", f"{mime.MAXIMUM_DEPTH} levels")
        # Windows ignores dots and blanks at the end of a name.
        _, dot, extension = part.filename.rstrip(". \t").lower().rpartition(".")
        if dot and extension in EXECUTABLE_EXTENSIONS:
            return Observation(f"attachment named .{extension}")
        if not part.content_type.startswith("text/"):
            front = part.decoded(16)
            for magic, kind in _MAGIC:
                if front.startswith(magic):
                    return Observation(kind)
    return None


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    reason: Reason
    function: Function
    defaults: SpamRule


RULES: Final[Mapping[str, Rule]] = {
    "forgedHeaderFrom": Rule(Reason.FORGED_HEADER_FROM, forged_header_from, SpamRule(score=6)),
    "executableAttachment": Rule(Reason.EXECUTABLE_ATTACHMENT, executable_attachment, SpamRule(score=8)),
    "recipientBurst": Rule(Reason.RECIPIENT_BURST, recipient_burst, SpamRule(score=4, limit=200, window=60.0)),
    "newNetworks": Rule(Reason.NEW_NETWORKS, new_networks, SpamRule(score=3, limit=5, window=3600.0)),
    "sameBodyFanOut": Rule(Reason.SAME_BODY_FAN_OUT, same_body_fan_out, SpamRule(score=4, limit=50, window=600.0)),
    "linkShortener": Rule(Reason.LINK_SHORTENER, link_shortener, SpamRule(score=2)),
    "unknownRecipients": Rule(
        Reason.UNKNOWN_RECIPIENTS,
        unknown_recipients,
        SpamRule(score=8, percent=30.0, minimum=20, window=3600.0),
    ),
    "volumeAnomaly": Rule(Reason.VOLUME_ANOMALY, volume_anomaly, SpamRule(score=4, deviations=6.0)),
}
"""Rules by their name in the configuration. With the default `suspectAt` of 5 the first two mark a message alone."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What all rules together say."""

    score: float = 0.0
    hits: tuple[Hit, ...] = ()
    suspected: bool = False
    held: bool = False
    rejected: bool = False

    @property
    def reason(self) -> Reason:
        """Of the rule that weighs most."""
        return max(self.hits, key=lambda hit: hit.score).reason if self.hits else Reason.ACCEPTED


class Judge:
    """The rules of one configuration. Raises ConfigurationError."""

    def __init__(self, spam: Spam) -> None:
        self._spam = spam
        self._rules: list[tuple[str, Rule, SpamRule]] = []
        wanted = spam.rules or {name: rule.defaults for name, rule in RULES.items()}
        for name, settings in wanted.items():
            if name not in RULES:
                raise ConfigurationError(f"spam.rules: there is no rule {name}; known are {', '.join(sorted(RULES))}")
            if settings.score == 0:
                continue
            self._rules.append((name, RULES[name], _completed(settings, RULES[name].defaults)))
        self._unknown = next((settings for name, _, settings in self._rules if name == "unknownRecipients"), None)

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self._rules)

    def learn(self, behaviour: Behaviour, settled: int, unknown: int, now: float) -> None:
        """What came of an identity's recipients."""
        if self._unknown is not None and self._unknown.window is not None:
            behaviour.settled.add(settled, self._unknown.window, now)
            if unknown:
                behaviour.unknown.add(unknown, self._unknown.window, now)

    def opinion(self, mail: Mail) -> Opinion:
        return self.weighed(
            tuple(
                Hit(name, rule.reason, settings.score, observation.observed, observation.threshold)
                for name, rule, settings in self._rules
                if (observation := rule.function(mail, settings)) is not None
            )
        )

    def weighed(self, hits: tuple[Hit, ...]) -> Opinion:
        """What hits together mean: those of rules, and those of engines."""
        score = sum(hit.score for hit in hits)
        rejected = bool(hits) and _reaches(score, self._spam.reject_at)
        held = bool(hits) and _reaches(score, self._spam.hold_at)
        suspected = bool(hits) and _reaches(score, self._spam.suspect_at)
        return Opinion(score, hits, suspected or held or rejected, held and not rejected, rejected)


def _completed(settings: SpamRule, defaults: SpamRule) -> SpamRule:
    """The settings, with the defaults of the rule where they say nothing."""
    given = {name: value for name, value in msgspec.structs.asdict(settings).items() if value is not None}
    return msgspec.structs.replace(defaults, **given)


def _reaches(score: float, threshold: float | None) -> bool:
    return threshold is not None and score >= threshold
