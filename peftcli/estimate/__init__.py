"""Whether a run fits a GPU, how long it takes and what it costs, before anything is downloaded."""
