"""Attention masks and targets for packed rows, which keep the documents of a row independent."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(segments: Tensor, *, causal: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the block-diagonal mask with which each token attends only to its own document.

    ``F.scaled_dot_product_attention`` accepts it, as do transformers models, as ``attention_mask``. Positions that
    restart at each document do not separate documents by themselves. Padding attends to padding, because an empty row
    of the mask would make the softmax NaN.

    Args:
        segments: The number of each token's document, 0 for padding, integer [batch, length]. A bool mask of padded
            rows also works.
        causal: Whether tokens attend only to themselves and earlier tokens.
        dtype: The floating dtype of a mask to add to attention scores, which is 0 where tokens attend and the dtype's
            minimum elsewhere. By default the mask is bool, True where tokens attend.

    Returns:
        The mask, [batch, 1, length, length], indexed by query and then key.

    Example:
        >>> attention_mask(torch.tensor([[1, 1, 2, 0]])).int()
        tensor([[[[1, 0, 0, 0],
                  [1, 1, 0, 0],
                  [0, 0, 1, 0],
                  [0, 0, 0, 1]]]], dtype=torch.int32)
    """
    allowed = segments[:, None, :, None] == segments[:, None, None, :]
    if causal:
        at = torch.arange(segments.shape[1], device=segments.device)
        allowed = allowed & (at[:, None] >= at)
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def next_tokens(tokens: Tensor, segments: Tensor, *, shift: bool = True, ignore: int = -100) -> Tensor:
    """Returns the targets of a language model: for each token, the next token of its document.

    The last token of a document has no target, and neither has padding, so no document predicts the start of another.

    Args:
        tokens: Integer [batch, length].
        segments: The number of each token's document, 0 for padding, integer [batch, length]. A bool mask of padded
            rows also works.
        shift: Whether a target is placed at the token that predicts it. Otherwise targets stay in place, for models
            that shift ``labels`` themselves, such as those of transformers.
        ignore: The value at positions without a target. ``F.cross_entropy`` ignores -100.

    Returns:
        The targets, int64 [batch, length].

    Example:
        >>> tokens, segments = torch.tensor([[5, 6, 7, 8, 0]]), torch.tensor([[1, 1, 2, 2, 0]])
        >>> next_tokens(tokens, segments)
        tensor([[   6, -100,    8, -100, -100]])
        >>> next_tokens(tokens, segments, shift=False)
        tensor([[-100,    6, -100,    8, -100]])
    """
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    found = tokens[:, 1:].to(torch.int64).masked_fill(~follows, ignore)
    nothing = found.new_full((tokens.shape[0], 1), ignore)  # len() would specialize symbolic sizes
    return torch.cat([found, nothing] if shift else [nothing, found], 1)
