"""Run with TRITON_INTERPRET=1: prints Philox words of triton.language.philox as JSON."""

import json
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def philox_kernel(counter, out, seed, size: tl.constexpr):
    lane = tl.arange(0, size)
    c0 = tl.load(counter + lane).to(tl.uint32, bitcast=True)
    c1 = tl.load(counter + size + lane).to(tl.uint32, bitcast=True)
    c2 = tl.load(counter + 2 * size + lane).to(tl.uint32, bitcast=True)
    c3 = tl.load(counter + 3 * size + lane).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out + lane, w0.to(tl.int32, bitcast=True))
    tl.store(out + size + lane, w1.to(tl.int32, bitcast=True))
    tl.store(out + 2 * size + lane, w2.to(tl.int32, bitcast=True))
    tl.store(out + 3 * size + lane, w3.to(tl.int32, bitcast=True))


seed, counters = json.loads(sys.argv[1])
counter = torch.tensor(counters, dtype=torch.int64).to(torch.int32)  # [4, size], wraps
out = torch.empty_like(counter)
philox_kernel[(1,)](counter, out, seed, size=counter.shape[1])
print(json.dumps((out.long() & 0xFFFFFFFF).tolist()))
