#!/usr/bin/env python3
"""Builds llama.cpp's CUDA backend as it is and with libdeltanet, from one source, and compares the two on this machine.

    compare.py RESULTS [--work FOLDER] [--rounds N] [--seconds N] [--archs 90]

Made for the folder that `cargo xtask ggml-cuda` packs. Needs CUDA's toolkit, CMake, Ninja, a C++ compiler and a GPU.
RESULTS gets compare.json, which is written again after every step, and the logs. The exit status is 1 if a check failed;
targets of speed are told in the JSON.
SPDX-License-Identifier: MIT
"""
import argparse
import array
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
START = time.time()
TINY = ["qwen35-tiny-1", "qwen3next-tiny-1", "kimi-linear-tiny-1"]
SPEED = {"0.8b": "qwen35-0.8b-1", "4b8l": "qwen35-4b8l-1"}
TARGETS = {"0.8b": {"pp": 1.30, "tg": 1.0, "tg_32_sequences": 1.0}, "4b8l": {"pp": 1.12, "tg": 1.0, "tg_32_sequences": 1.0}}
# What a test of the backend has no use for. Flash attention, CUDA graphs and the architecture's flags are as always.
OPTIONS = ["-DGGML_CUDA_NCCL=OFF", "-DLLAMA_CURL=OFF"] + [
    f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "APP", "TOOLS", "TESTS", "EXAMPLES", "SERVER")
]
PROMPT, GENERATE = 100, 32


class Comparison:
    def __init__(self, results, work):
        self.results, self.work, self.json = results, work, {"failed": [], "speed": {}}
        self.taken = {(model, tree): [] for model in SPEED for tree in ("stock", "deltanet")}

    def save(self):
        self.json["seconds"] = round(time.time() - START)
        (self.results / "compare.json").write_text(json.dumps(self.json, indent=1) + "\n")

    def say(self, words):
        print(f"{time.time() - START:5.0f} s  {words}", flush=True)

    def check(self, ok, what):
        if not ok:
            self.json["failed"].append(what)
            self.say(f"FAIL: {what}")
        self.save()
        return ok

    def run(self, name, command, timeout=600, **options):
        """Runs a command, its output into a log; (exit status, standard output)."""
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=timeout, **options)
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            code, out, err = 124, (late.stdout or b"").decode(), (late.stderr or b"").decode()
        with open(self.results / f"{name}.log", "a") as log:
            log.write(f"$ {command}\n{out}\n{err}\nexit status {code}\n")
        if code not in (0, 1):
            self.say(f"{name}: exit status {code}: {err[-500:]}")
        return code, out

    # The two builds.

    def build(self, archs):
        source, build = self.work / "llama.cpp", self.work / "llama.cpp" / "build"
        if not source.exists():
            subprocess.run(["tar", "xf", HERE / "llama.cpp.tar.xz", "-C", self.work], check=True)
        if not (self.work / "stock").exists():
            begin = time.time()
            configure = ["cmake", "-B", "build", "-G", "Ninja", "-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={archs}", *OPTIONS]
            code, _ = self.run("build-stock", configure, cwd=source)
            code = code or self.run("build-stock", ["cmake", "--build", "build"], timeout=540, cwd=source)[0]
            if not self.check(code == 0, "the build as it is"):
                return False
            shutil.copytree(build / "bin", self.work / "stock", symlinks=True)
            self.json["build_seconds_stock"] = round(time.time() - begin)
            self.say("built as it is")
        # The documentation's lines, word for word, in a shell that has been told where deltanet is.
        page = (HERE / "prefix/share/doc/deltanet/docs/ggml-cuda.md").read_text()
        lines = re.search(r"```sh\n(.*?)```", page, re.S).group(1)
        self.json["lines"] = lines.splitlines()
        begin = time.time()
        code, out = self.run("build-deltanet", ["bash", "-e", "-c", lines], cwd=self.work,
                             env={**os.environ, "DELTANET": str(HERE / "prefix")})
        if not self.check(code == 0, "the build with deltanet, by the documentation's lines"):
            return False
        # As Ninja tells its steps: the second build compiles one file and links.
        self.json["second_build_compiled"] = re.findall(r"Building (?:CUDA|CXX|C) object (\S+)", out)
        self.json["build_seconds_deltanet"] = round(time.time() - begin)
        shutil.rmtree(self.work / "deltanet", ignore_errors=True)
        shutil.copytree(build / "bin", self.work / "deltanet", symlinks=True)
        self.say("built with deltanet")
        return True

    def programs(self):
        source = self.work / "llama.cpp"
        for name, libraries in (("ops", ["-lggml", "-lggml-base"]), ("model", ["-lllama", "-lggml", "-lggml-base"])):
            code, _ = self.run("programs", ["c++", "-std=c++17", "-O2", HERE / f"{name}.cpp", f"-I{source}/include",
                               f"-I{source}/ggml/include", f"-L{self.work}/stock", *libraries,
                               "-Wl,--allow-shlib-undefined", "-o", self.work / name])
            if not self.check(code == 0, f"{name}.cpp"):
                return False
        return True

    def environment(self, tree, **more):
        old = os.environ.get("LD_LIBRARY_PATH", "")
        return {**os.environ, "LD_LIBRARY_PATH": f"{self.work / tree}:{HERE}/prefix/lib:{old}", **more}

    # The comparisons.

    def ops(self):
        self.json["ops"] = {}
        for name, tree, more in (("stock", "stock", {}), ("deltanet", "deltanet", {}),
                                 ("token_serial", "deltanet", {"DELTANET_GGML_CUDA": "off"})):
            code, out = self.run(f"ops-{name}", [self.work / "ops"], timeout=120, env=self.environment(tree, **more))
            lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            cases = [line for line in lines if "summary" not in line]
            summary = next((line for line in lines if "summary" in line), {})
            worst = {key: max((case[key] if case[key] is not None else math.inf for case in cases), default=math.inf)
                     for key in ("out", "state", "cache_state")}
            self.json["ops"][name] = {**summary, "worst": worst, "cases": cases}
            # Upstream's own operator is a peer here, not what is judged.
            if name != "stock":
                self.check(code == 0 and bool(cases), f"operator, {name}")
                self.check(("libdeltanet runs" in summary.get("says", "")) == (name == "deltanet"), f"operator, {name}: who served")
                self.check(summary.get("graphs_captured", 0) > 0, f"operator, {name}: CUDA graphs were captured")
            self.say(f"operator, {name}: {summary.get('failed')} of {len(cases)} failed, worst {worst}")

    def operator_time(self):
        self.json["operator_us"] = []
        seen = {}
        for tree in ("stock", "deltanet"):
            code, out = self.run(f"time-{tree}", [self.work / "ops", "time"], timeout=60, env=self.environment(tree))
            seen[tree] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            self.check(code == 0, f"operator, {tree}: time")
        for stock, ours in zip(seen["stock"], seen["deltanet"]):
            shape = {key: value for key, value in stock.items() if key != "us"}
            self.json["operator_us"].append({**shape, "stock": stock["us"], "deltanet": ours["us"]})
            self.say(f"operator, {shape['value_heads']} heads, {shape['tokens']} x {shape['sequences']}: "
                     f"{stock['us']} us, {ours['us']} us")

    def model(self, name, tree, file, *arguments, timeout=120, prefix=(), **more):
        code, out = self.run(name, [*prefix, self.work / "model", self.work / f"{file}.gguf", *map(str, arguments)],
                             timeout=timeout, env=self.environment(tree, **more))
        line = next((line for line in out.splitlines() if line.startswith("{")), "{}")
        try:
            seen = json.loads(line)
        except json.JSONDecodeError:
            return code or 1, {}
        self.check(seen.get("backend", "").startswith(str(self.work / tree)), f"{name}: the backend of {tree} is loaded")
        return code, seen

    def greedy(self):
        self.json["greedy"] = {}
        for file in TINY:
            seen, logits = {}, {}
            for tree in ("stock", "deltanet"):
                path = self.work / f"{tree}.f32"
                code, seen[tree] = self.model(f"greedy-{file}", tree, file, "greedy", PROMPT, GENERATE, path)
                self.check(code == 0, f"{file}, {tree}: runs")
                logits[tree] = array.array("f")
                logits[tree].frombytes(path.read_bytes() if path.exists() else b"")
            pairs = list(zip(logits["stock"], logits["deltanet"]))
            error = sum((a - b) ** 2 for a, b in pairs) / (sum(a * a for a, _ in pairs) or math.nan)
            equal = bool(seen["stock"].get("tokens")) and seen["stock"]["tokens"] == seen["deltanet"].get("tokens")
            self.json["greedy"][file] = {"tokens_equal": equal, "tokens": seen["deltanet"].get("tokens"), "logits_nmse": error,
                                         "says": seen["deltanet"].get("says")}
            self.check(equal, f"{file}: greedy tokens are equal")
            self.check("libdeltanet runs" in seen["deltanet"].get("says", ""), f"{file}: libdeltanet served")
            self.say(f"{file}: tokens equal: {equal}, logits NMSE {error:.3g}")

    def memcheck(self):
        if not shutil.which("compute-sanitizer"):
            self.json["memcheck"] = "SKIPPED: compute-sanitizer is not installed"
            return
        sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
        code, seen = self.model("memcheck", "deltanet", TINY[0], "greedy", PROMPT, 4, timeout=120, prefix=sanitizer)
        log = (self.results / "memcheck.log").read_text()
        summary = re.findall(r"ERROR SUMMARY: .*", log)
        self.json["memcheck"] = {"exit_status": code, "summary": summary, "tokens": seen.get("tokens"), "says": seen.get("says")}
        self.check(code == 0 and "libdeltanet runs" in seen.get("says", ""), "a generation under memcheck")
        self.say(f"memcheck: {code} {summary}")

    def speed(self, rounds, seconds):
        for turn in rounds:
            for model, file in SPEED.items():
                if turn and time.time() - START > seconds:
                    return
                for tree in ("stock", "deltanet") if turn % 2 == 0 else ("deltanet", "stock"):
                    code, seen = self.model(f"speed-{model}", tree, file, "speed", 4096, 128, 9)
                    if self.check(code == 0 and "pp" in seen, f"{model}, {tree}: speed"):
                        self.taken[model, tree].append(seen)
                self.tell_speed(model)

    def tell_speed(self, model):
        stock, ours = self.taken[model, "stock"], self.taken[model, "deltanet"]
        if not stock or not ours:
            return
        entry = {"rounds": {"stock": stock, "deltanet": ours}}
        for key in ("pp", "pp_ubatch_4096", "tg", "tg_32_sequences"):
            a, b = (statistics.median(run[key] for run in runs) for runs in (stock, ours))
            entry[key] = {"stock": a, "deltanet": b, "ratio": round(b / a, 3)}
            target = TARGETS[model].get(key)
            if target:
                entry[key].update(target=target, met=b / a >= target)
        self.json["speed"][model] = entry
        self.say(f"{model}: " + ", ".join(f"{key} {entry[key]['ratio']}" for key in entry if key != "rounds"))
        self.save()


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("results", type=Path)
    words.add_argument("--work", type=Path, default=Path("/tmp/deltanet-ggml-cuda"))
    words.add_argument("--rounds", type=int, default=8)
    words.add_argument("--seconds", type=int, default=520, help="no new round of speed runs after so many")
    words.add_argument("--archs", default="native", help="CMAKE_CUDA_ARCHITECTURES")
    line = words.parse_args()
    for folder in (line.results, line.work):
        folder.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(line.results.resolve(), line.work.resolve())
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    comparison.json["device"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    comparison.json["options"] = OPTIONS
    comparison.json["source"] = (HERE / "source.txt").read_text().strip()
    # The models are made while the compiler works.
    makers = {file: subprocess.Popen([HERE / "xtask", "model", file, line.work / f"{file}.gguf"])
              for file in [*TINY, *SPEED.values()] if not (line.work / f"{file}.gguf").exists()}
    if comparison.build(line.archs) and comparison.programs():
        for file, maker in makers.items():
            comparison.check(maker.wait() == 0, f"the model {file}")
        comparison.ops()
        comparison.operator_time()
        comparison.greedy()
        comparison.speed(range(1), line.seconds)
        comparison.memcheck()
        comparison.speed(range(1, line.rounds), line.seconds)
    comparison.json["ok"] = not comparison.json["failed"]
    comparison.save()
    comparison.say("ok" if comparison.json["ok"] else f"failed: {comparison.json['failed']}")
    return not comparison.json["ok"]


if __name__ == "__main__":
    sys.exit(main())
