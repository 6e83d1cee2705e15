"""Muon: momentum with its singular values brought close to one."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    Scalar,
    Tree,
    args_from,
    check_fraction,
    check_non_negative,
    check_positive,
    check_positive_int,
    describe,
)
from fxtrain.optim._adam import adamw
from fxtrain.optim._leafwise import bias_corrections, debiased, map_updates, moving_average
from fxtrain.optim._masking import Labels, Mask, partition
from fxtrain.optim._scaling import ScalarOrSchedule, add_decayed_weights, scale_by_learning_rate
from fxtrain.optim._state import PerParameter, start_counts, zeros
from fxtrain.optim._transform import GradientTransformation, chain, described, from_counted_rule, stateless
from fxtrain.tree import as_code, leaf_paths

Coefficients = tuple[float, float, float] | Sequence[tuple[float, float, float]]
"""Coefficients (a, b, c) of the quintic polynomial: one triple for all steps, or one triple per step."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's coefficients, with a steep slope at zero. Five steps bring singular values into [0.7, 1.2]."""


class ScaleByMuonState(NamedTuple):
    """The state of ``scale_by_muon``."""

    count: PerParameter  # int64 [parameters]: updates of each
    mu: Tree  # like the parameters: momentum


def orthogonalize(
    matrix: Tensor,
    coefficients: Coefficients = COEFFICIENTS,
    *,
    steps: int = 5,
    eps: Scalar = 1e-8,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the matrix with its singular values close to one, by a Newton-Schulz iteration.

        X = X / (|X| + eps),    then at each step    X = a X + (b A + c A^2) X,    A = X X^T

    Args:
        matrix: [rows, columns].
        coefficients: One triple (a, b, c) for all steps, or one triple per step.
        steps: The number of steps. Ignored if there is one triple per step.
        eps: Added to the Frobenius norm.
        dtype: Dtype of the matmuls. Defaults to float32, or the matrix's dtype if that is wider. bfloat16 is precise
            enough, and faster on accelerators.

    Returns:
        [rows, columns], in ``dtype``.

    Example:
        >>> matrix = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
        >>> bool((torch.linalg.svdvals(orthogonalize(matrix)) - 1).abs().max() < 0.35)
        True

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    """
    each = _coefficients_per_step(coefficients, steps)
    x: Tensor = matrix.to(dtype or torch.promote_types(matrix.dtype, torch.float32))
    tall = x.shape[0] > x.shape[1]
    x = x.mH if tall else x
    size = cast(Tensor, torch.linalg.vector_norm(x))  # pyright: ignore[reportUnknownMemberType]
    x = x / (size + eps)
    for a, b, c in each:
        gram = x @ x.mH
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mH if tall else x


@described
def scale_by_muon(
    *,
    ns_coeffs: Coefficients = COEFFICIENTS,
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = None,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = True,
    bias_correction: bool = True,
) -> GradientTransformation:
    """Replaces matrices by their orthogonalized momentum; see ``muon``.

    Args:
        ns_coeffs: ``coefficients`` of ``orthogonalize``.
        ns_steps: ``steps`` of ``orthogonalize``.
        ns_dtype: ``dtype`` of ``orthogonalize``.
        beta: Decay rate of the momentum, in [0, 1).
        eps: Added to the norm of the momentum.
        mu_dtype: Dtype of the momentum. Defaults to the parameters' dtype.
        nesterov: Whether to use Nesterov momentum.
        bias_correction: Whether to correct the bias of the momentum, as in optax, or not, as in torch. It only matters
            with ``nesterov``, because the scale of the momentum cancels otherwise.

    Raises:
        ValueError: At ``init``, if a parameter is not a matrix. The message names it.

    Example:
        >>> tx = scale_by_muon(ns_steps=10)
        >>> grads = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> bool((torch.linalg.svdvals(updates) - 1).abs().max() < 0.35)
        True
    """
    check_fraction(beta=beta)
    check_non_negative(eps=eps)
    _coefficients_per_step(ns_coeffs, ns_steps)

    def init(params: Tree) -> ScaleByMuonState:
        for path, leaf in zip(leaf_paths(params), tree.leaves(params), strict=True):
            if leaf.ndim != 2:
                raise ValueError(
                    f"expected scale_by_muon to get only matrices, got {describe(leaf)} at params{as_code(path)}. Use "
                    "muon, which trains the rest with AdamW, or exclude it by masked or partition."
                )
        return ScaleByMuonState(start_counts(params), zeros(params, dtype=mu_dtype))

    def numbers(count: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return bias_corrections(beta, count, dtype, nesterov) if bias_correction else []

    def rule(update: Tensor, mu: Tensor, *corrections: Tensor) -> tuple[Tensor, Tensor]:
        matrix = mu = moving_average(update, mu, beta)
        if bias_correction:
            matrix = debiased(update, mu, beta, *corrections)
        elif nesterov:
            matrix = moving_average(update, mu, beta)
        return orthogonalize(matrix, ns_coeffs, steps=ns_steps, eps=eps, dtype=ns_dtype), mu

    return from_counted_rule(init, rule, numbers)


@described
def scale_by_shape(consistent_rms: Scalar | None = None) -> GradientTransformation:
    """Scales matrices by a factor of their shape, so that one learning rate suits all widths.

        sqrt(max(1, rows / columns)),    or with ``consistent_rms``    consistent_rms sqrt(max(rows, columns))

    Rows are outputs, as in ``torch.nn.Linear``.

    Example:
        >>> tx = scale_by_shape()
        >>> grads = torch.ones(4, 1)
        >>> float(tx.update(grads, tx.init(grads))[0][0, 0])
        2.0
    """
    if consistent_rms is not None:
        check_positive(consistent_rms=consistent_rms)

    def rule(update: Tensor) -> Tensor:
        rows, columns = update.shape
        if consistent_rms is not None:
            return update * (consistent_rms * math.sqrt(max(rows, columns)))
        return update * math.sqrt(max(1.0, rows / max(columns, 1)))

    return stateless(lambda updates, params: map_updates(rule, updates))


@described
@args_from(scale_by_muon, scale_by_learning_rate)
def muon(
    learning_rate: ScalarOrSchedule,
    *,
    ns_coeffs: Coefficients = COEFFICIENTS,
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = None,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = True,
    consistent_rms: Scalar | None = None,
    muon_mask: Mask | None = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
) -> GradientTransformation:
    """Muon for matrices, and AdamW for all other parameters.

        m = beta m + (1 - beta) g,    u = -lr (shape orthogonalize(m) + weight_decay p)

    Embeddings and the output layer are matrices too, but usually train better with AdamW: exclude them by
    ``muon_mask``.

    Args:
        eps: Added to the norm of the momentum, and to the denominator of AdamW.
        weight_decay: Coefficient of decoupled weight decay of the matrices.
        mask: Which of the matrices decay; see ``add_decayed_weights``.
        mu_dtype: Dtype of the momentum in both. Defaults to the parameters' dtype.
        nesterov: Whether to use Nesterov momentum in both.
        consistent_rms: See ``scale_by_shape``. With 0.2, updates are as large as AdamW's, so its learning rate and
            weight decay can be reused.
        muon_mask: Which parameters use Muon. Defaults to all with two dimensions.
        adam_learning_rate: Learning rate of AdamW. Defaults to ``learning_rate``.
        adam_b1: ``b1`` of AdamW.
        adam_b2: ``b2`` of AdamW.
        adam_eps_root: ``eps_root`` of AdamW.
        adam_weight_decay: ``weight_decay`` of AdamW.

    Example:
        >>> tx = muon(0.02, muon_mask=lambda path, leaf: leaf.ndim == 2 and path != "embedding.weight")
        >>> params = {"embedding.weight": torch.ones(9, 4), "linear.weight": torch.ones(4, 4)}
        >>> state = tx.init(params)
        >>> tree.paths(state.inner_states["muon"][0].mu), tree.paths(state.inner_states["adam"][0].mu)
        (["['linear.weight']"], ["['embedding.weight']"])

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
        Liu et al., Muon is Scalable for LLM Training, 2025.
    """
    matrices = chain(
        scale_by_muon(
            ns_coeffs=ns_coeffs,
            ns_steps=ns_steps,
            ns_dtype=ns_dtype,
            beta=beta,
            eps=eps,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
        ),
        scale_by_shape(consistent_rms),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=eps,
        eps_root=adam_eps_root,
        mu_dtype=mu_dtype,
        weight_decay=adam_weight_decay,
        nesterov=nesterov,
    )
    return partition({"muon": matrices, "adam": rest}, _labels(muon_mask))


def _labels(mask: Mask | None) -> Labels:
    def name(chosen: bool) -> str:
        return "muon" if chosen else "adam"

    def of_leaf(path: str, leaf: Tensor) -> str:
        return name(leaf.ndim == 2 if mask is None else mask(path, leaf))

    return of_leaf if mask is None or callable(mask) else tree.map(name, mask)


def _coefficients_per_step(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    check_positive_int("steps", steps)
    one_for_all = all(isinstance(number, int | float) for number in coefficients)
    each: Any = [coefficients] * steps if one_for_all else list(coefficients)
    if not each or any(len(triple) != 3 for triple in each):
        raise ValueError(f"expected three coefficients, or three per step, got {describe(coefficients)}.")
    return each
