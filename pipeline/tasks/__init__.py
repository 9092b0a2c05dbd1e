"""Tasks, one file each: what a student's outputs are measured against."""
