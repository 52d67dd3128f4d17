"""What `experiments/real.py` and `experiments/zero_shot.py` have in common: flags, and how a command goes."""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.commands import GRACE, ROOT, OutOfTime, refuse_absent_gpu
from experiments.real_runs import Maker, read_raw, unpacked
from plumbing.machine import cpu


def arguments(doc: str, benchmark: str, stem: str, budgets: Iterable[str] = ()) -> argparse.Namespace:
    """The command line. benchmark: what --data-dir holds. stem: of the files in --results, and the folder of runs.
    budgets: names for --budget, if there are several. Exits with one sentence for flags that cannot be."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data-dir", default="", help=f"folder of {benchmark}")
    parser.add_argument("--backbone", default="", help="folder of a model, or a Hugging Face name")
    if budgets:
        parser.add_argument("--budget", choices=budgets, default="papers", help="how much is trained and scored")
    minutes = f"stop after so many, and at most {GRACE} s to save; the next call goes on"
    parser.add_argument("--minutes", type=float, default=math.inf, help=minutes)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, also on one GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="default: the experiment's own")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of raw numbers, page, figures")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / stem, help="folder of what is half done")
    parser.add_argument("--page", action="store_true", help="only write the page, from the values in the raw file")
    args = parser.parse_args()
    if not args.page and not (args.data_dir and args.backbone):
        parser.error("--data-dir and --backbone are needed, but for --page")
    if args.jobs < 1 or not args.minutes > 0 or any(seed < 0 for seed in args.seeds):
        parser.error("--jobs and --minutes must be above 0, --seeds not negative")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds names one twice")
    if args.data_dir and not Path(args.data_dir).is_dir():
        parser.error(f"--data-dir {args.data_dir} is no folder")
    for name in ("results",) if args.page else ("results", "runs"):
        try:
            getattr(args, name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--{name} {getattr(args, name)} cannot be made: {error.strerror}")
    return args


def device_of(args: argparse.Namespace) -> str:
    """--device, or cuda if there is one, else cpu."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def maker_of(args: argparse.Namespace, stem: str, setup: str) -> Maker:
    """What makes the values of a command until --minutes are over."""
    import torch

    device, until = device_of(args), time.monotonic() + 60 * args.minutes
    refuse_absent_gpu(device)
    on = torch.cuda.get_device_name() if device == "cuda" else f"cores of {cpu()}"
    where = {"--data-dir": os.path.relpath(args.data_dir, ROOT), "--backbone": unpacked(args.backbone)}
    return Maker(args.results / f"{stem}.jsonl", args.runs, setup, where, device, on, until)


def carry_out(args: argparse.Namespace, make: Callable[[], None], write: Callable[[Path], None], stem: str):
    """make() unless --page is given, then write(--results), whatever ended the making."""
    read_raw(args.results / f"{stem}.jsonl")  # a damaged line is said before anything is made
    try:
        if not args.page:
            make()
    except OutOfTime:
        print(f"{args.minutes:g} minutes are over: the same command goes on")
    finally:
        write(args.results)
    print(f"{args.results / stem}.md is written")
