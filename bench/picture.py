"""Draw scaling.svg from results.json: deliveries a second from 1 client to 10,000."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peers
import report

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 780, 400, 90, 40, 215, 50
COLOURS = {"spywatcher": "#5865f2", "node": "#3c873a", "bare": "#8a8a8a"}
DASHES = {"single": "", "burst 100": ' stroke-dasharray="6 4"'}


def place(value: float, least: float, most: float, start: float, end: float) -> float:
    """Where a value lies on a logarithmic axis."""
    share = math.log(value / least) / math.log(most / least)
    return start + share * (end - start)


def draw(scaling: dict[str, dict[str, dict[str, float]]]) -> str:
    sizes = sorted({int(size) for found in scaling.values() for size in found})
    rates = [rate for by in scaling.values() for one in by.values() for rate in one.values()]
    least, most = 10 ** math.floor(math.log10(min(rates))), 10 ** math.ceil(math.log10(max(rates)))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(size: float) -> float:
        return place(size, sizes[0], sizes[-1], LEFT, right)

    def y(rate: float) -> float:
        return place(rate, least, most, bottom, TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="15">Deliveries a second, one room</text>',
    ]
    for power in range(round(math.log10(least)), round(math.log10(most)) + 1):
        level = y(10**power)
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}" stroke="#dddddd"/>'
            f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{10**power:,}</text>'
        )
    parts += [
        f'<text x="{x(size):.1f}" y="{bottom + 20}" text-anchor="middle">{size:,}</text>'
        for size in sizes
    ]
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 40}">clients</text>')
    lines = [(kind, name) for kind in scaling for name in DASHES]
    for number, (kind, name) in enumerate(lines):
        style = f'stroke="{COLOURS[kind]}" stroke-width="2" fill="none"{DASHES[name]}'
        points = " ".join(
            f"{x(int(size)):.1f},{y(one[name]):.1f}" for size, one in scaling[kind].items()
        )
        row = TOP + 10 + number * 22
        parts.append(
            f'<polyline points="{points}" {style}/>'
            f'<line x1="{right + 14}" x2="{right + 40}" y1="{row}" y2="{row}" {style}/>'
            f'<text x="{right + 46}" y="{row + 4}">{peers.NAMES[kind]}, {name}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    results = json.loads(report.RESULTS.read_text())
    picture = Path(__file__).parent / "scaling.svg"
    picture.write_text(draw(results["fanout"]["scaling"]))


if __name__ == "__main__":
    main()
