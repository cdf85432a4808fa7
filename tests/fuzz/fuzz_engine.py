"""Looks for octets that break what `checks` says, guided by coverage (atheris).

Directories and options are libFuzzer's: `python tests/fuzz/fuzz_engine.py FOUND CORPUS -max_total_time=60`. What is new
is kept in FOUND; what breaks something goes to a file `crash-...`, which belongs into the corpus once that is mended.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris
import structlog

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["mailsluice_relay"]):
    import checks


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    atheris.Setup(sys.argv, checks.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
