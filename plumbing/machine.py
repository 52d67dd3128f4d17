"""What made a run, and what it took: commit, command line, versions, machine; the peak of its memory.

provenance.json of a run folder has an entry for each start of the run, the resumed ones included.
"""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from plumbing import processes
from plumbing.folders import read_json, write_json
from plumbing.tables import counted

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy")


def commit() -> str:
    """The commit of this tree, with -dirty if a tracked file outside results/ was changed since; or "unknown"."""

    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return (git("describe", "--always", "--exclude", "*") or "unknown") + ("-dirty" if changed else "")
    except OSError:
        return "unknown"


def record_start(folder: Path):
    """Add this start to a run folder's provenance.json. Raises UserError if that file is damaged."""
    path = folder / "provenance.json"
    before = read_json(path, starts=list)["starts"] if path.exists() else []
    write_json(path, {"starts": [*before, provenance()]})


def provenance() -> dict:
    """Where a run comes from: date, commit, command line, versions, kind of machine."""
    import torch

    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"), "commit": commit(),
        "command": shlex.join(["python", *sys.argv]), "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version_of(name))},
        "system": f"{platform.system()} {platform.machine()}", "cpu": cpu(), "cores": os.cpu_count(), "gpus": gpus,
        "processes": processes.count(),
    }  # fmt: skip


def version_of(package: str) -> str:
    """The version of an installed package, "" if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cpu() -> str:
    """The model of the processor, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def fast_in_bf16(device: str) -> bool:
    """Whether bfloat16 is no slower than float32 there: on a GPU of NVIDIA's, and on a CPU that multiplies it (AMX)."""
    import torch

    return device == "cuda" or device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def peak_memory() -> float:
    """The most memory that this process has held, in GB: torch's on a GPU that was used, else the whole process's."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


def report_dry_run(seconds: float, steps: int, compiling: float = 0.0) -> dict:
    """Say what a step took, and what all will take; returns {"seconds_per_step", "peak_memory_gb"}.

    compiling: the seconds by which --compile made the first step longer, in neither of the two.
    """
    whole, memory = timedelta(seconds=round(seconds * steps)), peak_memory()
    print(f"dry run: {seconds:.3g} s a step, {counted(steps, 'step')} would take {whole}; memory {memory:.2f} GB")
    if compiling:
        print(f"         without the {compiling:.0f} s that compiling took, in the first step")
    return {"seconds_per_step": seconds, "peak_memory_gb": memory}
