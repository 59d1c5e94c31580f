"""Run a recipe: base model + rows -> tuned adapter."""

import os

# Gaps between blocks of changing size would otherwise take up to half of what is allocated.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
