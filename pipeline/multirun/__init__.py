"""Training of several runs in one process, for ``compare.py side=N``."""
