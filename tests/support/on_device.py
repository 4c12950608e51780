"""The calls of `targets.py` with unconverted arguments and results, on any backend."""

from __future__ import annotations

from typing import Any

from tests.support.targets import _packed, arrays, initial_names, module_of


def forward(subject: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Call with x and the initial states."""
    return subject(inputs["x"], _packed(inputs, initial_names(inputs)), **options)


def backward(subject: Any, inputs: dict[str, Any]) -> Any:
    """Run backward of the last call with the upstream gradients."""
    names = [name for name in inputs if name.startswith("d") and name != "doutput"]
    output = [inputs["doutput"]] if "doutput" in inputs else []
    return subject.backward(*output, _packed(inputs, names))


def run(subject: Any, inputs: dict[str, Any], **options: Any) -> list[Any]:
    """All results and gradients of forward and backward; `grads` are zero before and after."""
    module = module_of(subject)
    module.zero_grad()
    results = arrays(forward(subject, inputs, **options)) + arrays(backward(subject, inputs))
    results += [grad.copy() for grad in module.grads.values()]
    module.zero_grad()
    return results
