"""The error for a compiled step that differs from its uncompiled self."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_NAMED = 3

_WAYS_ON = (
    "fxtrain.compile(step, backend='inductor') compiles by torch.compile, which checks what Python reads at each call. "
    "If the compiled result is the right one, fxtrain.compile(step, check=False) leaves this check out."
)


class MiscompiledError(RuntimeError):
    """A compiled step returned another result than the same step uncompiled, by more than rounding."""


def mismatch(step: object, paths: Sequence[str], values: str, *, call: str, is_frozen: bool) -> MiscompiledError:
    """Returns the error for a result that differs.

    Args:
        step: The uncompiled step.
        paths: The paths of the leaves that differ.
        values: The two values of the first one, as text.
        call: The call of the graph that differs.
        is_frozen: Whether the step reads something besides its arguments that has changed.

    Example:
        >>> print(mismatch("step", ["state.params['w']"], "1.0, expected 2.0", call="first call", is_frozen=False))
        expected the result of the uncompiled step from the first call of compiled step, got another at...
    """
    others = f", and at {', '.join(paths[1:_MAX_NAMED])}" if len(paths) > 1 else ""
    others += f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
    if is_frozen:
        reason = (
            "A value was frozen when the step was compiled: it reads something besides its arguments that changes, "
            "such as a random sample, a clock, a counter or a global. Pass the value in the batch, or keep it in the "
            "state, as a buffer or a slot."
        )
    else:
        reason = "Rounding does not explain this, so the compiler is at fault, or an operator of the step."
    return MiscompiledError(
        f"expected the result of the uncompiled step from the {call} of compiled {step}, got another at "
        f"{paths[0]}: {values}{others}. {reason} {_WAYS_ON}"
    )
