"""Every path that README.md and docs/ name exists, and every relative link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGES: Final = (ROOT, ROOT / "relay/mailsluice_relay", ROOT / "operator/mailsluice_operator")
TOP: Final = ("relay", "operator", "crds", "deploy", "docs", "examples", "tests", "tools", "benchmarks", ".ci")
PATH: Final = re.compile(rf"(?<![\w./~-])((?:{'|'.join(map(re.escape, TOP))})/[\w./-]*\w/?)")
"""A path from the root of the repository, wherever it stands in a page."""
MODULE: Final = re.compile(r"(?<![\w./-])[a-z_][\w/]*\.py\b")
"""A Python file, from the root or from one of the packages."""
NAME: Final = re.compile(r"`(_?[A-Za-z][\w.]*)`")
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")


def identifier(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_path_exists(page: Path) -> None:
    assert [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_module_exists(page: Path) -> None:
    named = MODULE.findall(page.read_text())
    assert [module for module in named if not any((folder / module).exists() for folder in PACKAGES)] == []


def test_every_name_in_the_table_of_changes_is_in_the_code() -> None:
    table = (ROOT / "docs/architecture.md").read_text().partition("## Where to change what")[2]
    files = [path for folder in ("relay", "operator", "tests") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files) + (ROOT / "Makefile").read_text()
    names = {name.rpartition(".")[2] for name in NAME.findall(table) if not name.endswith((".py", ".md", ".yaml"))}
    assert len(names) > 15
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_of_docs_is_reached_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - linked == set()


def test_a_path_that_does_not_exist_is_noticed() -> None:
    assert PATH.findall("see `relay/mailsluice_relay/reply.py` and tests/nowhere/gone.py.") == [
        "relay/mailsluice_relay/reply.py",
        "tests/nowhere/gone.py",
    ]
