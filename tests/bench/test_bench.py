"""The benchmark runs, and finds no fault: a smoke test, its figures mean nothing at this size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import unmeasured

from bench import compare, sizing, store

pytestmark = [pytest.mark.process, pytest.mark.redis]


@pytest.mark.quiet
def test_benchmark_compares_and_finds_no_fault(tmp_path: Path) -> None:
    """A tiny run prints every row with a figure for both proxies, and no byte was changed by either."""
    command = [sys.executable, compare.__file__, "--quick", "--seconds", "0.3", "--streams", "10"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "all.json")], env=unmeasured(), capture_output=True, text=True, timeout=60
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert done.stderr == ""
    for row in compare.ROWS:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(row.label)]
        ours, theirs, ratio = line.removeprefix(row.label).split()
        assert float(ours) >= 0
        assert float(theirs) >= 0
        assert ratio != ""
    assert "faults of chat-proxy: 0" in done.stdout
    results = json.loads((tmp_path / "all.json").read_text())
    assert [result["faults"] for target in results.values() for result in target.values()] == [{}] * 12


@pytest.mark.quiet
def test_benchmark_of_the_sizes_finds_no_fault() -> None:
    """A line for each step, with its cores and memory; on a machine so busy that the load lags behind, it says so."""
    command = [sys.executable, sizing.__file__, "--seconds", "0.3", "--streams", "10"]
    done = subprocess.run(command, env=unmeasured(), capture_output=True, text=True, timeout=60)
    print(done.stdout, done.stderr)
    assert done.stderr == ""
    header, *lines = done.stdout.partition("faults: ")[0].splitlines()
    assert header.split() == ["streams", "cores", "us", "per", "event", "MiB"]
    assert [line.split()[0] for line in lines] == ["1", "2", "5", "10"]
    assert all(float(line.split()[-1]) > 10 for line in lines)
    faults = done.stdout.partition("faults: ")[2].splitlines()[1:]
    assert all("could not keep its pace" in fault for fault in faults)
    assert done.returncode == bool(faults)


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ({"faults": {}}, []),
        ({"faults": {"bytes": 2}}, ["idle: 2 x bytes"]),
        ({"faults": {}, "left": 5, "never": 1}, ["idle: 1 of 5 calls were never closed"]),
    ],
)
def test_benchmark_names_faults(result: dict[str, object], found: list[str]) -> None:
    """Changed bytes, and calls that stayed open, are told by scenario and number."""
    assert compare.faults_of({"idle": result}) == found


@pytest.mark.quiet
def test_benchmark_of_the_store_counts_its_calls() -> None:
    """Three calls a request; on a machine so busy that the store is taken for gone, fewer, and it says so."""
    command = [sys.executable, store.__file__, "--seconds", "0.3", "--rounds", "1"]
    done = subprocess.run(command, env=unmeasured(), capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    faults = done.stdout.partition("faults: ")[2].split("\n  ")
    for label in store.ROWS:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(label)]
        assert float(line.split()[-2]) > 0 or (faults[1:] and "calls" in label)
    assert {fault.strip() for fault in faults[1:]} <= {"redis: 1 x the store was taken for gone"}
    assert done.returncode == (1 if faults[1:] else 0)
