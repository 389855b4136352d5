"""How far the trials below a suite's results are, as a table in Markdown: finished or not."""

import sys
from pathlib import Path

import pandas as pd
from gpu_summary import rows

HEADS = (
    "method",
    "seed",
    "epochs",
    "test metric",
    "frozen",
    "backward executed",
    "seconds an epoch",
    "deciding",
    "peak GiB",
    "trials at a time",
)


def progress(folder: Path) -> str:
    """A line for each trial of `folder`: its last epoch, and medians over all."""
    trials = pd.read_parquet(folder / "trials").set_index("trial")
    epochs = pd.read_parquet(folder / "epochs").sort_values("epoch")
    lines = []
    for key, trial in trials.sort_values(["seed", "method"]).iterrows():
        mine = epochs[epochs["trial"] == key]
        if not len(mine):
            continue
        last, middle = mine.iloc[-1], mine.median(numeric_only=True)
        executed = mine["backward_flops_executed"].sum() / mine["backward_flops_dense"].sum()
        peak = mine["peak_memory_bytes"].max()
        lines.append(
            [
                trial["method"],
                str(trial["seed"]),
                f"{len(mine)} of {trial['epochs']}",
                f"{last['test_metric']:.4f}",
                f"{last['frozen_neurons'] / last['total_neurons']:.1%}",
                f"{executed:.3f}",
                f"{middle['seconds_train']:.2f}",
                f"{middle['seconds_equilibrium']:.3f}",
                "–" if pd.isna(peak) else f"{peak / 2**30:.2f}",
                str(trial["trials_on_device"]),
            ]
        )
    return "\n".join(rows(HEADS, lines))


if __name__ == "__main__":
    print(progress(Path(sys.argv[1])))
