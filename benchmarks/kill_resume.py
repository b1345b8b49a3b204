"""A real training killed with SIGKILL at random moments and resumed each time.

Compares the vectors and the best dev result with those of an undisturbed run. The model is
SmolLM2-135M, on the demo's facts; each run is a process of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ptuning import Prompt
from ptuning.experiments import demo

PROGRAM = [sys.executable, "-c", "from ptuning.cli import main; main()"]


def write_facts(folder: Path) -> None:
    training, dev, _ = demo.facts()
    for name, rows in (("train", training[:96]), ("dev", dev[:16])):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [demo.SUBJECT, demo.ANSWER])
            writer.writeheader()
            writer.writerows(rows)


def command(folder: Path, output: str) -> list[str]:
    options: dict[str, Any] = {
        "model": "smollm2",
        "data": folder / "train.csv",
        "dev": folder / "dev.csv",
        "answer": demo.ANSWER,
        "template": demo.TEMPLATE,
        "output": folder / output,
        "epochs": 5,
        "batch-size": 8,
    }
    pairs = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    begun = any((folder / output).glob("checkpoints/step-*/DONE"))
    return [*PROGRAM, "train", *pairs, *(["--resume"] if begun else [])]


def run(folder: Path, output: str, longest: float | None = None) -> bool:
    """Train to the end, or kill after `longest` seconds; True where it came to the end."""
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command(folder, output), stdout=log, stderr=log)
        try:
            code = process.wait(longest)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    if code:
        raise SystemExit((folder / "log.txt").read_text())
    return True


def result(folder: Path, output: str) -> tuple[torch.Tensor, dict[str, float]]:
    best = json.loads((folder / output / "result.json").read_text())["best"]
    return Prompt.load(folder / output).trained_vectors(), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_facts(folder)
        start = time.monotonic()
        run(folder, "undisturbed")
        print(f"undisturbed run: {time.monotonic() - start:.0f} s", flush=True)
        kills = 0
        while kills < options.kills:
            ended = run(folder, "killed", moments.uniform(1, 16))
            if ended:
                print(f"the run ended after {kills} kills", flush=True)
                break
            kills += 1
        else:
            run(folder, "killed")
        vectors, best = result(folder, "killed")
        expected, expected_best = result(folder, "undisturbed")
    figures = {
        "kills": kills,
        "largest_difference": float((vectors - expected).abs().max()),
        "same_dev_result": best == expected_best,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
