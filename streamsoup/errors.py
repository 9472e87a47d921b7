"""Every error that streamsoup raises on purpose.

::

    StreamsoupError
    ├── RecipeError (ValueError)             weights, options or a recipe file that make no sense
    ├── CheckpointError (ValueError)         an ingredient that cannot be used
    │   ├── CheckpointNotFoundError (FileNotFoundError)
    │   ├── HeaderError                      a safetensors header that breaks the format
    │   ├── ShardIndexError                  an index that does not describe its shards
    │   └── UnsupportedDTypeError            scales that are not understood, packed sub-byte formats
    ├── MismatchError (ValueError)           ingredients that do not fit together
    ├── ChangedIngredientError (ValueError)  an ingredient is no longer what it was
    ├── NonFiniteError (ArithmeticError)     NaN or infinity in an ingredient or in the soup
    ├── BudgetError (MemoryError)            the byte budget is too small for any plan
    ├── DeviceMemoryError (MemoryError)      a device has too little memory left for a tile
    ├── DestinationError (OSError)           the output cannot go where it was sent
    │   └── DiskSpaceError
    ├── IngredientReadError (OSError)        reading an ingredient failed
    ├── ScoreError (RuntimeError)            an evaluator failed or gave no number
    ├── RankError (RuntimeError)             another process of a distributed run failed or died
    └── ResumeError (ValueError)             nothing to resume, or it does not belong to this job

Each message is one sentence about the thing at fault (tensor, file, expected, found) and one thing to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class StreamsoupError(Exception):
    """Root of the tree; catch this to catch them all."""


class RecipeError(StreamsoupError, ValueError):
    """Weights, options or a recipe file that make no sense."""


class CheckpointError(StreamsoupError, ValueError):
    """An ingredient that cannot be used.

    Parameters
    ----------
    message : str
    path : str
        The file or folder at fault.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint where one was named."""


class HeaderError(CheckpointError):
    """A safetensors header that breaks the format."""


class ShardIndexError(CheckpointError):
    """An index JSON that does not describe its shards."""


class UnsupportedDTypeError(CheckpointError):
    """Numbers whose average would be wrong: with scales that are not understood, in packed sub-byte formats."""


class MismatchError(StreamsoupError, ValueError):
    """Ingredients that do not fit together.

    Parameters
    ----------
    problems : sequence of str
        One sentence each; the message shows the first few.
    advice : str
        What the person may do, where the sentences do not say it.
    """

    def __init__(self, problems: Sequence[str], advice: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__(f"{listed(self.problems)} {advice}".rstrip())


class ChangedIngredientError(StreamsoupError, ValueError):
    """An ingredient is no longer what it was when the work began."""


class NonFiniteError(StreamsoupError, ArithmeticError):
    """NaN or infinity in an ingredient, or a soup too large for its dtype.

    Parameters
    ----------
    findings : sequence of str
        One phrase per offending tensor and ingredient.
    advice : str
        What the person may do.
    """

    def __init__(self, findings: Sequence[str], advice: str) -> None:
        self.findings = tuple(findings)
        super().__init__(f"{listed(self.findings, most=20)} {advice}")


class BudgetError(StreamsoupError, MemoryError):
    """The budget is too small for any plan.

    Parameters
    ----------
    message : str
    least_bytes : int
        The smallest budget that would do.
    """

    def __init__(self, message: str, *, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class DeviceMemoryError(StreamsoupError, MemoryError):
    """A device has too little memory left for a tile.

    Parameters
    ----------
    message : str
    device : str
    wanted_bytes : int
        What could not be had.
    """

    def __init__(self, message: str, *, device: str, wanted_bytes: int) -> None:
        super().__init__(message)
        self.device = device
        self.wanted_bytes = wanted_bytes


class DestinationError(StreamsoupError, OSError):
    """The output cannot go where it was sent."""


class DiskSpaceError(DestinationError):
    """The output does not fit the disk."""


class IngredientReadError(StreamsoupError, OSError):
    """Reading an ingredient failed."""


class ScoreError(StreamsoupError, RuntimeError):
    """An evaluator failed, took too long, or gave no finite number."""


class RankError(StreamsoupError, RuntimeError):
    """Another process of a distributed run failed or died."""


class ResumeError(StreamsoupError, ValueError):
    """There is nothing to resume, or it does not belong to this job."""


def listed(sentences: Sequence[str], *, most: int = 5) -> str:
    """Join sentences into one message, and count those that are left out."""
    shown = " ".join(sentences[:most])
    left = len(sentences) - most
    return f"{shown} (and {left} more)" if left > 0 else shown
