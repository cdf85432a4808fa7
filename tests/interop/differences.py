"""Writes docs/dialogue-differences.md: where the reply classes of Postfix, Exim and OpenSMTPD are not Mailsluice's.

    .venv/bin/python tests/interop/differences.py        after tools/interop-servers, as root

What the servers answered comes from playing the dialogues now, why it differs from the dialogues' `Why` lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import corpus
import servers
from corpus import Dialogue, Expect
from player import Answer, play

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "dialogue-differences.md"
NAMES: Final = {"postfix": "Postfix", "exim": "Exim", "opensmtpd": "OpenSMTPD"}


@dataclass(frozen=True)
class Difference:
    """The first reply of another class than Mailsluice's."""

    dialogue: Dialogue
    server: str
    said: str
    """What the client had said."""
    expected: Expect
    answer: Answer


@dataclass(frozen=True)
class Comparison:
    """One server's answers to all dialogues that it can play."""

    server: str
    version: str
    played: int
    differences: tuple[Difference, ...]


def compare(name: str, certificates: servers.Certificates, dialogues: Sequence[Dialogue]) -> Comparison:
    """Raises servers.UnavailableError."""
    with servers.FOREIGN[name](certificates) as server:
        playable = [dialogue for dialogue in dialogues if not dialogue.alone and server.plays(dialogue)]
        found = [_difference(dialogue, server) for dialogue in playable]
    return Comparison(name, servers.version(name), len(playable), tuple(each for each in found if each is not None))


def compare_all(dialogues: Sequence[Dialogue]) -> dict[str, Comparison]:
    """All servers at once: most of the time goes by in waiting. Raises servers.UnavailableError."""
    certificates = servers.Certificates.make()
    with ThreadPoolExecutor(len(servers.FOREIGN)) as pool:
        pending = {name: pool.submit(compare, name, certificates, dialogues) for name in servers.FOREIGN}
        return {name: future.result() for name, future in pending.items()}


def _difference(dialogue: Dialogue, server: servers.Server) -> Difference | None:
    played = play(dialogue, server.addresses[dialogue.listener], to_the_end=False)
    expectations = [step for step in dialogue.steps if isinstance(step, Expect)]
    if played.beginning is not None:
        return Difference(dialogue, server.name, "the beginning", expectations[0], played.beginning)
    for expected, answer, said in zip(expectations, played.answers, played.said, strict=False):
        if not answer.is_of_class(expected):
            return Difference(dialogue, server.name, said, expected, answer)
    return None


def render(dialogues: Sequence[Dialogue], comparisons: Mapping[str, Comparison]) -> str:
    """The page."""
    found = {(each.dialogue.name, each.server): each for result in comparisons.values() for each in result.differences}
    lines = [
        "# Where other servers answer otherwise",
        "",
        "<!-- Written by tests/interop/differences.py (make dialogues) from the dialogues; do not edit. -->",
        "",
        f"{len(dialogues)} dialogues (tests/interop/dialogues) are played into Mailsluice and into Debian's servers,",
        "each with the same listeners, login and limits and otherwise as its makers ship it. A row is a dialogue in",
        "which a server's reply is of another class (the code's first digit, RFC 5321 section 4.2.1) than",
        "Mailsluice's. It shows the first such reply, or `closed` where the connection was closed and `silent` where",
        "nothing came within 5 s; `=` is the same class, `·` a dialogue that the server cannot play. Every row has a",
        "reason that names an RFC, and a test asks for it.",
        "",
        "| server | Debian's version | dialogues | of another class |",
        "|---|---|---|---|",
        *(
            f"| {NAMES[name]} | {each.version} | {each.played} | {len(each.differences)} |"
            for name, each in comparisons.items()
        ),
        "",
        "OpenSMTPD as Debian 12 has it completes no TLS handshake: the process that keeps its private key does not",
        "work with OpenSSL 3 (OpenSMTPD/OpenSMTPD#1171). So it plays the dialogues without TLS.",
    ]
    for topic, group in groupby(dialogues, key=lambda dialogue: dialogue.topic):
        rows = [_row(dialogue, found, comparisons) for dialogue in group]
        rows = [row for row in rows if row]
        if rows:
            heads = " | ".join(NAMES[name] for name in comparisons)
            lines += [
                "",
                f"## {topic}",
                "",
                f"| dialogue | Mailsluice | {heads} | why |",
                "|---" * (len(comparisons) + 3) + "|",
            ]
            lines += rows
    return "\n".join(lines) + "\n"


def _row(dialogue: Dialogue, found: Mapping[tuple[str, str], Difference], comparisons: Mapping[str, Comparison]) -> str:
    own = {name: found[dialogue.name, name] for name in comparisons if (dialogue.name, name) in found}
    if not own:
        return ""
    can_all = not dialogue.needs_tls
    replies = [
        _shown(own[name].answer) if name in own else "=" if can_all or name != "opensmtpd" else "·"
        for name in comparisons
    ]
    wanted = list(dict.fromkeys(_wanted(each.expected) for each in own.values()))
    reasons: dict[str, list[str]] = {}
    for name in own:
        reasons.setdefault(dialogue.whys.get(name, "not justified"), []).append(NAMES[name])
    why = " ".join(f"{', '.join(names)}: {text}" for text, names in reasons.items())
    cells = [dialogue.title, ", ".join(wanted), *replies, why]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _shown(answer: Answer) -> str:
    return f"{answer.code} {answer.status}".strip()


def _wanted(expected: Expect) -> str:
    return expected.text.split(" +")[0].split(" -")[0]


def main() -> None:
    dialogues = corpus.read()
    PAGE.write_text(render(dialogues, compare_all(dialogues)))


if __name__ == "__main__":
    main()
