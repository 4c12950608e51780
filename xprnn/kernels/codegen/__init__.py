"""Code that is made from the programs of definitions: `cells/definition/step_program.py`."""
