"""Each kernel once at small odd sizes, for compute-sanitizer: nothing is compared, memory accesses are watched.

python benchmarks/sanitized.py [DEVICE]
"""

import sys

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from rome_fast.kernels import (
    add_rms_norm,
    gated_activation,
    low_rank_apply_,
    prefixed_solve,
    rank_update_,
    rotate_heads,
    second_moment_,
    suffix_attention,
)


def main(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for n, d in ((70, 272), (33, 129)):
            x = torch.randn(n, d, device=device).to(dtype)
            total = torch.zeros(d, d, device=device, dtype=torch.float64)
            second_moment_(total, x)
            second_moment_(total, x, torch.arange(n, device=device) % 3 > 0)
        weight = torch.randn(33, 130, device=device).to(dtype)
        rank_update_(weight, torch.randn(33, 3, device=device), torch.randn(3, 130, device=device))
        rank_update_(weight.T, torch.randn(130, 1, device=device), torch.randn(1, 33, device=device))
        y, x = torch.randn(9, 65, device=device).to(dtype), torch.randn(9, 130, device=device).to(dtype)
        left, right = torch.randn(4, 65, device=device), torch.randn(4, 130, device=device)
        low_rank_apply_(y, x, left, right, torch.arange(9, device=device) % 5 - 1)
        query, key, value = (torch.randn(3, h, 5, 20, device=device).to(dtype).requires_grad_() for h in (14, 2, 2))
        contexts, middle = (torch.randn(s, 2, 17, 20, device=device).to(dtype) for s in (2, 3))
        index, own = torch.arange(3, device=device) % 2, torch.arange(3, device=device) * 8
        past = contexts, contexts, index, 17 - own, middle, middle, own
        suffix_attention(query, key, value, *past, scale=0.2, soft_cap=5.0, window=9).sum().backward()
        hidden, update, gate = (torch.randn(3, 5, 129, device=device).to(dtype).requires_grad_() for _ in range(3))
        _, normed = add_rms_norm(hidden, update, torch.ones(129, device=device, dtype=dtype), 1e-6)
        gated_activation(gate, normed, "gelu").sum().backward()
        heads, key_heads = (torch.randn(3, 5, h, 20, device=device).to(dtype).requires_grad_() for h in (57, 2))
        angles, weight = torch.randn(3, 5, 12, device=device).to(dtype), torch.ones(20, device=device, dtype=dtype)
        for weights in ((), (weight, weight)):
            sum(x.sum() for x in rotate_heads(heads, key_heads, angles, angles, *weights)).backward()
    keys = torch.randn(7, 75, device=device)
    prefixed_solve(keys, torch.zeros(7, dtype=torch.int64, device=device), 1, None, torch.eye(75, device=device))
    prefixed_solve(keys, torch.arange(7, device=device) % 3, 3, torch.eye(75, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
