"""Links of the pages: files and headings that they lead to are there, as GitHub shows them."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "harness", "neq", "results/evidence", "suites")
PAGES = [*ROOT.glob("*.md"), ROOT / "results/README.md"]
PAGES += [page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))]
CODE = re.compile(r"^( *)(`{3,}).*?^\1\2|<!--.*?-->|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(
    r'\]\(<?([^)\s>]+)>?(?: "[^"]*")?\)|^\[[^\]]+\]: (\S+)|(?:src|href)="([^"]+)"', re.M
)


def links(page):
    """Where the page's links and pictures lead to, as it writes them."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    return [next(filter(None, found)) for found in LINK.findall(text)]


def anchors(page):
    """The names under which GitHub lets others link to a page's headings."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    seen: Counter[str] = Counter()
    for title in re.findall(r"^#+ (.+?)(?: #+)?$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        yield f"{name}-{seen[name]}" if seen[name] else name
        seen[name] += 1
    yield from re.findall(r'<a (?:id|name)="([^"]+)"', text)


def broken(page):
    """The page's links that lead nowhere, with what is missing."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"[a-z]+:", link):
            if not link.startswith("https://"):
                yield f"{link}: not https"
        elif not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert list(broken(page)) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Two `words`, one\n## Again\n## Again\n```sh\n# none [x](y)\n```\n`[x](y)`\n"
        "[a](#two-words-one) [b](page.md#again-1) [c](https://example.com/#x) ![d](page.md)\n"
        '[e](#none) [f](none.md) ![g](http://example.com) <img src="none.png">\n'
    )
    assert [found.partition(":")[0] for found in broken(page)] == [
        *("#none", "none.md", "http", "none.png")
    ]


def test_the_site_has_every_page():
    text = (ROOT / "docs/mkdocs.yml").read_text()
    listed = re.findall(r"(?<=: |- )docs/\S+\.md$", text, re.MULTILINE)
    assert sorted(listed) == sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))
