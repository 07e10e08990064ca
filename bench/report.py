"""The figures of a run: printed as tables, kept in results.json under the benchmark's name."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"


def parse_arguments(about: str, *, compares: bool = False) -> argparse.Namespace:
    """`--quick`, and for what `compares` servers: which ones."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    if compares:
        add_servers(parser)
    return parser.parse_args()


def add_servers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="*", help="only these servers; nothing is kept")
    parser.add_argument("--checkout", type=Path, help="another version of SpyWatcher beside them")


def keep(benchmark: str, figures: Any) -> None:
    """Put the figures into results.json, beside those of others and what else this one has found."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    results[benchmark] = {**results.get(benchmark, {}), **figures}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table as Markdown has them, aligned for a terminal too."""
    cells = [list(header), *([text_of(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("| " + " | ".join([first, *rest]) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def text_of(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """That of the medians, of rounds that alternated."""
    return statistics.median(ours) / statistics.median(theirs) if ours and theirs else None
