"""The error of a rank that ends because another rank has failed."""

from __future__ import annotations

from collections.abc import Mapping


class FailedRankError(RuntimeError):
    """Raised on all other ranks if one fails. The message has the rank, the point of the run and the original error.

    Example:
        >>> raise FailedRankError.from_reports({1: "step 7: ValueError: bad row"})
        Traceback (most recent call last):
        ...
        fxtrain.distributed._failed_rank.FailedRankError: expected all ranks to succeed, got an error on rank 1 at step
        7: ValueError: bad row. Its traceback is in the log of rank 1.
    """

    @classmethod
    def from_reports(cls, reports: Mapping[int, str]) -> FailedRankError:
        """Returns the error for the reports of failed ranks.

        Args:
            reports: The point of the run and the error of each failed rank, as text.
        """
        rank, text = next(iter(reports.items()))
        others = [str(other) for other in reports if other != rank]
        more = f" Ranks {', '.join(others)} failed too." if others else ""
        return cls(
            f"expected all ranks to succeed, got an error on rank {rank} at {text.rstrip('.')}. Its traceback is in "
            f"the log of rank {rank}.{more}"
        )
