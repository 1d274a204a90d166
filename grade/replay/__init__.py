"""The gradient through generated tokens, by one parallel pass and a few hops."""
