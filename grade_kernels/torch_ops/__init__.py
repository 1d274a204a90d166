"""Chunked PyTorch implementations: plain tensors in, plain tensors out, no checks and no autograd."""

from grade_kernels.torch_ops import embedding, kl, logprob, objective, sample, scatter, sweep, vjp

__all__ = ["embedding", "kl", "logprob", "objective", "sample", "scatter", "sweep", "vjp"]
