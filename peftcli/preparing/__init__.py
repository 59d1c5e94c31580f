"""From files to token ids on disk: planned here, done by processes that hold no torch."""
