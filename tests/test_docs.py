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
    evaluated(page_of(tmp_path, monkeypatch, RIGHT))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("three = 3", "three = 4"),
        ('print(three, "sheep")', "three"),
        ("$ cat", "cat"),
        ("$ cat", "$ false | cat\n$ cat"),
        ("$ cat", "$ exit 2\n$ cat"),
        ("3 …", "3 … goats"),
        ("x = 1\nmore", "x = 2\nmore"),
        ("12 steps\n```", "13 steps\n```"),
        ("a/b.toml && ", "a/c.toml && "),
        ("recipe.epochs=2", "recipe.epoch=2"),
        ("run digits", "run digit5"),
        ("--set ", "--sets "),
    ],
)
def test_a_wrong_page_fails(tmp_path, monkeypatch, old, new):
    assert old in RIGHT
    found = page_of(tmp_path, monkeypatch, RIGHT.replace(old, new))
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the block itself raises
        evaluated(found)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```\nx\n```\n", "no block may be in nothing"),
        ("```python hl_lines=1\nx\n```\n", "1 blocks, of which 0"),
        ("<!-- invisible-code-block: bash\nx\n-->\n", "1 blocks, of which 0"),
        ("<!-- invisible-code: python\nx\n-->\n", "1 blocks, of which 0"),
    ],
)
def test_no_block_is_left_out(tmp_path, monkeypatch, block, message):
    with pytest.raises(ValueError, match=message):
        page_of(tmp_path, monkeypatch, block)


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
        "neqbench run digit5",
        ".venv/bin/neqbench runs digits",
        ".ci/nothing",
        "make test ARGS=tests/test_nothing.py",
        "neqbench run digits --methods neq-grou",
        "neqbench run digits --seeds x-y",
        "neqbench compare a b --fail-on bogus<3",
        "pip install neqbenchh",
    ],
)
def test_a_command_that_is_none_is_found(line):
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever refuses it
        list(map(check, commands(line)))


def test_what_is_shown_is_compared():
    agree("a … d", "a  b\n c d", measured=False)
    agree("…\nb … d …", "a b c d e", measured=False)
    many = " … ".join("abcdefgh")
    with pytest.raises(AssertionError, match="printed"):
        agree(f"{many} … i", "a b c d e f g h " * 300, measured=False)
    with pytest.raises(AssertionError, match="printed"):
        agree("ab … ba", "aba", measured=False)
    with pytest.raises(AssertionError, match=r"\+b"):
        agree("a", "b", measured=False)
