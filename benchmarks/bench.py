"""Every comparison with PEFT: same process, same inputs, runs of both sides in turn, medians.

make bench                                    all rows of the CPU, then the curves
python benchmarks/bench.py --row train_front  one row; the others keep their figures
python benchmarks/bench.py --device cuda      the rows of a GPU
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import math
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import curves
import gpu
import memory
import report
import torch
from limits import MatmulRate, flops, synchronize
from predicting import classify_many, generate
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import CPU_ROWS, GPU_ROWS, Row, Workload, train

from ptuning import load_model
from ptuning.backbone.fetched import fetch

CPU_ROWS |= {
    "predict_texts": Row(
        "32 texts of 64 tokens, prompt in front, two labels, from text to answers",
        lambda b, c: classify_many(b, c, 32),
        most=3,
    ),
    "predict_mixed": Row(
        "the same by 16 prompts, each text by one of them, against PEFT's adapters in turn",
        lambda b, c: classify_many(b, c, 32, prompts=16),
        most=3,
    ),
    "predict_generate": Row(
        "32 tokens behind each of 4 texts of 64 tokens, prompt in front, greedy",
        lambda b, c: generate(b, c, 4),
        most=3,
    ),
}
GPU_ROWS |= {
    "gpu_predict_texts": Row(
        "135M shape: 10,000 texts of 64 tokens, prompt in front, two labels, from text to answers, "
        "256 a batch",
        lambda b, c: classify_many(b, c, 10_000, size=256),
        "135m",
        most=3,
    ),
    "gpu_predict_mixed": Row(
        "the same by 16 prompts, each text by one of them, against PEFT's adapters in turn",
        lambda b, c: classify_many(b, c, 10_000, prompts=16, size=256),
        "135m",
        most=3,
    ),
    "gpu_predict_generate": Row(
        "135M shape: 32 tokens behind each of 64 texts of 64 tokens, prompt in front, greedy",
        lambda b, c: generate(b, c, 64),
        "135m",
        most=3,
    ),
    "gpu_8b_front_fp8": Row(  # last: where time is short the others come first
        "8B shape: as gpu_8b_front, ours with frozen layers in 8-bit floats (--frozen fp8)",
        lambda b, c: train(gpu.frozen(b, "fp8"), c, "front", 8, 256),
        "8b",
    ),
}
_MEMORY = "peak memory of a training with the prompt after the text, sizes as above"
WORK = {
    **{name: row.work for name, row in list(CPU_ROWS.items())[:3]},
    "memory_after_cached": _MEMORY,
    **{name: row.work for name, row in list(CPU_ROWS.items())[3:]},
    **{name: row.work for name, row in GPU_ROWS.items()},
    "gpu_8b": "8B shape: prompt after texts of 256 tokens, keys and values kept, each side's best "
    "batch size",
}
NAMES = {
    "cpu": [*CPU_ROWS, "memory_after_cached"],
    "cuda": ["gpu_8b", *GPU_ROWS],
}
_SAME = {torch.float32: 1e-4, torch.bfloat16: 0.3}
"""Largest difference of numbers that must be equal. In bfloat16 logits round to 0.03 and sums of a
loss differ by more; there the check only finds what is plainly wrong."""


def measured(workload: Workload, model: Any, runs: int, before: int) -> report.Figure:
    """Both sides and the rate of matrix products in turn, and what the medians say.

    Args:
        workload: the sides.
        model: gives shapes, dtype and device.
        runs: timed ones.
        before: allocated bytes of a GPU, of the models alone.
    """
    limit = _SAME[model.dtype]
    if not workload.difference <= limit:
        raise RuntimeError(
            f"{workload.equal} differ by {workload.difference:.1e}, more than {limit:.0e}: the "
            "sides do not do the same, so their times mean nothing"
        )
    training = any(part.backward for part in workload.our_parts)
    rate = MatmulRate(model, workload.tokens, training)
    warm_up = 3 if model.device.type == "cuda" else 1  # a graph is captured in the second run
    rates, rounds = [], []
    peaks = _peaks(workload, warm_up, before) if model.device.type == "cuda" else []
    for number in range(warm_up + runs):
        times = [_seconds(run, model.device) for run in (workload.ours, workload.peft)]
        speed = rate()
        if number >= warm_up:
            rounds.append([1000 * seconds for seconds in times])
            rates.append(speed)
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    per_ms = statistics.median(rates) / 1000
    least = flops(model, workload.our_parts) / per_ms
    ratios = [theirs / ours for ours, theirs in rounds]
    return {
        "ours": ours,
        "peft": theirs,
        "ratio": theirs / ours,
        "unit": "ms",
        "spread": [min(ratios), max(ratios)],
        "runs": runs,
        "limit": {
            "ours": least,
            "peft": flops(model, workload.their_parts) / per_ms,
            "ratio": theirs / least,
            "gflops": per_ms / 1e6,
        },
        "difference": workload.difference,
        "equal": workload.equal,
        **({"note": "; ".join([*peaks, *workload.side.notes])} if peaks else {}),
        **({"host_ops": host_operations(workload.ours)} if peaks else {}),
    }


class _Count(TorchDispatchMode):
    """Counts the operations that Python asks for; what a graph replays is not among them."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def host_operations(run: Callable[[], Any]) -> int:
    """How many operations a run asks the host for, each at 6 to 8 microseconds on a GPU."""
    with _Count() as counted:
        run()
    return counted.count


def profile(name: str, workload: Workload) -> None:
    """Print where the time of our side goes on the device."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        workload.ours()
        torch.cuda.synchronize()
    kernels = [e for e in found.key_averages() if e.self_device_time_total > 0]
    total = sum(kernel.self_device_time_total for kernel in kernels) / 1000
    print(f"{name}: {total:.2f} ms in {sum(kernel.count for kernel in kernels)} kernels")
    for kernel in sorted(kernels, key=lambda k: -k.self_device_time_total)[:20]:
        print(
            f"{kernel.self_device_time_total / 1000:9.3f} ms {kernel.count:6d} x {kernel.key[:90]}"
        )


def _peaks(workload: Workload, warm_up: int, before: int) -> list[str]:
    """Peak memory of both sides on a GPU, in words; what ours keeps counts for ours."""
    found = []
    for side, run in (("ours", workload.ours), ("PEFT", workload.peft)):
        start = before if side == "ours" else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(warm_up):
            run()
        found.append(f"{side} {(torch.cuda.max_memory_allocated() - start) / 2**30:.2f} GiB")
    return [f"peak memory {' and '.join(found)}"]


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def row(row: Row, base: Any, runs: int, profiled: str | None = None) -> report.Figure:
    """One row on copies of the model; `profiled` is its name if it is to be profiled."""
    torch.manual_seed(0)
    copies = copy.deepcopy(base), copy.deepcopy(base)
    before = torch.cuda.memory_allocated()
    workload = row.make(*copies)
    try:
        figure = measured(workload, base, min(runs, row.most), before)
        if profiled:
            profile(profiled, workload)
        return figure
    finally:
        workload.side.population.close()


def memory_row() -> report.Figure:
    """Peak bytes of both sides' training, in processes of their own."""
    peaks = memory.peaks(torch.get_num_threads())
    ratio = peaks["ours"] / peaks["peft"]
    return {**peaks, "ratio": ratio, "unit": "bytes", "spread": [ratio, ratio], "runs": 1}


def gpu_8b(runs: int) -> report.Figure:
    """Examples per second of both sides, each at its best batch size."""
    torch.manual_seed(0)
    found = gpu.search_8b(runs)
    ours, theirs = found["ours"], found["peft"]
    ratio = ours["examples"] / theirs["examples"]
    sizes = ", ".join(
        f"{name} best at {side['batch']:.0f} texts with {side['memory'] / 2**30:.1f} GiB"
        for name, side in (("ours", ours), ("PEFT", theirs))
    )
    figures = {"ours": ours["examples"], "peft": theirs["examples"], "ratio": ratio}
    return {**figures, "unit": "examples/s", "spread": [ratio, ratio], "runs": runs, "note": sizes}


def figure_of(name: str, base: Any, runs: int, profiled: str | None) -> report.Figure:
    """One row by its name; `base` is SmolLM2, or None where a GPU row makes its model up."""
    if name == "memory_after_cached":
        return memory_row()
    if name == "gpu_8b":
        return gpu_8b(runs)
    chosen = {**CPU_ROWS, **GPU_ROWS}[name]
    model = gpu.made_up(chosen.shape) if chosen.shape else base
    return row(chosen, model, runs, name if name == profiled else None)


def here(device: str) -> dict[str, str]:
    """Machine, versions and date, kept beside every row."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft"))
    return {
        "machine": f"{name}, {os.cpu_count()} cores{threads}, {platform.system()}; Python "
        f"{platform.python_version()}, {packages}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--row", nargs="*", choices=list(WORK), help="[default: all]")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--curves", nargs="*", choices=list(curves.CURVES), help="[default: all]")
    parser.add_argument("--no-curves", action="store_true")
    parser.add_argument("--profile", metavar="ROW", help="a GPU's row whose kernels are printed")
    parser.add_argument("--minutes", type=float, help="begin no row later; a GPU's 4 by default")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here: the rows of --device cuda are not measured")
    names = NAMES[options.device] if options.row is None else options.row
    if set(names) - set(NAMES[options.device]):
        parser.error(f"rows of --device {options.device}: {', '.join(NAMES[options.device])}")
    cpu = options.device == "cpu"
    base = load_model(str(fetch("smollm2")), dtype="float32")[0] if cpu else None
    figures, failed = [], []
    started, minutes = time.monotonic(), options.minutes or (math.inf if cpu else 4)
    for name in names:
        if time.monotonic() - started > 60 * minutes:
            failed.append(f"{name}: not begun after {minutes:g} minutes")
            continue
        try:
            figure = figure_of(name, base, options.runs, options.profile)
        except Exception as error:  # the other rows are measured all the same
            traceback.print_exc()
            failed.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        finally:
            gc.collect()
            torch.compiler.reset()
        figures.append({"name": name, "device": options.device, **figure, **here(options.device)})
        report.show(figures[-1:])
        report.merge(figures, list(WORK))  # what was measured stays if a later row fails
    if cpu and not options.no_curves and (options.curves or options.row is None):
        for name in options.curves or list(curves.CURVES):
            curve = curves.CURVES[name]
            points = curves.measure(base, curve, runs=1)
            curves.draw(curve, points, report.IMAGES / f"{name}.png")
    every = report.merge([], list(WORK))
    report.show([figure for figure in every if figure["device"] == options.device])
    described = {name: curve.work for name, curve in curves.CURVES.items()}
    report.write_page(every, WORK, described)
    if failed:
        sys.exit("\n".join(["not measured:", *failed]))


if __name__ == "__main__":
    main()
