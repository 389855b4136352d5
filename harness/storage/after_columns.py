"""The tables of what is measured after the trials, alone on the device that they ran on."""

from harness.storage.columns import INTEGER, NUMBER, TEXT, TIME, DeclaredColumn, told

MEASURED = (  # the last columns of what is measured after the trials
    ("trials_on_device", INTEGER, "trials on the device meanwhile, this one among them"),
    ("other_load", NUMBER, "what else the device did, as in `epochs`"),
    ("code", TEXT, "commit that measured it, as in `epochs`"),
    ("updated", TIME, "when this row was written"),
)
AFTERWARDS: dict[str, tuple[DeclaredColumn, ...]] = {
    "replays": tuple(
        told(name, kind, meaning, since=4)
        for name, kind, meaning in (
            ("device", TEXT, "what it was measured on: a GPU, or a CPU with its threads"),
            ("seconds", NUMBER, "of training and deciding: steps under each epoch's mask, summed"),
            ("seconds_plain", NUMBER, "the same of as many plain steps"),
            ("ratio", NUMBER, "of the two, from pairs of steps that were taken by turns"),
            ("ratio_low", NUMBER, "of that, 2.5 % of a bootstrap over these pairs"),
            ("ratio_high", NUMBER, "of that, 97.5 % of the same"),
            ("plans", INTEGER, "distinct masks of the trial"),
            (
                "plans_measured",
                INTEGER,
                "those measured; the others lie between two by their executed FLOPs",
            ),
            (
                "activation_bytes",
                NUMBER,
                "what a step's first forward keeps for its backward, mean over epochs",
            ),
            ("activation_bytes_plain", NUMBER, "the same of a plain step"),
            ("optimizer_bytes", NUMBER, "of the optimizer's state"),
            ("optimizer_bytes_plain", NUMBER, "the same in plain training"),
            *MEASURED,
        )
    ),
    "removals": tuple(
        told(name, kind, meaning, since=5)
        for name, kind, meaning in (
            ("reason", TEXT, "why nothing was removed; null where something was"),
            (
                "stuck",
                TEXT,
                "JSON: dead neurons that could not be removed, by `layer`: how many `neurons`, and "
                "the `reason`",
            ),
            ("neurons_dead", INTEGER, "neurons of the trained model without a weight but zeros"),
            ("neurons_removed", INTEGER, "neurons that were removed: dead, or read by nobody"),
            ("parameters", INTEGER, "parameters after removal"),
            ("parameters_dense", INTEGER, "parameters of the suite's own model"),
            ("forward_flops", INTEGER, "FLOPs of the forward of one sample after removal"),
            ("forward_flops_dense", INTEGER, "the same of the suite's model"),
            ("file_bytes", INTEGER, "bytes of a file with the `state_dict` after removal"),
            ("file_bytes_dense", INTEGER, "the same of the suite's model"),
            (
                "difference",
                NUMBER,
                "largest difference that removal makes to an output, in float32",
            ),
            ("difference_float64", NUMBER, "the same in float64"),
            ("batch", INTEGER, "samples of a forward in the suite's training"),
            (
                "latency_one",
                NUMBER,
                "seconds of a forward of one sample after removal over those of the suite's "
                "model: median of pairs that were taken by turns",
            ),
            ("latency_batch", NUMBER, "the same of `batch` samples"),
            ("latency_one_low", NUMBER, "its lower quartile"),
            ("latency_one_high", NUMBER, "its upper quartile"),
            ("latency_batch_low", NUMBER, "lower quartile of the other"),
            ("latency_batch_high", NUMBER, "upper quartile of the other"),
            ("seconds_one", NUMBER, "median seconds of a forward of one sample after removal"),
            ("seconds_one_dense", NUMBER, "the same of the suite's model"),
            ("seconds_batch", NUMBER, "median seconds of a forward of `batch` samples"),
            ("seconds_batch_dense", NUMBER, "the same of the suite's model"),
            ("device", TEXT, "what it was measured on, as in `replays`"),
            *MEASURED,
        )
    ),
}
