"""Errors as one sentence and an exit code, and what signals do to a script outside its training loop."""

import contextlib
import functools
import os
import signal
import sys


class UserError(Exception):
    """Something that the user can fix: one sentence that names the flag, file and line, or layer, and what to do."""


class RunError(Exception):
    """A run that failed although its settings are right: one sentence that says what happened and what to try."""


def exit_on_user_error(main, *args):
    """Run a script's main function; turn its failure into one line on standard error and an exit code.

    2 for what the user can fix (UserError), 1 for a failed run (RunError, or the disk), 143 for SIGTERM, 129 for SIGHUP
    (unless it is ignored, as under nohup). After Ctrl-C the script dies by that signal, which shells show as 130: they
    end a loop of commands only then.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for number in hang_ups():
        signal.signal(number, _hang_up)
    try:
        if signal.getsignal(signal.SIGINT) is _exit_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main(*args)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 128 + signal.SIGINT:
            raise
        if getattr(main, "__module__", "") == "__main__":  # not where another program calls a script's function
            die_of_ctrl_c()
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error} (what was saved before is whole)", 1)


def die_of_ctrl_c():
    """End the process by SIGINT itself, so that its shell knows; where there are no such signals, do nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _fail(text: str, code: int):
    """Exit with one line, even if a file name in it contains line breaks."""
    print(f"error: {' '.join(text.splitlines())}", file=sys.stderr)
    sys.exit(code)


def exit_quietly_on_signals():
    """Until `exit_on_user_error` takes over: a signal ends the process at once, without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM, *hang_ups()):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell ignores Ctrl-C for its background jobs
            signal.signal(number, _exit_at_once)


def _exit_at_once(number: int, frame):
    """Exit without an exception: the imports in progress would swallow it or wrap it."""
    if number == signal.SIGINT:
        die_of_ctrl_c()
    os._exit(128 + number)


def hang_ups() -> list[int]:
    """SIGHUP, sent when the terminal is closed; [] if it is ignored (nohup) or does not exist (Windows)."""
    number = getattr(signal, "SIGHUP", None)
    return [number] if number and signal.getsignal(number) != signal.SIG_IGN else []


def _hang_up(*_):
    tell("\nthe terminal was closed")
    sys.exit(129)


def tell(text: str):
    """Print a line. If standard output is gone, send this and all later output to the null device."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = sys.stderr = open(os.devnull, "w")


@functools.cache
def say_once(text: str):
    """Print a line once per process: a benchmark is read again for each split, and lacks the same files each time."""
    print(text)
