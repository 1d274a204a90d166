"""One file per method, readable top to bottom, losses as pure functions."""
