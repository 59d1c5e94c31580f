"""The process that prepares rows for another: `python -m peftcli.preparing.process FOLDER`.

The one that asks has torch, threads and perhaps a GPU in use, none of which survives a fork.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

from peftcli.errors import PeftcliError
from peftcli.preparing.pool import prepare_rows
from peftcli.preparing.work import Plan


def main(folder: Path) -> None:
    """Run the plan in `folder`; progress goes to stdout as JSON lines, the result to a file."""
    plan: Plan = pickle.loads((folder / "plan").read_bytes())
    try:
        result: object = prepare_rows(plan, folder, _tell)
    except PeftcliError as error:
        result = (type(error), error.message, error.hint)
    except BrokenPipeError:
        sys.exit(1)  # the program that asked is gone
    except OSError as error:
        result = (OSError, error.errno, error.strerror)
    (folder / "result").write_bytes(pickle.dumps(result))


def _tell(share: float, rows: int) -> None:
    print(json.dumps([share, rows]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
