"""`python -m peftcli` and the `peftcli` script: the way in, which imports nothing by itself."""

from __future__ import annotations


def main() -> None:
    """Run the program; Ctrl-C while it is still being imported ends it as at any other moment."""
    try:
        from peftcli.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(75) from None  # ExitCode.INTERRUPTED, which is not imported yet
    run()


if __name__ == "__main__":
    main()
