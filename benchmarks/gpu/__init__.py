"""What needs a GPU, measured in a few minutes: see `benchmarks/gpu/__main__.py`."""
