"""Passes that optimize a traced graph before it is compiled, and the operators that they insert."""
