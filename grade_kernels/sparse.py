"""SparseTokens: one sampled (soft) token per position, over k candidates of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SparseTokens:
    """What `gumbel_topk` returns and `soft_embedding` takes.

    Attributes
    ----------
    indices : int64 [..., k]
        Candidate ids, the support.
    weights : float32 [..., k] (float64 for float64 logits)
        Gumbel-Softmax weights of the candidates, summing to 1; they carry the gradient.
    tokens : int64 [...]
        The sampled ids.
    mass : like weights, [...]
        Probability that the full distribution gives the support; no gradient.
    hard : bool
        True: the forward value is the token and the weights serve the backward pass only
        (straight-through).  False: the forward value is the mixture.
    """

    indices: Tensor
    weights: Tensor
    tokens: Tensor
    mass: Tensor
    hard: bool

    def scatter(self, vocab_size: int) -> Tensor:
        """The dense [..., vocab_size] distribution, in the dtype of the weights.

        Soft: the weights at their ids.  Hard: exactly the one-hot of the token, with the gradient of the
        weights.  For small vocabularies and tests; it is what the sparse form exists to avoid.
        """
        zeros = self.weights.new_zeros(*self.tokens.shape, vocab_size)
        dense = zeros.scatter_add(-1, self.indices, self.weights)
        if not self.hard:
            return dense
        one_hot = zeros.scatter(-1, self.tokens.unsqueeze(-1), 1.0)
        return one_hot + (dense - dense.detach())
