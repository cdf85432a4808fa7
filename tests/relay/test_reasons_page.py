"""docs/reasons.md explains every reason, once, and none that does not exist."""

import re
from collections import Counter
from pathlib import Path

from mailsluice_relay.reply import Reason

PAGE = Path(__file__).parents[2] / "docs" / "reasons.md"


def test_every_reason_has_one_row_and_every_row_a_reason() -> None:
    rows = Counter(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert rows == Counter(str(reason) for reason in Reason)


def test_every_row_has_all_its_cells() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}
