"""The README's and the docs' blocks do what they show, page by page, in order."""

from pathlib import Path

import pytest
from doc_blocks import agree, examples
from doc_commands import check, commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem.lower())
@pytest.mark.filterwarnings("default")
def test_blocks_do_what_they_show(page, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "evidence").symlink_to(ROOT / "results" / "evidence")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    evaluated(examples(page))


def evaluated(found):
    for example in found:
        example.evaluate()


def page_of(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text)
    return examples(page)


RIGHT = """
<!-- invisible-code-block: python
three = 3
-->
```python
print(three, "sheep")
```

```text
3 …
```

```toml title="a/b.toml"
x = 1
```

```console
$ cat a/b.toml && \\
  echo more
x = 1
more
$ exit 2
```

<!-- measured -->
```console
$ echo "took 1.25 s of 30 s, 12 steps"
took 7.0 s of 4 s, 12 steps
```

```sh
neqbench run digits --set recipe.epochs=2   # some words
```
"""


def test_a_right_page_passes(tmp_path, monkeypatch):
    evaluated(page_of(tmp_path, monkeypatch, RIGHT.replace("$ exit 2\n", "")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("three = 3", "three = 4"),
        ("3 …", "3 … goats"),
        ("x = 1\nmore", "x = 2\nmore"),
        ("12 steps\n```", "13 steps\n```"),
        ("a/b.toml && ", "a/c.toml && "),
        ("recipe.epochs=2", "recipe.epoch=2"),
        ("run digits", "run digit5 --nothing"),
        ("--set ", "--sets "),
        ("$ exit 2", "$ exit 2"),
    ],
)
def test_a_wrong_page_fails(tmp_path, monkeypatch, old, new):
    text = RIGHT if old == new else RIGHT.replace("$ exit 2\n", "").replace(old, new)
    found = page_of(tmp_path, monkeypatch, text)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the block itself raises
        evaluated(found)


def test_a_block_must_say_what_it_is_in(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no block may be in nothing"):
        page_of(tmp_path, monkeypatch, "```\nx\n```\n")


@pytest.mark.parametrize(
    "line",
    [
        "make nothing-of-it",
        "pip install 'neqbench[nothing]'",
        "kubectl apply -f cluster/nothing.yaml",
        "torchrun --nproc-per-node 4 -m harness runs imagenet",
        "python -m harness run digits --executor slurm",
        "ray upwards cluster/ray-cluster.yaml",
        "make bench && rm everything",
    ],
)
def test_a_command_that_is_none_is_found(line):
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever refuses it
        list(map(check, commands(line)))


def test_what_is_shown_is_compared():
    agree("a … d", "a  b\n c d", measured=False)
    with pytest.raises(AssertionError, match=r"\+b"):
        agree("a", "b", measured=False)
