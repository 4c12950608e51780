"""The calls of `targets.py` with arguments as they are given and results as they come back."""

from __future__ import annotations

from typing import Any

from tests.support.targets import _packed, arrays, initial_names, module_of


def forward(subject: Any, given: dict[str, Any], **options: Any) -> Any:
    """Call with x and the initial states."""
    return subject(given["x"], _packed(given, initial_names(given)), **options)


def backward(subject: Any, given: dict[str, Any]) -> Any:
    """Undo the last call with the upstream gradients."""
    names = [name for name in given if name.startswith("d") and name != "doutput"]
    output = [given["doutput"]] if "doutput" in given else []
    return subject.backward(*output, _packed(given, names))


def run(subject: Any, given: dict[str, Any], **options: Any) -> list[Any]:
    """Call and undo: every result and every gradient; `grads` are zero before and after."""
    module = module_of(subject)
    module.zero_grad()
    found = arrays(forward(subject, given, **options)) + arrays(backward(subject, given))
    found += [grad.copy() for grad in module.grads.values()]
    module.zero_grad()
    return found
