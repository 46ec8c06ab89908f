"""The submission: check, grader, bench, archive."""
