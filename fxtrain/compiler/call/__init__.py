"""The call path: from a state and a batch to the inputs of an executable, and back to a new state."""
