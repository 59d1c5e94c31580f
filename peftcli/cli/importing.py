"""Import the large libraries without the garbage collector walking over them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Around `import` of what imports PyTorch and transformers.

    Some million objects are made, none of them garbage, and each collection meets all of them: a
    quarter of the start, and a second at the end of the process. What is there afterwards stays out
    of later collections too.
    """
    import logging

    gc.disable()
    # It complains on import about an optional kernel that is not needed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
