"""Training methods at work in a trial; their parameters are in `harness.suite.method_specs`."""

from harness.methods.freezing import Freezing as Freezing
from harness.methods.method import Measures as Measures
from harness.methods.method import Method as Method
from harness.methods.training import Training as Training
