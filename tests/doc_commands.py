"""Commands that pages only name: is there such a verb, option, suite, target, extra, file?"""

import re
import shlex
import tomllib
from pathlib import Path

import typer

from harness.cli import app
from harness.report.gates import gates
from harness.run.trials import chosen_methods, chosen_seeds
from harness.suite.files import load_experiments

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FOLDERS = ("cluster/", "docs/", "harness/", "neq/", "suites/", "tests/")
OTHERS = {
    *("accelerate", "aws", "cat", "cd", "conda", "docker", "export", "git", "kubectl", "ls"),
    *("mkdir", "mlflow", "open", "pre-commit", "scp", "source", "tensorboard", "torchrun", "uv"),
    "wandb",
}
OPERATORS = {"|", "||", "&&", "&", ";"}
REDIRECTIONS = {">", ">>", "<"}


def commands(source):
    """The simple commands of a shell block, each as its words; a `\\` continues a line."""
    for line in source.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        words.whitespace_split = True
        command = []
        for word in words:
            if word in REDIRECTIONS:
                next(words)  # a file
                continue
            if word not in OPERATORS:
                command.append(word)
                continue
            if command:
                yield command
            command = []
        if command:
            yield command


def check(words):
    """Raise AssertionError, or what the command line itself raises, where a command is none."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return
    for word in words[1:]:
        if word.startswith(FOLDERS):
            assert (ROOT / word).exists(), f"there is no {word}"
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if "/" in program:
        assert (ROOT / program).exists(), f"there is no {program}"
        return
    if program in ("python", "python3", "torchrun") and "harness" in arguments:
        neqbench(arguments[arguments.index("harness") + 1 :])
    elif program in CHECKS:
        CHECKS[program](arguments)
    else:
        assert program in OTHERS, f"no page may run {program}"


def neqbench(arguments):
    """Parse the arguments as the command line would, and load the suite as it changes it."""
    command = typer.main.get_command(app)
    if arguments in (["--help"], ["--version"]):
        return
    context = command.make_context("neqbench", list(arguments))
    given = [*context._protected_args, *context.args]
    name, verb, rest = command.resolve_command(context, given)
    if "--help" in rest:
        return
    parsed = verb.make_context(name, rest, parent=context).params
    gates(parsed.get("fail_on") or ())
    chosen_seeds(parsed.get("seeds") or "0")
    suite = parsed.get("suite")
    if suite and "/" not in suite and not (Path(suite) / "suite.toml").exists():
        points, _ = load_experiments(suite, parsed.get("settings") or ())
        chosen_methods(points[0], parsed.get("methods"))


def _make(arguments):
    targets = [word for word in arguments if "=" not in word and not word.startswith("-")]
    assert set(targets) <= TARGETS, f"no target {set(targets) - TARGETS}"
    for word in re.findall(r"tests/[\w/.]+", " ".join(arguments)):
        assert (ROOT / word).exists(), f"there is no {word}"


def _pip(arguments):
    for word in arguments:
        extras = re.match(r"(?:neqbench|\.)\[([\w,-]+)\]", word)
        for extra in extras[1].split(",") if extras else ():
            assert extra in PROJECT["optional-dependencies"], f"no extra {extra}"
        named = word == "neqbench" or word.endswith(".whl") or not word.startswith("neqbench")
        assert extras or named, f"there is no {word}"


def _python(arguments):
    if arguments[:2] == ["-m", "pip"]:
        _pip(arguments[2:])
    else:
        assert arguments[:2] in (["-m", "venv"], ["-m", "build"], ["-m", "pytest"]) or (
            arguments[0].endswith(".py")
        ), f"no page may run python {' '.join(arguments)}"


def _ray(arguments):
    from ray.scripts.scripts import cli

    context = cli.make_context("ray", list(arguments))
    name, verb, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    verb.make_context(name, rest, parent=context)


CHECKS = {
    "neqbench": neqbench,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "python3": _python,
    "ray": _ray,
}
