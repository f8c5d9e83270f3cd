"""Memory and time of using and of converting a Hugging Face folder, against its weights and against reading it once.

    python tests/benchmarks/loading.py [--gigabytes 1.0] [--folder DIR] [--kinds safetensors shards bin]

Writes a random Llama-shaped checkpoint in bfloat16, then runs each case in a process of its own, with the file in the
page cache. Memory is the peak of that process above what it had when everything was imported and a tiny checkpoint had
been loaded; a view of the file counts as memory once it was used, and all of it is used. Bars: loading in place at most
1.1 x weights and 1.3 x the time of reading the file once; conversion at most 0.6 GB in all, imports included, and a
single copy on the disk beside the source.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEAK_BAR, TIME_BAR, CONVERSION_BAR_GB = 1.1, 1.3, 0.6
KINDS = ("safetensors", "shards", "bin")
CASES = ("read once", "load in place", "load as float32", "convert", "convert to float32", "convert, one copy")


def memory_bytes(kind: str) -> int:
    """`VmRSS`: in use; `VmHWM`: the peak. The peak of `getrusage` would begin with that of the parent process."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def hf_values(n_layer: int, width: int = 2048, vocab: int = 32_000) -> dict:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": n_layer, "vocab_size": vocab,
        "hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    }  # fmt: skip


def write_checkpoint(folder: Path, kind: str, values: dict) -> int:
    """A random checkpoint; returns the bytes of its weights."""
    import torch

    from litgpt.checkpoint.adapter import StateDictAdapter
    from litgpt.checkpoint.hf_config import config_from_hf
    from litgpt.checkpoint.tensors import LazyTensor, write_safetensors

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, torch.bfloat16, lambda: torch.randn(shape, dtype=torch.bfloat16) * 0.02)

    tensors = {n: lazy(shape) for n, shape in StateDictAdapter(config_from_hf(values), "llama").hf_shapes().items()}
    if kind == "bin":
        torch.save({name: tensor.read() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    else:
        total = sum(tensor.n_bytes for tensor in tensors.values())
        write_safetensors(folder, tensors, max_shard_bytes=total if kind == "safetensors" else total // 4 + 1)
    return sum(tensor.n_bytes for tensor in tensors.values())


def weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def read_once(folder: Path) -> None:
    """The plain reading of the files into one buffer of their size, which is the unit of time."""
    for path in weight_files(folder):
        buffer = bytearray(path.stat().st_size)
        with open(path, "rb", buffering=0) as file:
            view = memoryview(buffer)
            while n := file.readinto(view):
                view = view[n:]


def load(folder: Path, dtype: str | None) -> None:
    import torch

    from litgpt.checkpoint.loading import load_model_weights
    from litgpt.checkpoint.meta import meta_device
    from litgpt.registry import build_model, load_checkpoint_config

    spec, config = load_checkpoint_config(folder)
    with meta_device():
        model = build_model(spec, config)
    load_model_weights(model, folder, dtype=dtype and getattr(torch, dtype))
    for parameter in model.parameters():  # use every value, as a forward pass does
        parameter.data.view(torch.int32).max()


def convert(folder: Path, **options: object) -> None:
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    convert_hf_checkpoint(folder, **options)


def run_case(case: str, folder: Path) -> None:
    if case == "read once":
        read_once(folder)
    elif case.startswith("load"):
        load(folder, "float32" if "float32" in case else None)
    else:
        convert(folder, dtype="float32" if "float32" in case else None, delete_source="one copy" in case)


def measure(case: str, folder: Path, warm: Path) -> dict[str, float]:
    """One run in this process, after the same on a tiny checkpoint, so that nothing is imported in the second one."""
    import torch

    torch.set_num_threads(1)
    run_case(case, warm)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory_bytes("VmRSS"), time.perf_counter()
    run_case(case, folder)
    seconds, peak = time.perf_counter() - start, memory_bytes("VmHWM")
    return {"seconds": seconds, "above": peak - before, "peak": peak}


def in_process(case: str, folder: Path, warm: Path) -> dict[str, float]:
    for path in weight_files(folder):
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass  # into the page cache
    command = [sys.executable, __file__, "--run", case, str(folder), str(warm)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def report(kind: str, root: Path, gigabytes: float) -> bool:
    """Measures one kind of checkpoint, prints its rows; whether all bars hold."""
    per_layer = 2 * (2048 * 2048 * 2 + 2048 * 512 + 3 * 2048 * 5632)
    n_layer = max(1, round((gigabytes * 1e9 - 4 * 32_000 * 2048) / per_layer))
    n_bytes = write_checkpoint(root / kind, kind, hf_values(n_layer))
    is_good, unit = True, 0.0
    for case in CASES:
        runs = []
        for attempt in range(1 if "convert" in case else 3):
            warm = root / f"warm-{kind}-{attempt}-{CASES.index(case)}"
            write_checkpoint(warm, kind, hf_values(1, 256, 512))
            runs.append(in_process(case, root / kind, warm))
        r = min(runs, key=lambda run: run["seconds"])
        unit = unit or r["seconds"]
        weights = n_bytes * (2 if "float32" in case else 1)
        above, seconds = r["above"] / weights, r["seconds"] / unit
        if case == "load in place":
            verdict = above <= PEAK_BAR and seconds <= TIME_BAR
        elif case == "load as float32":
            verdict = above <= PEAK_BAR
        elif case == "read once":
            verdict = True
        else:
            verdict = r["peak"] <= CONVERSION_BAR_GB * 1e9
            if "one copy" in case:
                verdict &= not weight_files(root / kind)
        on_disk = sum(path.stat().st_size for path in (root / kind).iterdir()) / n_bytes
        is_good &= verdict
        print(
            f"{kind:<12}{case:<20}{above:>12.2f}{r['peak'] / 1e9:>10.2f}{r['seconds']:>9.2f}{seconds:>11.2f}"
            f"{on_disk:>9.2f}  {'ok' if verdict else 'ABOVE THE BAR'}",
            flush=True,
        )
        (root / kind / "lit_model.pth").unlink(missing_ok=True)
    return is_good


def main() -> None:
    """Write the checkpoints, run every case, print a table, and exit 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; a new folder in it is removed")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print("\n" + json.dumps(measure(args.run[0], Path(args.run[1]), Path(args.run[2]))))
        return
    root = Path(tempfile.mkdtemp(dir=args.folder))
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'files':<12}{'case':<20}{'above/weights':>12}{'peak GB':>9}{'seconds':>9}{'/ reading':>11}{'disk':>9}")
    try:
        is_good = all([report(kind, root, args.gigabytes) for kind in args.kinds])
    finally:
        shutil.rmtree(root)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
