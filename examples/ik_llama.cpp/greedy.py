"""Prints the tokens that ik_llama.cpp's released wheel continues a fixed prompt with, greedily, and how long it took.

usage: greedy.py MODEL PROMPT COUNT THREADS [LIBRARY]

LIBRARY is loaded into the global scope before the engine, for hosts that cannot set LD_PRELOAD.
"""

import ctypes
import sys
import time

model, prompt, count, threads = sys.argv[1], *map(int, sys.argv[2:5])
if len(sys.argv) > 5:
    ctypes.CDLL(sys.argv[5], mode=ctypes.RTLD_GLOBAL)

from ik_llama_cpp.llama import IkLlama  # noqa: E402 (the library above must come first)

engine = IkLlama(model, n_ctx=prompt + count + 8, n_threads=threads, flash_attn=False, verbose=False)
tokens = [(7 * i * i + 3 * i + 1) % 256 for i in range(prompt)]
start = time.perf_counter()
first = engine.generate(tokens, max_tokens=1, temperature=0.0)
middle = time.perf_counter()
# A call begins anew, so this one repeats the prompt.
generated = engine.generate(tokens, max_tokens=count, temperature=0.0)
end = time.perf_counter()
assert generated[:1] == first
print("tokens:", *generated)
print("prompt seconds:", middle - start)
print("token seconds:", max(end - middle - (middle - start), 0.0) / count)
