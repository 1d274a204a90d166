"""Chunked PyTorch implementations: plain tensors in, plain tensors out, no checks and no autograd."""
