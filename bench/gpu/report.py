"""What `bench.gpu` found, as Markdown: tables of rates by batch size, and lists of all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report. results: as `bench.gpu` writes them."""
    sections: Mapping[str, Any] = results["sections"]
    machine = sections.get("machine", {}).get("found", {})
    told = [f"{machine[name]}" for name in ("card",) if name in machine]
    told += [
        f"{name} {machine[name]}"
        for name in ("driver", "cuda", "cudnn", "torch", "python")
        if name in machine
    ]
    lines = [
        f"# {'Simulated: ' if results.get('simulated') else ''}{', '.join(told) or 'an unknown machine'}"
    ]
    for name, record in sections.items():
        lines += ["", f"## {name} ({record['seconds']:.0f} s)", ""]
        if "error" in record:
            lines += [f"**Not all of it: {record['error']}.**", ""]
        found = record["found"]
        if name.startswith("rates"):
            lines += _rates(found)
        elif name in ("engine", "http", "diffusers", "compiled"):
            lines += _grouped(found)
        else:
            lines += _listed(found)
    return "\n".join(lines) + "\n"


def _rates(found: Mapping[str, Any]) -> list[str]:
    """Rows per second by batch size, and the share of matrix products in the same precision."""
    operations = found.get("operations", 0)
    rates: dict[tuple[str, str], dict[int, float]] = {}
    for path, value in found.items():
        if path.count("/") == 2:
            precision, way, rows = path.split("/")
            rates.setdefault((precision, way), {})[int(rows)] = value
    sizes = sorted({rows for row in rates.values() for rows in row})
    lines = [f"{operations / 1e9:.2f} GFLOP a row; rows/s (share of matrix products)", ""]
    lines += ["|precision|way|" + "|".join(map(str, sizes)) + "|", "|---|---" + "|--:" * len(sizes) + "|"]
    for (precision, way), row in rates.items():
        limit = found.get(f"{precision}/product")
        cells = [
            "" if rows not in row
            else f"{row[rows]:,.0f}" + (f" ({row[rows] * operations / limit:.0%})" if limit else "")
            for rows in sizes
        ]  # fmt: skip
        lines.append(f"|{precision}|{way}|" + "|".join(cells) + "|")
    lines.append("")
    for path, value in found.items():
        if path.endswith("/product"):
            lines.append(f"- matrix products, {path.removesuffix('/product')}: {value / 1e12:,.1f} TFLOP/s")
        elif path.endswith("/error"):
            lines.append(f"- {path.removesuffix('/error')} ended early: {value}")
    return lines


def _grouped(found: Mapping[str, Any]) -> list[str]:
    """One row for all but the last part of the name, one column for each last part."""
    cells: dict[str, dict[str, Any]] = {}
    for path, value in found.items():
        row, _, column = path.rpartition("/")
        cells.setdefault(row, {})[column] = value
    tables: dict[tuple[str, ...], list[str]] = {}
    for row, values in cells.items():
        tables.setdefault(tuple(values), []).append(row)
    lines = []
    for columns, rows in tables.items():
        lines += ["||" + "|".join(columns) + "|", "|---" + "|--:" * len(columns) + "|"]
        lines += [
            f"|{row}|" + "|".join(_cell(cells[row][column]) for column in columns) + "|" for row in rows
        ]
        lines.append("")
    return lines


def _listed(found: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: {_cell(value)}" for name, value in found.items() if name != "log"]


def _cell(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "**no**"
        case float():
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        case [[int(), float()], *_]:  # step times
            return ", ".join(f"{rows}: {1000 * seconds:.2f} ms" for rows, seconds in value)
        case _:
            return str(value)
