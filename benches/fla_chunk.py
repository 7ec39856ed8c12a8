#!/usr/bin/env python3
"""Times flash-linear-attention's chunked gated delta rule by graph replay, on the shapes of
`deltanet bench --device cuda --in-place --tokens 64,512,2048,4096,32768 --json`: the kernels alone, without the host's launches.

    pip install torch flash-linear-attention fla-core
    benches/fla_chunk.py

One JSON object a line: tokens, seqs, hk, hv, dtype, us (median of 25 replays), low and high (their 10th and 90th of 100), and,
up to 512 tokens, nmse of the outputs against the plain recurrence in f64.
SPDX-License-Identifier: MIT
"""
import json

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule

S = 128
SHAPES = [(64, 1, 16, 32), (512, 1, 16, 32), (2048, 1, 16, 32), (4096, 1, 16, 32), (32768, 1, 16, 32), (2048, 8, 16, 32),
          (4096, 1, 2, 4)]


def draw(tokens, seqs, hk, hv, dtype):
    """Keys and queries of length one, decays from 1e-4 to 20 a token."""
    unit = lambda: torch.nn.functional.normalize(torch.randn(seqs, tokens, hk, S, device="cuda"), dim=-1).to(dtype)
    g = -torch.exp(torch.empty(seqs, tokens, hv, device="cuda").uniform_(-9.2, 3.0))
    beta = torch.rand(seqs, tokens, hv, device="cuda").to(dtype)
    v = torch.randn(seqs, tokens, hv, S, device="cuda").to(dtype)
    return unit(), unit(), v, g, beta, 0.1 * torch.randn(seqs, hv, S, S, device="cuda")


def call(q, k, v, g, beta, state):
    with torch.no_grad():
        return chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)


def exact(q, k, v, g, beta, state):
    """The plain recurrence, one token after another; value head h reads key head h / (Hv / Hk)."""
    repeat = v.shape[2] // q.shape[2]
    q, k = (x.double().repeat_interleave(repeat, 2) for x in (q, k))
    v, g, beta, state = v.double(), g.double(), beta.double(), state.double()
    out = torch.empty_like(v)
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * error[:, :, None]
        out[:, t] = torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * S**-0.5
    return out


def replays(inputs, calls):
    """Microseconds a call, of 25 replays of a graph of several."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            out = call(*inputs)[0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call(*inputs)
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return out, sorted(times)


def main():
    torch.manual_seed(0)
    for tokens, seqs, hk, hv in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = draw(tokens, seqs, hk, hv, dtype)
            out, times = replays(inputs, 4 if tokens * seqs < 16384 else 1)
            row = {"tokens": tokens, "seqs": seqs, "hk": hk, "hv": hv, "dtype": str(dtype).removeprefix("torch."),
                   "us": round(times[12], 1), "low": round(times[2], 1), "high": round(times[22], 1)}
            if tokens <= 512:
                expected = exact(*inputs)
                row["nmse"] = float(((out.double() - expected) ** 2).sum() / (expected**2).sum())
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
