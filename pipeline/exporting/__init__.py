"""A trained student in the formats of other programs, and the check that the file gives the student's outputs."""
