"""Time until the first sign of life, against torch's own import, in fresh processes that take turns.

    python tests/benchmarks/startup.py [ROUNDS]

Bars: `litgpt --help` below 0.3 s; `import litgpt` with GPT and Config touched at most torch's import + 0.1 s;
`litgpt pretrain --help` at most torch's import + 1.0 s; `litgpt models` and `litgpt plan` below 1.0 s.
"""

import statistics
import subprocess
import sys
import time

STEPS = {
    "import torch": ["-c", "import torch"],
    "litgpt --help": ["-m", "litgpt", "--help"],
    "litgpt.GPT, litgpt.Config": ["-c", "import litgpt; litgpt.GPT; litgpt.Config"],
    "litgpt pretrain --help": ["-m", "litgpt", "pretrain", "--help"],
    "litgpt generate --help": ["-m", "litgpt", "generate", "--help"],
    "litgpt models": ["-m", "litgpt", "models"],
    "litgpt plan Llama-3.1-8B": ["-m", "litgpt", "plan", "Llama-3.1-8B"],
}


def measure(n_rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the first round only warms the file cache."""
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for i in range(n_rounds + 1):
        for name, argv in STEPS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print the medians and what each step costs beyond torch."""
    medians = {name: statistics.median(s) for name, s in measure(int((sys.argv[1:] or ["5"])[0])).items()}
    for name, seconds in medians.items():
        print(f"{name:<28} {seconds:6.2f} s   torch {seconds - medians['import torch']:+.2f} s")


if __name__ == "__main__":
    main()
