"""Every message has an entry in docs/errors*.md, and no entry is of a message that is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for part in ("harness", "neq", "suites") for path in (ROOT / part).rglob("*.py")]
LEAST = 6  # characters in a row that tell a message from others
# How what takes a message is called, at its end.
MAKING = ("Error", "missing", "_wrong", "warn", "_tell", "Notice", "super().__init__", "Finding")
RETURNING = {  # functions that return a message, or a part of one
    *("no_gpu", "_refused", "_reason", "cause_of_death", "too_long", "_lacking", "_lacking_gpu"),
    *("check_beginnings", "lost_link", "_paths_alone", "never", "_uncounted"),
}
INTERNAL = {
    "its operands can't be told apart": "the node is then listed as uncounted",
    "it has too many operands": "the node is then listed as uncounted",
    "it trains parameters that are no operands": "the node is then listed as uncounted",
    "its outputs have no gradients": "a reason within 'torch-pruning can't trace the model'",
    "its outputs have other shapes": "what can't be removed then stays",
    "channels_last": "a tuning file is then damaged",
    "margin": "a request is then damaged",
    "is submitted": "no message of something wrong",
    " has no attribute ": "Python's own words for a module's attribute",
}
OTHERS = (  # entries of what is not raised: Typer's, the system's, findings and notes
    *("No such option: ", "Got unexpected extra argument ", "Missing argument "),
    *("Invalid value for ", "…: No such file or directory", "…: Permission denied"),
    *("unknown key ", "unknown method kind ", "must not be empty", "…: is of "),
    *("… lets two create ", "not replayed: ", "replayed ", "not removed: ", "trained on "),
    *("layer …: in channels last ", "other rows of ", "a backward over "),
    *("removal needs ", "its workers died ", "… can't be written to ("),
)
ENTRY = re.compile(r"\*\*(`+)(.+?)\1\*\*", re.DOTALL)


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def entries() -> list[str]:
    pages = sorted((ROOT / "docs").glob("errors*.md"))
    return [plain(found[2]) for page in pages for found in ENTRY.finditer(page.read_text("utf-8"))]


def pieces(node: ast.expr) -> list[str]:
    """The words of a message that are always the same."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [piece for value in node.values for piece in pieces(value)]
    if isinstance(node, ast.BinOp):
        return pieces(node.left) + pieces(node.right)
    if isinstance(node, ast.BoolOp):  # a message, or where it is empty another
        return max(map(pieces, node.values), key=lambda words: len("".join(words)))
    return []


def either(text: ast.expr) -> list[ast.expr]:
    return [text.body, text.orelse] if isinstance(text, ast.IfExp) else [text]


def messages(source: str) -> Iterator[list[str]]:
    for node in ast.walk(ast.parse(source)):
        texts: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(MAKING):
            texts = node.args[1:] if ast.unparse(node.func) == "Finding" else node.args
            texts = [part for text in texts for part in either(text)]
        elif isinstance(node, ast.FunctionDef) and node.name in RETURNING:
            returns = [part for part in ast.walk(node) if isinstance(part, ast.Return)]
            yield from ([plain(p) for p in pieces(r.value)] for r in returns if r.value)
        found = [[plain(piece) for piece in pieces(text)] for text in texts]
        yield max(found, key=lambda words: len("".join(words)), default=[])


def told(source: str) -> Iterator[tuple[list[str], list[str]]]:
    """Each message, and its words that are long enough to look for."""
    for message in messages(source):
        words = [piece.strip() for piece in message if len(piece.strip()) >= LEAST]
        if words and not any(piece in INTERNAL for piece in message):
            yield message, words


def without_entry(source: str, known: list[str]) -> list[str]:
    """Messages of which no entry has all the words."""
    return [
        "…".join(message)
        for message, words in told(source)
        if not any(all(word in entry for word in words) for entry in known)
    ]


def test_every_message_has_an_entry():
    known = entries()
    lacking = {path: without_entry(path.read_text("utf-8"), known) for path in SOURCES}
    assert {str(path): messages for path, messages in lacking.items() if messages} == {}


def test_every_entry_is_of_a_message():
    found = [words for path in SOURCES for _, words in told(path.read_text("utf-8"))]
    gone = [e for e in entries() if not any(all(word in e for word in words) for words in found)]
    assert [entry for entry in gone if not entry.startswith(OTHERS)] == []


@pytest.mark.parametrize(
    "line",
    [
        'raise UserError(f"{path}: nobody has written of this")',
        'raise ValueError("nobody has written of this" + more)',
        'raise self._wrong(name, f"nobody has {written} of this")',
        'warnings.warn(f"{layer} is nobody\'s", stacklevel=2)',
        'yield Finding("GPU", f"{driver}: nobody has written of this")',
        'def no_gpu():\n    return f"nobody has {written} of this"',
    ],
)
def test_a_message_without_an_entry_is_found(line):
    assert len(without_entry(line, entries())) == 1
    assert without_entry(line, ["…: nobody has written of this", "… is nobody's"]) == []
