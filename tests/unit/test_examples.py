"""The examples in methods of classes that are imported from another module than defines them.

pytest runs the example of such a class, but not those of its methods.
"""

import doctest
import inspect

import pytest

import xprnn
import xprnn.stepper
from xprnn import optim

CLASSES = [
    value
    for module in (xprnn, xprnn.stepper, optim)
    for value in vars(module).values()
    if inspect.isclass(value) and value.__module__ == module.__name__
]
EXAMPLES = {
    f"{kind.__module__}.{kind.__name__}.{name}": value.__doc__
    for kind in CLASSES
    for name, value in vars(kind).items()
    if name != "__doc__" and ">>>" in (getattr(value, "__doc__", None) or "")
}


def failures(name: str, text: str) -> str:
    """What is reported of the examples in a docstring, "" if all results are as it says."""
    report: list[str] = []
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", EXAMPLES)
def test_results_are_as_the_example_says(name: str) -> None:
    assert failures(name, EXAMPLES[name]) == ""


def test_a_wrong_result_is_detected() -> None:
    name = "xprnn.Linear.__call__"
    assert "[[33.0]]" in EXAMPLES[name]
    report = failures(name, EXAMPLES[name].replace("[[33.0]]", "[[34.0]]"))
    assert "Expected:\n    [[34.0]]\nGot:\n    [[33.0]]" in report
