"""Sampling and differentiating through tokens: the vocabulary-sized part of the work, in bounded memory."""

from grade_kernels.backend import backend_for
from grade_kernels.common.chunks import chunk_rows
from grade_kernels.common.head import Head
from grade_kernels.embedding import soft_embedding
from grade_kernels.kl import logits_kl
from grade_kernels.linear import linear_gumbel_topk, linear_kl, linear_token_logprob
from grade_kernels.logprob import token_logprob
from grade_kernels.objective import VocabObjective, vocab_objective
from grade_kernels.sample import gumbel_topk, place_tokens
from grade_kernels.scatter import scatter_tokens
from grade_kernels.sparse import SparseTokens
from grade_kernels.sweep import VocabHead, vocab_head
from grade_kernels.vjp import SoftTokenGrad, SoftTokenRule, candidate_grad, pull_back, soft_token_vjp

__all__ = [
    "Head",
    "SoftTokenGrad",
    "SoftTokenRule",
    "SparseTokens",
    "VocabHead",
    "VocabObjective",
    "backend_for",
    "candidate_grad",
    "chunk_rows",
    "gumbel_topk",
    "linear_gumbel_topk",
    "linear_kl",
    "linear_token_logprob",
    "logits_kl",
    "place_tokens",
    "pull_back",
    "scatter_tokens",
    "soft_embedding",
    "soft_token_vjp",
    "token_logprob",
    "vocab_head",
    "vocab_objective",
]
