"""Write the files in `parent/`: pickles and safetensors files, with their values.

They were written once, by commit 8003e28, and are not to be written again::

    git worktree add ../parent 8003e28
    XPRNN_KERNELS=reference PYTHONPATH=../parent python tests/support/write_parent_files.py
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import parent_objects as objects

FOLDER = Path(__file__).parents[1] / "data" / "parent"
PROTOCOLS = (0, 2, 5)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    things = objects.pickled()
    for protocol in PROTOCOLS:
        (FOLDER / f"protocol_{protocol}.pickle").write_bytes(pickle.dumps(things, protocol))
    for name, module in things["modules"].items():
        module.save(FOLDER / f"{name}.safetensors")
    for name, optimizer in things["optimizers"].items():
        optimizer.save(FOLDER / f"{name}.safetensors")
    things["schedules"]["adam"].save(FOLDER / "schedule.safetensors")

    facts = {name: facts_of(module) for name, module in things["modules"].items()}
    values = {}
    for name, module in things["modules"].items():
        for what, mapping in (("parameter", module.parameters), ("gradient", module.grads)):
            values |= {f"{what}/{name}/{n}": np.array(array) for n, array in mapping.items()}
    for kind, show in objects.SHOWN.items():
        for name, thing in things[kind].items():
            values |= {f"{kind}/{name}/{n}": array for n, array in show(thing).items()}
    for name, schedule in things["schedules"].items():
        schedule.step()
        facts[f"lr after the next step of {name}"] = schedule.optimizer.lr
    (FOLDER / "facts.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(FOLDER / "values.npz", **values)


def facts_of(module: Any) -> dict[str, Any]:
    """The properties of a module other than its arrays."""
    return {
        "kind": type(module).__name__,
        "options": dict(module.options),
        "repr": repr(module),
        "frozen": sorted(module.frozen),
        "note": module.note,
    }


if __name__ == "__main__":
    main()
