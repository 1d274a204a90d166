"""The set-ups of the kernels that read or write rows of the vocabulary; `CASES` lists these and the sparse ones.

A set-up makes the inputs, says which bytes must move, and holds the implementations and the textbook in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernel_cases_sparse as sparse
from benchmarks.kernel_setup import Goal, Outputs, Run, Setup, Sizes, liger, relative_error, worst
from benchmarks.kernel_tools import backend_name, both_ends, generator, normal, with_compiled
from grade_kernels import Head, gumbel_topk, logits_kl, reference, scatter_tokens, token_logprob, vocab_head
from grade_kernels.backend import interpreting
from grade_kernels.common.random import gumbel

SEED, TAU = 17, 0.5


def plane(sizes: Sizes, count: float = 1) -> int:
    """Bytes of `count` float32 arrays [N, V]."""
    return int(4 * count * sizes.rows * sizes.vocab)


def shape_of(sizes: Sizes, *more: str) -> str:
    return " ".join([f"N={sizes.rows} V={sizes.vocab}", *(f"{name}={getattr(sizes, NAMES[name])}" for name in more)])


NAMES = {"d": "width", "k": "k", "M": "samples"}


# gumbel_topk


def dense_gumbel_topk(logits: Tensor, k: int, tau: float) -> Outputs:
    """What the paper writes down: top-k, noise, softmax, and the dense straight-through one-hot [N, V]."""
    values, ids = logits.topk(k)
    values = values.float()
    noise = -torch.empty_like(values).exponential_().log()
    position, weights = reference.gumbel_softmax(values, noise, tau)
    tokens = ids.gather(-1, position[:, None])
    soft = torch.zeros(logits.shape, device=logits.device).scatter(-1, ids, weights)
    hard = torch.zeros_like(soft).scatter(-1, tokens, 1.0)
    dense = hard - soft.detach() + soft
    return {"dense": dense, "weights": weights, "ids": ids, "tokens": tokens.squeeze(-1), "noise": noise}


def our_gumbel_topk(logits: Tensor, k: int, tau: float, dense: bool = False) -> Outputs:
    tokens = gumbel_topk(logits, k, tau, seed=SEED)
    names = {"weights": tokens.weights, "ids": tokens.indices, "tokens": tokens.tokens}
    return names | ({"dense": scatter_tokens(tokens, logits.shape[-1])} if dense else {})


def gumbel_topk_setup(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, mode: str, decode: int = 0) -> Setup:
    if decode:
        sizes = replace(sizes, rows=decode, vocab=sizes.decode_vocab)
    n, v, k = sizes.rows, sizes.vocab, sizes.k
    logits = normal(n, v, dtype=dtype, device=device, std=3.0)
    price = torch.randn(v, generator=generator(device), device=device)  # the gradient at the one-hot, alike in all rows
    rows = both_ends(n, device)
    backward = "backward" in mode

    def error(got: Outputs) -> float:
        picked, ids = logits[rows].double().requires_grad_(), got["ids"]
        noise = got["noise"].double() if "noise" in got else gumbel(SEED, 0, rows, ids, torch.float64)
        best = reference.topk(picked, k)
        values = picked.gather(-1, ids)
        _, weights = reference.gumbel_softmax(values, noise, TAU)
        (d_logits,) = torch.autograd.grad((weights * price[ids].double()).sum(), picked, retain_graph=True)
        errors = [relative_error(values, picked.gather(-1, best))]
        errors.append(worst(got, {"weights": weights, "d_logits": d_logits}))
        z, place = (values + noise).detach(), (ids == got["tokens"][:, None]).to(torch.int8).argmax(-1, keepdim=True)
        # The token must have won; a near-tie in float32 may go either way.
        errors.append(float((z.amax(-1) - z.gather(-1, place)[:, 0]).max()) / 10)
        errors.append(float((ids.gather(-1, place)[:, 0] != got["tokens"]).any()))
        if "noise" not in got:  # ours promise the order of equal logits too
            errors.append(relative_error(ids, best))
        if "dense" in got:
            one_hot = torch.zeros_like(picked).scatter(-1, got["tokens"][:, None], 1.0)
            errors.append(relative_error(got["dense"], one_hot))
        return max(errors)

    def our_price() -> Outputs:
        return {"weights": price[gumbel_topk(logits, k, TAU, seed=SEED).indices]}

    def textbook_price() -> Outputs:
        return {"dense": price.expand(n, v).contiguous()}

    shared: dict[str, Any] = {"mode": mode, "wrt": ("logits",) if backward else ()}
    ours = Run(
        "ours",
        backend_name("gumbel_topk", logits),
        partial(our_gumbel_topk, k=k, tau=TAU),
        **shared,
        cotangents=our_price if backward else dict,
    )
    dense = Run(
        "ours, dense",
        ours.backend,
        partial(our_gumbel_topk, k=k, tau=TAU, dense=True),
        **shared,
        cotangents=textbook_price if backward else dict,
        needs=plane(sizes, 2),
        note="with the dense one-hot made from the sparse result",
    )
    textbook = Run(
        "textbook",
        "torch",
        partial(dense_gumbel_topk, k=k, tau=TAU),
        **shared,
        cotangents=textbook_price if backward else dict,
        needs=plane(sizes, 6 if backward else 4),
        note="top-k, noise, softmax, dense one-hot",
    )
    if decode:
        ours.goal = Goal("ms", 0.030)
        graph = replace(ours, name="ours, graph", graph=True, note="replay of a CUDA graph: no launches")
        graph.missing = "" if device.type == "cuda" else "needs a GPU"
        runs = [ours, graph, textbook]
    else:
        runs = [ours, dense, *with_compiled(textbook)]
        runs[2].goal, runs[3].goal = Goal("ratio", 8), Goal("ratio", 3)
    size = logits.element_size()
    moved = n * v * size + n * k * 12 + n * 12
    formula = "logits read once; ids int64, weights fp32; token, mass"
    if backward:
        moved += n * v * size + n * k * 16
        formula += "; backward: ids, weights, their gradient read, dense gradient written"
    variant = f"decode {n}" if decode else mode
    shape = shape_of(sizes, "k")
    return Setup("gumbel_topk", variant, shape, dtype, {"logits": logits}, rows, error, moved, formula, runs)


# logits_kl


def logits_kl_setup(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, *, mode: str, sides: tuple[str, ...] = ("logits",)
) -> Setup:
    n, v = sizes.rows, sizes.vocab
    logits = normal(n, v, dtype=dtype, device=device, std=3.0)
    ref_logits = normal(n, v, dtype=dtype, device=device, std=0.3, seed=1).add_(logits)
    rows, arrive = both_ends(n, device), torch.linspace(0.5, 1.5, n, device=device)

    def error(got: Outputs) -> float:
        pair = (logits[rows].double().requires_grad_(), ref_logits[rows].double().requires_grad_())
        kl = reference.kl(*pair)
        grads = torch.autograd.grad((kl * arrive[rows].double()).sum(), pair, retain_graph=True)
        (mean_grad,) = torch.autograd.grad(kl.sum(), pair[0])
        return worst(got, {"kl": kl, "d_logits": grads[0], "d_ref_logits": grads[1], "d_mean": mean_grad})

    backward = mode != "forward"
    shared: dict[str, Any] = {
        "mode": mode,
        "wrt": sides if backward else (),
        "cotangents": lambda: {"kl": arrive} if backward else {},
    }

    def our_kl(logits: Tensor, ref_logits: Tensor) -> Outputs:
        return {"kl": logits_kl(logits, ref_logits)}

    def textbook_kl(logits: Tensor, ref_logits: Tensor) -> Outputs:
        return {"kl": reference.kl(logits.float(), ref_logits.float())}

    ours = Run("ours", backend_name("logits_kl", logits), our_kl, **shared)
    widened = 0 if dtype == torch.float32 else 2
    textbook = Run("textbook", "torch", textbook_kl, **shared, needs=plane(sizes, (8 if backward else 6) + widened))
    runs = [ours, *with_compiled(textbook)]
    if mode == "forward+backward":
        runs.append(liger_kl(n, device, plane(sizes, 7 + widened)))
    size, one_pass = logits.element_size(), len(sides)
    moved, formula = 2 * n * v * size + 4 * n, "both logits read once; KL"
    if mode == "backward":
        moved, formula = (2 + one_pass) * n * v * size + 32 * n, "both logits read, the wanted gradients written"
        ours.goal = Goal("copy_percent", 80)
    elif mode == "forward":
        ours.goal = Goal("copy_percent", 85)
    else:
        moved, formula = (4 + one_pass) * n * v * size + 36 * n, "forward: both logits; backward: both again, gradient"
    variant = mode if one_pass == 1 else f"{mode}, both sides"
    arguments = {"logits": logits, "ref_logits": ref_logits}
    return Setup("logits_kl", variant, shape_of(sizes), dtype, arguments, rows, error, moved, formula, runs)


def liger_kl(n: int, device: torch.device, needs: int) -> Run:
    """JSD at beta 1, which is kl(policy || ref), on log-softmaxes by PyTorch; a mean, so gradients are n times less."""
    found, missing = liger("liger_jsd")

    def fn(logits: Tensor, ref_logits: Tensor) -> Outputs:
        pair = (x.float().log_softmax(-1) for x in (logits, ref_logits))
        return {"mean": found(*pair, None, 1.0)}

    return Run(
        "liger",
        "triton",
        fn,
        "forward+backward",
        ("logits",),
        lambda: {"mean": torch.ones((), device=device)},
        lambda got, rows: {"d_mean": got["d_logits"][rows].double() * n},
        needs=needs,
        missing=missing or needs_gpu(device),
        note="liger_jsd, beta=1",
    )


def needs_gpu(device: torch.device) -> str:
    return "" if device.type == "cuda" or interpreting() else "needs a GPU"


# token_logprob


def token_logprob_setup(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, mode: str) -> Setup:
    n, v = sizes.rows, sizes.vocab
    logits = normal(n, v, dtype=dtype, device=device, std=3.0)
    tokens = torch.randint(v, (n,), generator=generator(device), device=device)
    rows, arrive = both_ends(n, device), torch.linspace(0.5, 1.5, n, device=device)

    def error(got: Outputs) -> float:
        picked = logits[rows].double().requires_grad_()
        logprob, entropy = reference.token_logprob(picked, tokens[rows])
        arriving = arrive[rows].double()
        total = (logprob * arriving - entropy * arriving / 2).sum()
        (d_logits,) = torch.autograd.grad(total, picked, retain_graph=True)
        (d_nll,) = torch.autograd.grad(-logprob.sum(), picked)
        return worst(got, {"logprob": logprob, "entropy": entropy, "d_logits": d_logits, "d_nll": d_nll})

    backward = mode != "forward"
    shared: dict[str, Any] = {
        "mode": mode,
        "wrt": ("logits",) if backward else (),
        "cotangents": lambda: {"logprob": arrive, "entropy": -arrive / 2} if backward else {},
    }

    def ours(logits: Tensor, tokens: Tensor) -> Outputs:
        logprob, entropy = token_logprob(logits, tokens)
        return {"logprob": logprob, "entropy": entropy}

    def dense(logits: Tensor, tokens: Tensor) -> Outputs:
        logprob, entropy = reference.token_logprob(logits.float(), tokens)
        return {"logprob": logprob, "entropy": entropy}

    textbook = Run("textbook", "torch", dense, **shared, needs=plane(sizes, 7 if backward else 5))
    runs = [Run("ours", backend_name("token_logprob", logits), ours, **shared), *with_compiled(textbook)]
    if mode != "backward":
        runs.append(liger_nll(mode, device, plane(sizes, 2)))
    size = logits.element_size()
    moved, formula = n * v * size + 16 * n, "logits read once; token, log-probability, entropy"
    if mode == "backward":
        moved, formula = 2 * n * v * size + 32 * n, "logits read, gradient written; token, statistics"
    elif backward:
        moved, formula = 3 * n * v * size + 48 * n, "forward: logits; backward: logits again, gradient"
    arguments = {"logits": logits, "tokens": tokens}
    return Setup("token_logprob", mode, shape_of(sizes), dtype, arguments, rows, error, moved, formula, runs)


def liger_nll(mode: str, device: torch.device, needs: int) -> Run:
    """Cross-entropy: the log-probability without the entropy; it writes the gradient over the logits."""
    found, missing = liger("liger_cross_entropy")
    forward = mode == "forward"

    def fn(logits: Tensor, tokens: Tensor) -> Outputs:
        return {"nll": found(logits, tokens, reduction="none" if forward else "sum")}

    def view(got: Outputs, rows: Tensor) -> Outputs:
        return {"logprob": -got["nll"][rows]} if forward else {"d_nll": got["d_logits"][rows]}

    ones = {} if forward else {"nll": torch.ones((), device=device)}
    return Run(
        "liger",
        "triton",
        fn,
        mode,
        () if forward else ("logits",),
        lambda: ones,
        view,
        ("logits",),
        needs,
        missing=missing or needs_gpu(device),
        note="liger_cross_entropy: no entropy, in place",
    )


# vocab_head


def vocab_head_setup(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, grad: bool) -> Setup:
    n, v, d, k = sizes.rows, sizes.vocab, sizes.width, sizes.k
    hidden = normal(n, d, dtype=dtype, device=device, std=3.0)
    ref_hidden = normal(n, d, dtype=dtype, device=device, std=0.5, seed=1).add_(hidden)
    weight = normal(v, d, dtype=dtype, device=device, std=d**-0.5, seed=2)
    tokens = torch.randint(v, (n,), generator=generator(device), device=device)
    rows, fields = both_ends(n, device), ("kl", "entropy", "logprob")

    def dense(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, tokens: Tensor) -> Outputs:
        """Both [N, V] logits at once; autograd for the KL only."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits, ref_logits = (reference.head_logits(x, Head(weight)).to(wide) for x in (hidden, ref_hidden))
        kl, fixed = reference.kl(logits, ref_logits), logits.detach()
        logprob, entropy = reference.token_logprob(fixed, tokens)
        return {"kl": kl, "entropy": entropy, "logprob": logprob, "values": fixed.topk(k).values}

    def error(got: Outputs) -> float:
        pair = (hidden[rows].double().requires_grad_(), ref_hidden[rows].double().requires_grad_())
        exact = dense(*pair, weight.double(), tokens[rows])
        grads = torch.autograd.grad(exact["kl"].sum(), pair)
        exact |= {"d_hidden": grads[0], "d_ref_hidden": grads[1]}
        if "values" in got:  # with the token in the last place where the top-k misses it
            got, exact["values"] = got | {"values": got["values"][:, : k - 1]}, exact["values"][:, : k - 1]
        return worst(got, exact)

    def ours(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, tokens: Tensor) -> Outputs:
        out = vocab_head(hidden, Head(weight), ref_hidden=ref_hidden, k=k, tokens=tokens, grad=grad)
        found = {name: getattr(out, name) for name in fields} | {"values": out.logits}
        return found | ({"d_hidden": out.grad_hidden, "d_ref_hidden": out.grad_ref_hidden} if grad else {})

    mode, wrt = ("forward+backward", ("hidden", "ref_hidden")) if grad else ("forward", ())
    textbook = Run(
        "textbook",
        "torch",
        dense,
        mode,
        wrt,
        needs=plane(sizes, 12 if grad else 9),
        cotangents=lambda: {"kl": torch.ones(n, device=device)} if grad else {},
    )
    runs = [Run("ours", backend_name("vocab_head", hidden), ours), *with_compiled(textbook)]
    if grad:
        runs.append(liger_head(n, device, plane(sizes, 3)))
    size = hidden.element_size()
    moved = (2 * n * d + v * d) * size + n * k * 12 + n * 28 + (2 * n * d * 4 if grad else 0)
    formula = "hidden states and head read once, sparse results" + (", both gradients written" if grad else "")
    arguments = {"hidden": hidden, "ref_hidden": ref_hidden, "weight": weight, "tokens": tokens}
    return Setup(
        "vocab_head",
        mode,
        shape_of(sizes, "d", "k"),
        dtype,
        arguments,
        rows,
        error,
        moved,
        formula,
        runs,
        flops=2 * n * v * d * (4 if grad else 2),
    )


def liger_head(n: int, device: torch.device, needs: int) -> Run:
    """Fused linear JSD at beta 1: the mean of kl(policy || ref) and its gradient to `hidden` only."""
    found, missing = liger("liger_fused_linear_jsd")

    def fn(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, tokens: Tensor) -> Outputs:
        return {"mean": found(hidden, weight, ref_hidden, weight, None, 1.0)}

    return Run(
        "liger",
        "triton",
        fn,
        "forward+backward",
        ("hidden",),
        lambda: {"mean": torch.ones((), device=device)},
        lambda got, rows: {"d_hidden": got["d_hidden"][rows].double() * n},
        needs=needs,
        missing=missing or needs_gpu(device),
        note="liger_fused_linear_jsd, beta=1: one side, no top-k",
    )


# All of them


@dataclass(frozen=True)
class Case:
    kernel: str
    build: Callable[[Sizes, torch.dtype, torch.device], Setup]
    only: torch.dtype | None = None  # measured in this one alone
    decode: bool = False  # small as it is


def cases(sizes: Sizes) -> list[Case]:
    """Every set-up, unbuilt, in the order of the table."""
    found = [Case("gumbel_topk", partial(gumbel_topk_setup, mode=mode)) for mode in ("forward", "forward+backward")]
    for rows in sizes.decode_rows:
        found.append(Case("gumbel_topk", partial(gumbel_topk_setup, mode="forward", decode=rows), decode=True))
    for mode in ("forward", "backward", "forward+backward"):
        found.append(Case("logits_kl", partial(logits_kl_setup, mode=mode)))
    found.append(Case("logits_kl", partial(logits_kl_setup, mode="backward", sides=("logits", "ref_logits"))))
    for mode in ("forward", "backward", "forward+backward"):
        found.append(Case("token_logprob", partial(token_logprob_setup, mode=mode)))
    found += [Case("vocab_head", partial(vocab_head_setup, grad=grad)) for grad in (False, True)]
    for hard, table in ((True, False), (False, False), (False, True)):
        found.append(Case("soft_embedding", partial(sparse.soft_embedding_setup, hard=hard, table=table)))
    for estimator in ("gumbel", "rao", "straight_through", "reinmax"):
        found.append(Case("soft_token_vjp", partial(sparse.soft_token_vjp_setup, estimator=estimator)))
    found += [Case("scatter_tokens", partial(sparse.scatter_setup, hard=hard), torch.float32) for hard in (True, False)]
    return found


KERNELS = (
    "gumbel_topk",
    "logits_kl",
    "token_logprob",
    "vocab_head",
    "soft_embedding",
    "soft_token_vjp",
    "scatter_tokens",
)
