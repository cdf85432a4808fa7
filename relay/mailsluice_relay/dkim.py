"""DKIM signatures (RFC 6376) with RSA and Ed25519 (RFC 8301, RFC 8463). Pure: time is an argument.

A message is signed for the domain of its header From, with every key configured for it, relaxed/relaxed, once all other
work on the header is done. The body is read once, in the pieces that it comes in, and never held.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import idna
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mailsluice_relay.config import Configuration, ConfigurationError, Credentials
from mailsluice_relay.envelope import Content
from mailsluice_relay.smtp import header
from mailsluice_relay.smtp.header import Field

SMALLEST_RSA_KEY: Final = 1024
"""Bits (RFC 8301 section 3.2); 2048 are recommended there."""

SEALED: Final = ("from", "reply-to", "to", "cc", "subject")
"""Fields that are signed once more often than they are there, so that nobody can add one (RFC 6376 section 8.15)."""
SIGNED: Final = frozenset(
    {
        *SEALED,
        *("sender", "in-reply-to", "references", "mime-version", "content-type", "content-transfer-encoding"),
        *("resent-date", "resent-from", "resent-sender", "resent-to", "resent-cc", "resent-message-id"),
        *("list-id", "list-help", "list-subscribe", "list-post", "list-owner", "list-archive"),
        *("list-unsubscribe", "list-unsubscribe-post"),  # RFC 8058 section 4 wants these two signed
    }
)
"""Fields that are signed as they are (RFC 6376 section 5.4.1). Date and Message-ID are not: Amazon SES writes its own,
and tells its customers to leave them out."""

_BLANKS = re.compile(rb"[ \t]{2,}|\t")
_LINE: Final = 72
"""Characters of a line of the field that we write."""
_EMPTY_LINES: Final = b"\r\n" * 1024


class BodyHash:
    """The SHA-256 of a body in the relaxed form (RFC 6376 section 3.4.4), fed in pieces that may be cut anywhere."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._open = b""
        """The end of what came, as far as its meaning hangs on what follows: a blank, a CR."""
        self._line_ends = 0
        """CRLFs that count only if something follows them."""
        self._is_empty = True

    def update(self, data: bytes) -> None:
        relaxed = _BLANKS.sub(b" ", self._open + data).replace(b" \r\n", b"\r\n")
        content = relaxed.rstrip(b" \r\n")
        rest = relaxed[len(content) :]
        ends = rest.count(b"\r\n")
        if content:
            self._end_lines()
            self._hash.update(content)
            self._is_empty = False
        self._line_ends += ends
        self._open = rest[2 * ends :]

    def _end_lines(self) -> None:
        for start in range(0, self._line_ends, 1024):
            self._hash.update(_EMPTY_LINES[: 2 * (self._line_ends - start)])
        self._line_ends = 0

    def digest(self) -> bytes:
        """Of everything, with the CRLF that ends the last line. An empty body stays empty."""
        if not self._is_empty:
            self._hash.update(b"\r\n")
        return self._hash.digest()


@dataclass(frozen=True, slots=True)
class Key:
    domain: str
    selector: str
    private: RSAPrivateKey | Ed25519PrivateKey

    @property
    def algorithm(self) -> str:
        return "rsa-sha256" if isinstance(self.private, RSAPrivateKey) else "ed25519-sha256"

    def sign(self, digest: bytes) -> bytes:
        if isinstance(self.private, RSAPrivateKey):
            return self.private.sign(digest, PKCS1v15(), Prehashed(SHA256()))
        return self.private.sign(digest)  # RFC 8463 section 3: of the digest, not of the text


class Signer:
    """The keys of one configuration."""

    def __init__(self, configuration: Configuration, credentials: Credentials) -> None:
        """Raises ConfigurationError."""
        keys: defaultdict[str, list[Key]] = defaultdict(list)
        for index, wanted in enumerate(configuration.dkim):
            domain = _ascii(wanted.domain)
            private = _private_key(f"dkim[{index}].key", wanted.key, credentials)
            keys[domain].append(Key(domain, wanted.selector, private))
        self._keys: Mapping[str, Sequence[Key]] = dict(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def keys_for(self, content: Content) -> Sequence[Key]:
        """The keys that this message is to be signed with: of the first author whose domain has any."""
        try:
            fields = header.parse(content.header)
            authors = header.authors((f for f in fields if f.key == "from"), internationalized=True)
        except header.HeaderError:  # admission lets none through; and what cannot be read has no author to vouch for
            return ()
        return next((keys for a in authors if (keys := self._keys.get(_ascii(a.mailbox.domain)))), ())


def signed(content: Content, keys: Sequence[Key], *, now: float) -> Content:
    """The content with a signature by each of the keys on top of its header. Reads the whole body."""
    body = BodyHash()
    for chunk in content.body.chunks():
        body.update(chunk)
    fields = header.parse(content.header)
    body_hash = base64.b64encode(body.digest()).decode()
    signatures = b"".join(_signature(key, fields, body_hash, int(now)) for key in keys)
    return Content(signatures + content.header, content.body)


def _signature(key: Key, fields: Sequence[Field], body_hash: str, now: int) -> bytes:
    names = [*SEALED, *(field.key for field in fields if field.key in SIGNED)]
    tags = (
        f"v=1; a={key.algorithm}; c=relaxed/relaxed; d={key.domain};",
        f"s={key.selector}; t={now};",
        *_folded("h=", names, ":"),
        f"bh={body_hash};",
        "b=",
    )
    unsigned = "DKIM-Signature: " + "\r\n\t".join(tags)
    digest = hashlib.sha256()
    for field in _selected(fields, names):
        digest.update(_relaxed(field.key, field.value) + b"\r\n")
    # The field itself comes last, with an empty b= and without CRLF (RFC 6376 section 3.7).
    digest.update(_relaxed("dkim-signature", unsigned.partition(":")[2].encode()))
    text = base64.b64encode(key.sign(digest.digest())).decode()
    lines = "\r\n\t".join(text[start : start + _LINE] for start in range(0, len(text), _LINE))
    return f"{unsigned}{lines}\r\n".encode()


def _selected(fields: Sequence[Field], names: Iterable[str]) -> Iterator[Field]:
    """For each name the next field from below (RFC 6376 section 5.4.2); none where there are no more."""
    left: dict[str, list[Field]] = {}
    for field in fields:
        left.setdefault(field.key, []).append(field)
    for name in names:
        if left.get(name):
            yield left[name].pop()


def _relaxed(key: str, value: bytes) -> bytes:
    """RFC 6376 section 3.4.2, without the CRLF."""
    return key.encode() + b":" + _BLANKS.sub(b" ", value.replace(b"\r\n", b"")).strip(b" ")


def _folded(start: str, words: Iterable[str], separator: str) -> Iterator[str]:
    """The words in lines of bounded length; folding is allowed beside the colons of h= (RFC 6376 section 3.5)."""
    line = start
    for number, word in enumerate(words):
        if number:
            line += separator
            if len(line) + len(word) >= _LINE:
                yield line
                line = ""
        line += word
    yield f"{line};"


def _ascii(domain: str) -> str:
    """A domain as DNS has it, to compare and for d=."""
    if domain.isascii():
        return domain.lower()
    try:
        return idna.encode(domain, uts46=True).decode()
    except idna.IDNAError:
        return domain


def _private_key(field: str, file: str, credentials: Credentials) -> RSAPrivateKey | Ed25519PrivateKey:
    raw = credentials.get(file)
    if raw is None:
        raise ConfigurationError(f"{field}: the file {file} is missing from the credentials")
    try:
        key = load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it wants a password
        raise ConfigurationError(f"{field}: {file} holds no PEM private key without a password") from error
    if isinstance(key, Ed25519PrivateKey) or (isinstance(key, RSAPrivateKey) and key.key_size >= SMALLEST_RSA_KEY):
        return key
    raise ConfigurationError(f"{field}: {file} is neither RSA of at least {SMALLEST_RSA_KEY} bits nor Ed25519")
