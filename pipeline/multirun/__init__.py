"""Training of several runs: side by side in one process, in processes of their own, or as trials of a search."""
