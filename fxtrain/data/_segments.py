"""Segments: what a model needs of packed rows, so that each document is seen as if it were alone."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(segments: Tensor, *, causal: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the block-diagonal mask with which each token attends to its own document only.

    ``F.scaled_dot_product_attention`` takes it, and models of transformers as ``attention_mask``. Positions that start
    again at each document do not separate documents by themselves. Padding attends to padding, so no row of the mask
    is empty, which would make NaN of a softmax.

    Args:
        segments: The number of each token's document, 0 for padding, integer [batch, length]. A bool mask of padded
            rows serves too.
        causal: Whether tokens attend to earlier tokens and themselves only.
        dtype: Of a floating mask that is added to attention scores: 0, and the lowest number where tokens do not
            attend. By default the mask is bool, True where they do.

    Returns:
        [batch, 1, length, length], from query to key.

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
    """Returns the targets of a language model: for each token the next one of its document.

    The last token of a document has no target, and padding has none, so no document predicts the beginning of another.

    Args:
        tokens: Integer [batch, length].
        segments: The number of each token's document, 0 for padding, integer [batch, length]. A bool mask of padded
            rows serves too.
        shift: Whether targets stand where they are predicted. Without it, they stand where they are, for models that
            shift ``labels`` themselves, as those of transformers.
        ignore: What stands where there is no target. ``F.cross_entropy`` leaves -100 out.

    Returns:
        int64 [batch, length].

    Example:
        >>> tokens, segments = torch.tensor([[5, 6, 7, 8, 0]]), torch.tensor([[1, 1, 2, 2, 0]])
        >>> next_tokens(tokens, segments)
        tensor([[   6, -100,    8, -100, -100]])
        >>> next_tokens(tokens, segments, shift=False)
        tensor([[-100,    6, -100,    8, -100]])
    """
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    found = tokens[:, 1:].to(torch.int64).masked_fill(~follows, ignore)
    nothing = found.new_full((tokens.shape[0], 1), ignore)  # len() is a number even where sizes are symbols
    return torch.cat([found, nothing] if shift else [nothing, found], 1)
