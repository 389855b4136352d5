"""What is wrong in a method of a user's own is found before the first step, and named."""

import pytest
from trials import toy

from harness.errors import UserError
from harness.run.preflight import preflight


def altered(toys, method, *changes):
    """The toys with something else in a method's file."""
    path = toys / f"{method}.py"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return toy(toys, method)


def added(text):
    """A hook more."""
    return [("    def measures", f"    {text}\n\n    def measures")]


WRONG = {
    "no hook": (
        [
            ("from harness.methods import Method\n", ""),
            ("(Method)", ""),
            ("super().__init__(training)", "pass"),
        ],
        "method pruner: Pruner has no hook start.*inherit from harness.methods.Method",
    ),
    "a wrong signature": (
        [("def end_epoch(self, epoch)", "def end_epoch(self)"), ("epoch ==", "2 ==")],
        r"Pruner.end_epoch is called as end_epoch\(epoch\), and too many",
    ),
    "a hook without what it needs": (
        added("def after_forward(self, inputs): ..."),
        r"Pruner.after_forward is called as after_forward\(inputs, targets, outputs, weight",
    ),
    "a state that can't be stored": (
        [('{"kept": dict(self.kept)}', '{"kept": dict(self.kept), "of": self.training.model}')],
        "Pruner.state_dict: can't be stored",
    ),
    "a state that is not brought back": (
        [('dict(state["kept"])', "{}"), ("epoch == self.at", "True")],
        "Pruner: load_state_dict does not bring back 'kept'",
    ),
    "a column": ([('{"zero_rows": sum', '{"test_loss": sum')], "'test_loss' is a column already"),
    "a suite's": ([('{"zero_rows": sum', '{"sharpness": sum')], "'sharpness' is what suites ask"),
    "an unknown layer": (
        [('("zero_rows", n)', '("zero_rows", n + ".weight")')],
        "no layer is called 'conv1.weight'",
    ),
    "no number": ([("sum(zeros.values())", "'many'")], "'zero_rows' is 'many', and no number"),
    "negative FLOPs": (
        added('def flops(self, usual): return {"overhead": -1}'),
        "Pruner.flops: 'overhead' must be a whole number from 0 on, got -1",
    ),
    "FLOPs of no name": (
        added('def flops(self, usual): return {"saved": 1}'),
        "Pruner.flops: 'saved' is none of forward, backward_dense",
    ),
    "weights that change too late": (
        [
            ("            self.after_step()", "            pass"),
            ("        zeros =", "        self.after_step()\n        zeros ="),
            ("epoch == self.at", "True"),
        ],
        "Pruner: changes weights after end_epoch",
    ),
    "an error": (
        [("if epoch ==", "if 1 / 0 ==")],
        r"Pruner: end_epoch\(\) failed: ZeroDivisionError.*pruner.py",
    ),
    "an error in a step": (
        [("in self.kept.items():", "in [1 / 0]:")],
        r"Pruner: after_step\(\) failed: ZeroDivisionError.*pruner.py",
    ),
    "a glance at the test": (
        [("if epoch ==", 'if self.training.evaluate("test") and epoch ==')],
        'evaluate.*may decide on "validation" alone',
    ),
    "an evaluation that nobody counts": (
        [("        zeros =", '        self.training.evaluate("validation")\n        zeros =')],
        r"Pruner: measures\(\) failed: ValueError: evaluate: ask in start, in a step or in end_ep",
    ),
    "a reading of no name": (
        added('def readings(self): return {"gradient": torch.zeros(3)}'),
        "Pruner.readings: 'gradient' is none of phi, delta_phi, velocity",
    ),
    "neurons that do not stand still": (
        added("frozen = property(lambda self: torch.ones(250) > 0)"),
        "Pruner: frozen names neurons whose weights have changed",
    ),
    "a mask that is not there yet": (
        added("@property\n    def frozen(self): return self.mask"),
        "Pruner: frozen failed: AttributeError",
    ),
    "a hook without a signature": (added("start = dict"), r"Pruner.start is called as start\(\)"),
    "a state that is no dict": (
        [('return {"kept": dict(self.kept)}', "return [1]")],
        "Pruner.state_dict: must return a dict, got list",
    ),
    "a mask of another size": (
        added("frozen = torch.zeros(3)"),
        r"Pruner.frozen: must be None or bool \[\d+\]",
    ),
    "no such argument": (
        [("share, at)", "share)"), ("share, at, {}", "share, 2, {}")],
        r"called as Pruner\(training, share, at\), and got an unexpected",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found_before_the_first_step(toys, what):
    changes, message = WRONG[what]
    with pytest.raises(UserError, match=message) as raised:
        preflight([altered(toys, "pruner", *changes)])
    assert "method pruner" in str(raised.value)


@pytest.mark.slow
def test_a_wrong_input_is_one_line_and_exit_2(toys, neqbench, tmp_path):
    altered(toys, "pruner", ("def measures(self)", "def measures(self, epoch)"))
    done = neqbench("run", toys, "--executor", "inline", "--results", tmp_path / "r")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "error: suite toys: method pruner: Pruner.measures is called as measures()" in line
