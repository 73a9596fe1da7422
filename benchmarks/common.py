"""Functions that the benchmarks share: interleaved timing, memory measurement, and output."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.multiprocessing import get_context

from mit_semseg.models import ModelBuilder, SegmentationModule


def parser_of(
    description: str, *, repeats: int = 5, threads: int | None = 2, device: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks share.

    Args:
        description: text at the start of the help.
        repeats: default of `--repeats`.
        threads: default of `--threads`; None omits this option.
        device: whether to add `--device`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    if threads:
        parser.add_argument("--threads", type=int, default=threads, help="threads per process (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, help="measured calls per result (default: %(default)s)")
    parser.add_argument("--json", help="also write the results to this file")
    return parser


def network_of(encoder: str, decoder: str) -> SegmentationModule:
    """Return a network with random weights for 150 classes, in eval mode."""
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=150, in_channels=enc.out_channels)
    return SegmentationModule(enc, dec, None).eval()


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or the name of the processor and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Keep `cores` processor cores busy in the context, with one process per core."""
    processes = [get_context("spawn").Process(target=_spin, daemon=True) for _ in range(cores)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def _spin() -> None:
    while True:
        pass


def interleaved(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median time of each function in milliseconds.

    Each function is called once as a warm-up. Then the functions are called in turn and measured, `repeats` times.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, call in functions.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if repeat:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def grown(call: Callable[[], object], device: torch.device) -> float:
    """Return by how many MiB a call increases the peak memory of this process (CPU) or of the GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident set size
    before = _largest_resident()
    call()
    return _largest_resident() - before


def _largest_resident() -> float:
    """Return the peak resident set size of this process in MiB (Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def elsewhere(function: Callable, *arguments):
    """Call a function in a new process, where earlier allocations do not affect its memory; return its result."""
    context = get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_answer, args=(results, torch.get_num_threads(), function, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}: the process ended with exit code {process.exitcode}")
    return results.get()


def _answer(results, threads: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    results.put(function(*arguments))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(title: str, rows: list[dict]) -> str:
    """Return rows with the same keys as a Markdown table below a title."""
    head = list(rows[0])
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def write(path: str | None, name: str, device: torch.device, rows: list[dict]) -> None:
    """Print the results as a table, and write them to the JSON file `path` unless it is None."""
    print(table(f"{name}: {hardware(device)}, PyTorch {torch.__version__}", rows))
    if path:
        content = {"benchmark": name, "hardware": hardware(device), "torch": torch.__version__, "rows": rows}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
