"""Triton kernels and their launchers, nothing else: module for module the operations of `torch_ops`."""

from grade_kernels.common.environment import check_triton

check_triton()

from grade_kernels.triton_ops import embedding, kl, logprob, objective, sample, scatter, sweep, vjp  # noqa: E402

__all__ = ["embedding", "kl", "logprob", "objective", "sample", "scatter", "sweep", "vjp"]
