"""Parameters by name, their gradients, and one update of a transformation."""

import torch

from fxtrain import tree

PARAMS = {"body.bias": torch.tensor([1.0, 2.0]), "body.weight": torch.ones(2, 2), "head.weight": torch.ones(2, 2)}
ONES = tree.map(torch.ones_like, PARAMS)


def one(tx, grads=ONES, params=PARAMS):
    return tx.update(grads, tx.init(params), params)[0]
