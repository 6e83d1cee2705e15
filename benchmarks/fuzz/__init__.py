"""Fuzz: random programs over the grammar, each run whole, cut, resumed and resumed once more."""
