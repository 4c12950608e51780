"""The snippets are for type checkers: they are not run."""

collect_ignore = ["right.py", "wrong.py"]
