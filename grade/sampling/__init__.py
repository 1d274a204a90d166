"""Sampling without a graph, token by token; or from another engine."""
