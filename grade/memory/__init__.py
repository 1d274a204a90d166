"""What a run needs of memory, measured before it starts: whether it fits, and whether activations are recomputed."""
