"""`python -m peftcli` is the same program as the `peftcli` script."""

from peftcli.cli import main

if __name__ == "__main__":
    main()
