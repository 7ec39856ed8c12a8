"""Prints the tokens that ik_llama.cpp's released wheel continues a fixed prompt with, greedily.

usage: greedy.py MODEL COUNT THREADS [LIBRARY]

LIBRARY is loaded into the global scope before the engine, for hosts that cannot set LD_PRELOAD.
"""
import ctypes
import sys

model, count, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if len(sys.argv) > 4:
    ctypes.CDLL(sys.argv[4], mode=ctypes.RTLD_GLOBAL)

from ik_llama_cpp.llama import IkLlama  # noqa: E402: the library above must come first

engine = IkLlama(model, n_ctx=512, n_threads=threads, flash_attn=False, verbose=False)
prompt = [(7 * i * i + 3 * i + 1) % 256 for i in range(77)]
print("tokens:", *engine.generate(prompt, max_tokens=count, temperature=0.0))
