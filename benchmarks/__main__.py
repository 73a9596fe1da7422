"""Run small versions of the benchmarks on the CPU and compare their time and memory ratios with results.json.

    python -m benchmarks [NAME ...] [--write]

This takes about eight minutes on two cores. Only ratios are compared, because they depend less on the machine than
times. A benchmark runs again if a ratio is more than 25 % worse than in results.json. The exit code is 1 if the better
ratio of the two runs is still more than 25 % worse.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "results.json"
WORSE = 1.25
SUITE = {
    "startup": ["--repeats", "5"],
    "label_map": ["--repeats", "5"],
    "metrics_and_colors": [],
    "data": ["--repeats", "5", "--batches", "6"],
    "inference": ["--repeats", "3"],
    "pyramid": ["--repeats", "3", "--inference"],
    "depthwise": ["--repeats", "3"],
    "training": ["--repeats", "3", "--size", "160", "224", "--pairs", "1", "2"],
    "evaluation": ["--repeats", "3", "--images", "6", "--cases", "0"],
    "inplace_abn": ["--repeats", "3", "--size", "129"],
    "sync_bn": ["--only", "replicas", "--repeats", "5", "--size", "128"],
}


def measure(name: str) -> dict[str, float]:
    """Run a benchmark and return its ratios by name; larger is better."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        subprocess.run([sys.executable, HERE / f"{name}.py", *SUITE[name], "--json", path], check=True)
        rows = json.loads(path.read_text())["rows"]
    print()
    return {key: value for row in rows for key, value in ratios(name, row)}


def ratios(name: str, row: dict) -> list[tuple[str, float]]:
    """Return a list of (key, ratio) with all ratios in a row of results; larger is better.

    In columns named "... ratio", smaller is better; their values are inverted.
    """
    row_name = ", ".join(value for value in row.values() if isinstance(value, str) and value)
    found = []
    for column, value in row.items():
        if column.endswith("times faster"):
            found.append((f"{name}: {row_name}: {column}", value))
        elif column.endswith("ratio"):
            found.append((f"{name}: {row_name}: {column}", 1 / value))
    return found


def compare(measured: dict[str, float], committed: dict[str, float]) -> list[str]:
    """Return a message for every ratio that is more than 25 % worse than in results.json."""
    return [
        f"{key}: {committed[key] / value:.2f} times worse ({committed[key]:.2f} in results.json, {value:.2f} now)"
        for key, value in measured.items()
        if key in committed and value * WORSE < committed[key]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SUITE)} (default: all)")
    parser.add_argument("--write", action="store_true", help="write the ratios to results.json")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(SUITE))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(SUITE)}")
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    measured, worse = {}, []
    for name in args.names or SUITE:
        ratios_now = measure(name)
        if not args.write and compare(ratios_now, committed):
            again = measure(name)  # another process may have slowed down the first run
            ratios_now = {key: max(value, again[key]) for key, value in ratios_now.items()}
        measured |= ratios_now
        worse += compare(ratios_now, committed)
    if args.write:
        kept = {key: value for key, value in committed.items() if key.split(":")[0] not in {*(args.names or SUITE)}}
        content = {key: round(value, 3) for key, value in sorted((kept | measured).items())}
        COMMITTED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{len(measured)} ratios written to {COMMITTED}")
        return 0
    new = [key for key in measured if key not in committed]
    print("\n".join([*worse, f"{len(measured)} ratios compared, {len(worse)} worse by more than 25 %, {len(new)} new"]))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
