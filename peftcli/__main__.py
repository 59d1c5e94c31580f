"""`python -m peftcli` and the `peftcli` script: the way in, which imports nothing by itself."""

from __future__ import annotations

import gc


def main() -> None:
    """Run the program; Ctrl-C while it is still being imported ends it as at any other moment.

    A command that loads no model makes no garbage worth looking for, neither now nor at its end;
    the others switch the collector on when their libraries are there (peftcli/cli/importing.py).
    So this is the last that a process does.
    """
    try:
        gc.disable()
        from peftcli.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(75) from None  # ExitCode.INTERRUPTED, which is not imported yet
    try:
        run()
    finally:
        if not gc.isenabled():
            gc.freeze()  # else the interpreter looks through all that was imported as it ends


if __name__ == "__main__":
    main()
