"""LAMB: AdamW with steps scaled to the norm of each parameter."""

from __future__ import annotations

from fxtrain.core import Scalar, args_from
from fxtrain.optim._adam import adamw, scale_by_adam
from fxtrain.optim._decay import add_decayed_weights
from fxtrain.optim._masking import Mask
from fxtrain.optim._scaling import ScalarOrSchedule, scale_by_learning_rate, scale_by_trust_ratio
from fxtrain.optim._transform import GradientTransformation, chain


@args_from(adamw)
def lamb(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """LAMB: AdamW with each leaf's step scaled to the norm of its parameter, for training with large batches.

        d = adam(g) + weight_decay p,    u = -lr |p| / |d| d

    Args:
        weight_decay: Coefficient of decoupled weight decay.

    Example:
        >>> import torch
        >>> tx = lamb(0.1)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([-14.1437,  14.1437])

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020.
    """
    return chain(
        scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
