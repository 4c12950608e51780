"""Cells that are defined by their equations: `xprnn.cell`, and everything derived from it.

`tracing` calls a definition with the nodes of a `graph`; `gradient` expands it into the primitive
`operations` and differentiates them; `saving` chooses what the forward step saves, and `phases`
what one kernel computes. A `derived_step` is the result, which plain `xp` evaluates.
"""

from .definition import Definition, cell

__all__ = ["Definition", "cell"]
