"""What an attempt at a trial tells whoever runs it."""

from dataclasses import dataclass

from harness.storage.schema import EpochRecord, Failure


@dataclass(frozen=True, slots=True)
class Started:
    """The trial is being built."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user should know, and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Held:
    """Another run has the trial: this attempt is over."""


@dataclass(frozen=True, slots=True)
class Halted:
    """Results can't be stored: the trial is none the worse, but the run can't go on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The trial was finished already, by another run."""


Event = Started | EpochRecord | Notice | Held | Halted | Elsewhere | Failure


def went_on(path: str) -> Notice:
    """The notice about a damaged checkpoint, at `path`, that has a whole one before it."""
    return Notice(f"{path} is damaged: went on from the commit before it")
