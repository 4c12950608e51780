"""Where pickles name the stepper."""

from .nn.stepper import Stepper, _rebuilt  # noqa: F401
