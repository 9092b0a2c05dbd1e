import os

# DDP would warn on every rank that it looks for unused parameters, as launch.py has it do. Errors are still told.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
