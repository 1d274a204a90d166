"""Triton kernels and their launchers, nothing else: module for module the operations of `torch_ops`."""

from grade_kernels.backend import check_triton

check_triton()
