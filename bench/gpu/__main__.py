"""Check and measure everything on a GPU in one go: `bench/gpu.sh`, which also brings the packages it needs.

Each section (`bench/gpu/sections.py`) runs in a process of its own, for a limited time. What it has found by
then is kept, and so is why it failed; the next one goes on. All of it is written to one JSON file after each
section, and as Markdown beside it. `--simulated` does a little of everything on the CPU, so that it is known
to work before there is a GPU to try it on. `--report FILE` writes the Markdown of such a file again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.gpu.report import markdown

ROOT = Path(__file__).parent.parent.parent
TOTAL_S = 525.0
"""Seconds for all sections."""
LEAST_S = 5.0
"""What is left must be more, or a section is not begun."""


def run_section(name: str, *, simulated: bool, notes: Path) -> None:
    """Run a section in this process; write its figures after each of them."""
    from bench.gpu.scale import REAL, SIMULATED  # with torch
    from bench.gpu.sections import SECTIONS

    if simulated:
        import torch

        torch.set_num_threads(1)  # for networks as small as these
    section, _ = SECTIONS[name]
    found: dict[str, Any] = {}
    for figure, value in section(SIMULATED if simulated else REAL):
        found[figure] = value
        part = notes.with_suffix(".part")
        part.write_text(json.dumps(found, default=str))
        part.replace(notes)


def section_apart(name: str, limit_s: float, *, simulated: bool) -> dict[str, Any]:
    """Run a section in a process; what it found, what it took, and its error if it had one."""
    with TemporaryDirectory() as folder:
        notes, log = Path(folder) / "notes.json", Path(folder) / "log"
        command = [sys.executable, "-m", "bench.gpu", "--section", name, "--notes", str(notes)]
        begun = time.monotonic()
        with log.open("w") as output:
            popen = subprocess.Popen(
                [*command, *(["--simulated"] if simulated else [])],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = popen.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):  # it, and what it has left running
                    os.killpg(popen.pid, signal.SIGKILL)
                popen.wait()
        record: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1)}
        if code is None:
            record["error"] = f"not done after {limit_s:.0f} s"
        elif code:
            record["error"] = f"it ended with {code}"
        if code != 0:
            record["log"] = log.read_text(errors="replace")[-4000:]
        record["found"] = json.loads(notes.read_text()) if notes.exists() else {}
        return record


def limits() -> dict[str, float]:
    """The seconds that each section may take; in a process of its own, since this one keeps off the GPU."""
    names = "{name: limit for name, (_, limit) in SECTIONS.items()}"
    code = f"import json; from bench.gpu.sections import SECTIONS; print(json.dumps({names}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the sections cannot be loaded:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def tell(text: str, begun: float) -> None:
    """A line with the time since the beginning."""
    print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections. Returns 0 if all of them ended well."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json")
    parser.add_argument("--only", help="sections, separated by semicolons")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds for all of it")
    parser.add_argument("--spent-s", type=float, default=0.0, help="seconds of it that are over already")
    parser.add_argument("--simulated", action="store_true", help="a little of everything, on the CPU")
    parser.add_argument("--report", type=Path, help="print the Markdown of such a JSON file instead")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.report is not None:
        print(markdown(json.loads(args.report.read_text())))
        return 0
    if args.section is not None:
        run_section(args.section, simulated=args.simulated, notes=args.notes)
        return 0
    begun = time.monotonic() - args.spent_s
    each = limits()
    chosen = [name.strip() for name in args.only.split(";")] if args.only else list(each)
    if unknown := set(chosen) - set(each):
        parser.error(f"no such section: {'; '.join(sorted(unknown))}. There are: {'; '.join(each)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"simulated": args.simulated, "sections": {}}
    for name in chosen:
        left = args.total_s - (time.monotonic() - begun)
        record: dict[str, Any] = {"seconds": 0.0, "error": "no time was left", "found": {}}
        if left > LEAST_S:
            tell(f"{name} …", begun)
            record = section_apart(name, min(each[name], left), simulated=args.simulated)
        results["sections"][name] = record
        tell(f"{name}: {record.get('error', 'done')}, {len(record['found'])} figures", begun)
        if "log" in record:
            print(record["log"][-1500:], flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    tell(f"written to {args.out} and {args.out.with_suffix('.md').name}", begun)
    return int(any("error" in record for record in results["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
