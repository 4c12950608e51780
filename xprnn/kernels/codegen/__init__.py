"""Code that is generated from the programs of definitions: `cells/definition/program.py`."""
