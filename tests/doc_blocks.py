"""Blocks of a page in Markdown, as examples that can be evaluated in order.

`python` is executed, and what it prints is held against a `text` block behind it. `console` is run
line by line, and its output held against what is shown. A block with a title is written to that
file. `sh` is what needs a cluster, a GPU, a download or much time: `doc_commands` checks it.
"""

import difflib
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import doc_commands
from sybil import Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

INFO = re.compile(r'(?P<language>\S*)(?: title="(?P<title>[^"\n]+)")?[ \t]*$\n', re.MULTILINE)
SHOWN_ONLY = {"toml", "yaml", "json", "html", "bibtex"}
MEASURED = "<!-- measured -->"
NOT_RUN = re.compile(r"<!-- not run: .+ -->$")
PATIENCE = 240

FENCES = RawFencedCodeBlockLexer(INFO)
HIDDEN = DirectiveInHTMLCommentLexer("invisible-code-block", "python|console")
BLOCK = re.compile(r"^ *(```\S|<!-- *invisible)", re.MULTILINE)


def examples(path):
    """What is to be evaluated of a page, in order; a ValueError where a block would be left out."""
    document = Sybil([_parse], path=str(path.parent)).parse(path)
    found = list(document.examples())
    blocks = len(BLOCK.findall(document.text))
    if blocks != len(found):
        raise ValueError(f"{path}: {blocks} blocks, of which {len(found)} are understood")
    return found


def _parse(document):
    for region in FENCES(document):
        before = _before(document, region).rpartition("\n")[2].strip()
        title, language = region.lexemes["title"], region.lexemes["language"]
        evaluate = partial(_written, Path(title)) if title else EVALUATORS.get(language)
        if language == "python" and NOT_RUN.match(before):
            evaluate = _compiled
        if evaluate is None:
            line = document.line_column(region.start)
            raise ValueError(f"{document.path}, {line}: no block may be in {language or 'nothing'}")
        yield Region(region.start, region.end, region.lexemes["source"], evaluate)
    for region in HIDDEN(document):
        evaluate = EVALUATORS[region.lexemes["arguments"].strip()]
        yield Region(region.start, region.end, region.lexemes["source"], evaluate)


def _before(document, region):
    return document.text[: region.start].rstrip()


def _measured(example):
    return _before(example.document, example.region).endswith(MEASURED)


def _written(file, example):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(example.parsed, encoding="utf-8")


def _compiled(example):
    compile(example.parsed, example.path, "exec")


def _executed(example):
    printed = io.StringIO()
    with redirect_stdout(printed):
        PythonEvaluator()(example)
    example.namespace["_printed"] = printed.getvalue()


def _text(example):
    """What the Python before it has printed; else only words, and nothing is compared."""
    before = _before(example.document, example.region).removesuffix(MEASURED).rstrip()
    if before.endswith("```") and "_printed" in example.namespace:
        agree(example.parsed, example.namespace.pop("_printed"), _measured(example))


def _run(example):
    for command, shown in _commands(example.parsed):
        environment = os.environ | {"COLUMNS": "80", "RAY_AUTH_MODE": "disabled"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        refused = shown.lstrip().startswith("error:")
        assert (done.returncode != 0) == refused, f"$ {command}\n{done.stdout}"
        if shown:
            agree(shown, done.stdout, _measured(example), command)


def _commands(source):
    """Each command of a block, with the output that is shown for it."""
    before, *parts = re.split(r"^\$ ", source, flags=re.MULTILINE)
    assert parts and not before.strip(), "a console block begins with `$ `"  # noqa: PT018
    for part in parts:
        lines = part.splitlines()
        last = next(at for at, line in enumerate(lines) if not line.endswith("\\"))
        yield "\n".join(lines[: last + 1]), "\n".join(lines[last + 1 :]).strip()


def _checked(example):
    for command in doc_commands.commands(example.parsed):
        doc_commands.check(command)


EVALUATORS = {
    **dict.fromkeys(SHOWN_ONLY, lambda example: None),
    "text": _text,
    "python": _executed,
    "console": _run,
    "sh": _checked,
}


def agree(shown, printed, measured, command=""):
    """Fail unless `printed` is what is shown: `…` is any text, runs of blanks are one.

    `measured`: decimals, and numbers before a unit, need only be numbers.
    """
    parts = [part.strip() for part in _words(shown, measured).split("…")]
    if not _holds(_words(printed, measured), parts):
        lines = [text.strip().splitlines() for text in (shown, printed)]
        difference = "\n".join(difflib.unified_diff(*lines, "shown", "printed", lineterm=""))
        raise AssertionError(f"$ {command}\n{difference}")


def _holds(text, parts):
    """Whether the text is the parts in their order, with anything between two of them."""
    first, *between = parts
    if not between:
        return text == first
    *between, last = between
    at, end = len(first), len(text) - len(last)
    if not text.startswith(first) or not text.endswith(last):
        return False
    for part in between:
        at = text.find(part, at, end) + len(part)
        if at < len(part):
            return False
    return at <= end


def _words(text, measured):
    text = re.sub("─+", "─", text)
    if measured:
        text = re.sub(r"[−+-]?\d[\d,]*\.\d+(e-?\d+)?", "#", text)
        text = re.sub(r"\d[\d,]*(?= ?(s|ms|µs|min|h|[KMG]iB|[kMG]B|%)(\W|$))", "#", text)
        text = re.sub("[█▏▎▍▌▋▊▉▇▆▅▄▃▂▁]+", "█", text)
    return " ".join(text.split())
