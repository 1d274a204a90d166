"""The set-ups of the kernels that take soft tokens: k candidates a position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_setup import Outputs, Run, Setup, Sizes, worst
from benchmarks.kernel_tools import backend_name, both_ends, generator, normal, with_compiled
from grade_kernels import SparseTokens, reference, scatter_tokens, soft_embedding, soft_token_vjp
from grade_kernels.common.random import exponential, gumbel

SEED, TAU = 17, 0.5


def soft_tokens(n: int, v: int, k: int, device: torch.device) -> dict[str, Tensor]:
    """k distinct ids a row, spread over the vocabulary (the worst case for caches), weights, and tokens among them."""
    first = torch.randint(v, (n, 1), generator=generator(device), device=device)
    ids = (first + torch.arange(k, device=device) * (v // k)) % v
    weights = torch.randn(n, k, generator=generator(device, 1), device=device).mul_(2.0).softmax(-1)
    place = torch.randint(k, (n, 1), generator=generator(device, 2), device=device)
    return {"ids": ids, "weights": weights, "tokens": ids.gather(-1, place)[:, 0]}


def soft_embedding_setup(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, hard: bool, table: bool) -> Setup:
    """Forward and backward: to the weights, and with `table` to the embedding table too."""
    n, v, d, k = sizes.rows, sizes.vocab, sizes.width, sizes.k
    weight = normal(v, d, dtype=dtype, device=device, std=0.02)
    arguments = soft_tokens(n, v, k, device) | {"weight": weight}
    arrive, rows = normal(n, d, dtype=dtype, device=device, std=1.0, seed=1), both_ends(n, device)
    checked = arguments["ids"][rows, 0]  # rows of the table whose gradient is checked

    def textbook(ids: Tensor, weights: Tensor, tokens: Tensor, weight: Tensor) -> Outputs:
        soft = reference.soft_embedding(weights.to(weight.dtype), ids, weight)
        return {"embedding": weight[tokens] - soft.detach() + soft if hard else soft}

    def ours(ids: Tensor, weights: Tensor, tokens: Tensor, weight: Tensor) -> Outputs:
        mass = torch.empty((), device=weights.device).expand(tokens.shape)  # not read
        return {"embedding": soft_embedding(SparseTokens(ids, weights, tokens, mass, hard), weight)}

    def view(got: Outputs, rows: Tensor) -> Outputs:
        return {name: t[checked if name == "d_weight" else rows] for name, t in got.items()}

    def error(got: Outputs) -> float:
        ids, weights, tokens = (arguments[name][rows] for name in ("ids", "weights", "tokens"))
        weights, incoming = weights.double().requires_grad_(), arrive[rows].double()
        soft = reference.soft_embedding(weights, ids, weight.double())
        (d_weights,) = torch.autograd.grad((soft * incoming).sum(), weights)
        exact = {"embedding": weight[tokens].double() if hard else soft.detach(), "d_weights": d_weights}
        if table:  # the rows `checked` of the dense product's gradient, from all positions
            shares = [(arguments["weights"].double() * (arguments["ids"] == i)).sum(-1) for i in checked]
            exact["d_weight"] = torch.stack(shares) @ arrive.double()
        return worst(got, exact)

    shared: dict[str, Any] = {
        "mode": "forward+backward",
        "wrt": ("weights", "weight") if table else ("weights",),
        "cotangents": lambda: {"embedding": arrive},
        "view": view,
    }
    size = weight.element_size()
    # [N, k, d] gathered, and again as the gradient of the gathered rows where the table wants one
    needs = n * k * d * size * (3 if table else 2)
    runs = [
        Run("ours", backend_name("soft_embedding", weight), ours, **shared),
        *with_compiled(Run("textbook", "torch", textbook, **shared, needs=needs)),
    ]
    forward = n * d * size * (2 if hard else 1 + k)  # the token's row, or every candidate's; the result
    backward = n * k * d * size + n * d * size + n * k * 16  # candidates' rows, gradient; ids, weights, their gradient
    formula = f"forward: {'one row' if hard else 'k rows'} a position; backward: k rows a position"
    moved = forward + backward
    if table:
        moved += n * k * d * size + v * d * size  # the incoming row for each candidate; the table's gradient
        formula += ", k incoming rows a position, table gradient written"
    variant = f"{'hard' if hard else 'soft'} forward+backward{', table' if table else ''}"
    shape = f"N={n} V={v} d={d} k={k}"
    return Setup("soft_embedding", variant, shape, dtype, arguments, rows, error, moved, formula, runs)


def soft_token_vjp_setup(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, estimator: str) -> Setup:
    n, v, d, k = sizes.rows, sizes.vocab, sizes.width, sizes.k
    draws = {"gumbel": 1, "rao": sizes.samples}.get(estimator, 0)
    table = normal(v, d, dtype=dtype, device=device, std=0.02)
    grad = normal(n, d, dtype=dtype, device=device, std=1.0, seed=1)
    chosen, rows = soft_tokens(n, v, k, device), both_ends(n, device)
    ids, tokens = chosen["ids"], chosen["tokens"]
    logits = torch.randn(n, k, generator=generator(device, 3), device=device).mul_(2.0)

    def noisy(rows: Tensor) -> Tensor:
        """z [M, rows, k] of the draws in float64, by the textbook, from the noise that ours regenerates."""
        values, support = logits[rows].double(), ids[rows]
        if estimator == "gumbel":
            return (values + gumbel(SEED, 0, rows, support, torch.float64))[None]
        place = (support == tokens[rows, None]).to(torch.int8).argmax(-1)
        noise = [exponential(SEED, draw, rows, support, torch.float64) for draw in range(1, draws + 1)]
        return torch.stack([reference.conditional_gumbel(values, place, e) for e in noise]) if noise else values[None]

    def textbook(grad: Tensor, table: Tensor, logits: Tensor, ids: Tensor, tokens: Tensor, z: Tensor) -> Outputs:
        v = torch.einsum("nkd,nd->nk", table[ids], grad).to(logits.dtype)
        one_hot = (ids == tokens[:, None]).to(logits.dtype)
        return {"dlogits": reference.soft_token_vjp(estimator, logits, v, TAU, z, one_hot)}

    def ours(grad: Tensor, table: Tensor, logits: Tensor, ids: Tensor, tokens: Tensor, z: Tensor) -> Outputs:
        out = soft_token_vjp(
            grad,
            table,
            logits=logits,
            indices=ids,
            tokens=tokens,
            tau=TAU,
            estimator=estimator,
            seed=SEED,
            samples=sizes.samples,
        )
        return {"dlogits": out.dlogits}

    def error(got: Outputs) -> float:
        wide = grad[rows].double(), table.double(), logits[rows].double(), ids[rows], tokens[rows], noisy(rows)
        return worst(got, textbook(*wide))

    every = torch.arange(n, device=device)
    z = torch.cat([noisy(some).float() for some in every.split(1024)], dim=1)
    arguments = {"grad": grad, "table": table, "logits": logits, "ids": ids, "tokens": tokens, "z": z}
    size = table.element_size()
    # [N, k, d] gathered; the Jacobian [N, k, k] with two temporaries
    needs = max(n * k * d * size, 3 * n * k * k * 4) + n * k * d * size
    runs = [
        Run("ours", backend_name("soft_token_vjp", table, logits), ours),
        *with_compiled(Run("textbook", "torch", textbook, needs=needs, note="the noise is given, not drawn")),
    ]
    moved = n * k * d * size + n * d * size + n * k * (8 + 4 + 4) + n * 8
    formula = "k embedding rows a position; incoming gradient, ids, logits; result"
    shape = f"N={n} V={v} d={d} k={k}" + (f" M={draws}" if estimator == "rao" else "")
    return Setup("soft_token_vjp", estimator, shape, dtype, arguments, rows, error, moved, formula, runs)


def scatter_setup(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, hard: bool) -> Setup:
    n, v, k = sizes.rows, sizes.vocab, sizes.k
    arguments, rows = soft_tokens(n, v, k, device), both_ends(n, device)

    def textbook(ids: Tensor, weights: Tensor, tokens: Tensor) -> Outputs:
        soft = torch.zeros(weights.shape[0], v, dtype=weights.dtype, device=weights.device).scatter(-1, ids, weights)
        if not hard:
            return {"dense": soft}
        one_hot = torch.zeros_like(soft).scatter(-1, tokens[:, None], 1.0)
        return {"dense": one_hot - soft.detach() + soft}

    def ours(ids: Tensor, weights: Tensor, tokens: Tensor) -> Outputs:
        mass = torch.empty((), device=weights.device).expand(tokens.shape)  # not read
        return {"dense": scatter_tokens(SparseTokens(ids, weights, tokens, mass, hard), v)}

    def error(got: Outputs) -> float:
        picked = {name: x[rows] for name, x in arguments.items()}
        return worst(got, textbook(picked["ids"], picked["weights"].double(), picked["tokens"]))

    runs = [
        Run("ours", backend_name("scatter_tokens", arguments["weights"]), ours, needs=4 * n * v),
        *with_compiled(Run("textbook", "torch", textbook, needs=4 * n * v * (4 if hard else 2))),
    ]
    moved = 4 * n * v + (8 * n if hard else 12 * n * k)
    formula = "dense fp32 written; " + ("tokens read" if hard else "ids int64 and weights fp32 read")
    variant = f"{'hard' if hard else 'soft'} forward"
    return Setup("scatter_tokens", variant, f"N={n} V={v} k={k}", dtype, arguments, rows, error, moved, formula, runs)
