"""Operations and bytes of the passes that a step is made of; B responses, P and S tokens of prompt and response.

A product of a [n, a] with an [a, b] matrix is 2 n a b operations. Elementwise work is counted in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from grade.planning.adapter import Trained
from grade.planning.shape import ModelShape


@dataclass(frozen=True)
class Work:
    """What one device does.

    Attributes:
        flops: operations of matrix products.
        bytes: that products read from the device's memory besides: weights. A device does both at once.
        traffic: bytes that are read and written between products: activations, logits, keys and values.
        received: bytes from other devices.
        layers: that the host launches, one after the other.
        recorded: launched by a recorded graph instead.
        fused: launched as compiled layers instead.
        exchanges: with other devices, one after the other.
    """

    flops: float = 0.0
    bytes: float = 0.0
    traffic: float = 0.0
    received: float = 0.0
    layers: float = 0.0
    recorded: float = 0.0
    fused: float = 0.0
    exchanges: float = 0.0

    @property
    def moved(self) -> float:
        """All bytes that are read from the device's memory and written to it."""
        return self.bytes + self.traffic

    def __add__(self, other: Work) -> Work:
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: float) -> Work:
        return Work(**{name: value * times for name, value in vars(self).items()})


@dataclass(frozen=True)
class Passes:
    """The passes through one model on one device.

    Attributes:
        item: bytes of a number of the frozen weights and of hidden states, 2 or 4.
        layer_bytes: that a pass reads of the layers' weights, over all layers.
        trained: what has an adapter; None: a model without one, such as a classifier.
        attention_square, attention_backward: as `Efficiency` has them.
        shards: devices that hold the layers' weights between them; each pass gathers those of the others.
        accelerated: on a GPU, where the head multiplies 16-bit numbers.
        fused: by compiled layers.
    """

    shape: ModelShape
    item: int
    layer_bytes: float
    trained: Trained | None = None
    attention_square: float = 1.0
    attention_backward: float = 2.5
    shards: int = 1
    accelerated: bool = True
    fused: bool = False

    def pairs(self, batch: float, prompt: int, length: int) -> float:
        """Pairs of positions that attention compares, for the `length` last positions of sequences; those before are in
        a cache. Without a prompt it is a whole pass."""
        return batch * length * (prompt + self.attention_square * length)

    def _products(self, adapters: bool) -> float:
        return self.shape.products + (self.trained.beside if adapters and self.trained is not None else 0)

    def _scores(self, pairs: float) -> float:
        """Attention's two products forwards."""
        return 4 * self.shape.layers * self.shape.queries * pairs

    def _weights(self, adapters: bool) -> Work:
        """Reading the layers' weights once, and receiving what other devices hold of them."""
        beside = 4.0 * self.trained.beside if adapters and self.trained is not None else 0.0
        others = self.layer_bytes * (1 - 1 / self.shards)
        layers = self.shape.layers
        exchanges = layers if self.shards > 1 else 0
        launched = {"fused" if self.fused else "layers": float(layers)}
        return Work(bytes=self.layer_bytes + beside, received=others, exchanges=exchanges, **launched)

    def forward(self, tokens: float, pairs: float, *, adapters: bool) -> Work:
        """A parallel pass. What it keeps for a backward pass is written once and read once."""
        flops = 2 * self._products(adapters) * tokens + self._scores(pairs)
        traffic = 2 * tokens * self.shape.layers * self.kept(adapters)
        return self._weights(adapters) + Work(flops=flops, traffic=traffic)

    def backward(
        self, tokens: float, pairs: float, *, adapters: bool, parameters: bool = False, recompute: bool = False
    ) -> Work:
        """The gradient at what was fed, or with `parameters` at the trained ones; with `recompute` after the forward
        pass again, whose weights are read (and gathered) for both at once."""
        flops = 2 * self._products(adapters) * tokens + self.attention_backward * self._scores(pairs)
        if parameters and self.trained is not None:
            flops += 2 * (self.trained.parameters if self.trained.everything else self.trained.beside) * tokens
            flops -= 2 * self.trained.upstream * tokens
        traffic = 2 * tokens * self.shape.layers * self.kept(adapters)
        work = self._weights(adapters) + Work(flops=flops, traffic=traffic)
        if recompute:
            again = self.forward(tokens, pairs, adapters=adapters)
            flops = again.flops - 2 * self.shape.layers * self._not_again(adapters) * tokens
            work += replace(again, flops=flops, received=0.0, exchanges=0.0)
        return work

    def _not_again(self, adapters: bool) -> int:
        """Multiplications of a layer for a token that a recomputation spares: it ends once all that the graph had kept
        is there again, and the last layer of the MLP is behind that unless it has an adapter."""
        last = [linear for linear in self.shape.linears if linear.stage == 3]
        adapted = self.trained.adapted if adapters and self.trained is not None else ()
        return sum(linear.products for linear in last if linear not in adapted)

    def kept(self, adapters: bool) -> float:
        """Bytes that a layer's graph keeps for a token: what norms and activations read, queries, keys and values as
        attention reads them (repeated for the heads that share them) and its output, and what adapters read.

        Frozen linear layers keep nothing: their gradient needs their weight alone.
        """
        shape, trained = self.shape, self.trained if adapters else None
        norms = 2 * shape.width * (4 if shape.float32_norms else self.item)
        if shape.head_norms:
            norms += 4 * (shape.queries + shape.keys)
        attention = 4 * shape.queries * self.item
        activation = (3 if shape.gated else 4) * shape.inner * self.item
        if trained is None:
            return norms + attention + activation
        if trained.everything:  # each linear layer keeps what it reads; the output of attention is one of these
            return norms + attention + activation + self.item * (2 * shape.width + shape.inner)
        if self.item < 4:  # each adapter casts what it reads
            read = sum(4 * linear.inputs for linear in trained.adapted)
        else:
            read = sum(4 * size for _, size in {(linear.stage, linear.inputs) for linear in trained.adapted})
        return norms + attention + activation + read + 4 * trained.rank * len(trained.adapted)

    def cache(self, positions: float) -> float:
        """Bytes of keys and values of so many positions, over all layers."""
        return 2 * self.shape.layers * self.shape.keys * self.item * positions

    def head(self, rows: float, forwards: int, backwards: int, chunk_rows: int | None = None) -> Work:
        """Products of `rows` hidden states with the head, or of gradients at logits with it, in chunks of rows.

        A backward product of 16-bit weights is two on a GPU, so that float32 gradients keep 16 bits. Logits are
        float32: a product writes them, and what follows reads them twice (and writes a gradient over them).
        """
        shape = self.shape
        twice = 2 if self.accelerated and self.item < 4 else 1
        chunks = 1.0 if chunk_rows is None else max(1.0, rows / chunk_rows)
        reads = chunks * shape.table * self.item * (forwards + twice * backwards)
        logits = 4 * rows * shape.vocabulary * (3 * forwards + 2 * backwards)
        return Work(flops=2 * rows * shape.table * (forwards + twice * backwards), bytes=reads + logits, layers=chunks)

    def decode(self, batch: float, prompt: int, length: int, *, adapters: bool, merged: bool = False) -> Work:
        """Sampling behind the prompts' pass: `length` tokens for each of `batch` sequences together, which is
        `length` products with the head and `length - 1` passes of one position, each of which reads all weights and the
        keys and values so far.

        Args:
            merged: the adapter was added to the weights.
        """
        shape, steps = self.shape, length - 1
        beside = adapters and not merged
        positions = batch * (steps * prompt + steps * (steps + 1) / 2)  # that the passes read, together
        flops = 2 * self._products(beside) * batch * steps + self._scores(positions)
        flops += 2 * shape.table * batch * length
        weights = self._weights(beside) * steps
        logits = 3 * 4 * batch * shape.vocabulary * length
        return weights + Work(
            flops=flops, bytes=length * shape.table * self.item, traffic=self.cache(positions) + logits
        )

    def gathered_rows(self, rows: float, k: int, tables: int, *, shared: bool = False) -> float:
        """Bytes of the candidates' rows that a local rule reads in so many tables (and once more in the head); with
        `shared` what many tokens read is read once."""
        wanted = rows * k
        return (tables + 1) * (min(wanted, self.shape.vocabulary) if shared else wanted) * self.shape.width * self.item

    def rule(self, rows: float, k: int, tables: int) -> Work:
        """One application of a local rule: k dot products with each table, and the way back through k rows of the head.
        Rows are gathered for few operations each, so bytes are what counts."""
        return Work(traffic=self.gathered_rows(rows, k, tables), layers=1)
