"""Compiled kernels, and the choice of an implementation for each call."""

from .dispatch import (
    AUTOMATIC,
    MOST,
    UNTRIED,
    CallShape,
    ExecutionPlan,
    KernelUnavailableError,
    Plans,
    StepPlan,
    forget_plans,
    has_sequences,
    plan,
    plan_step,
    untried,
)
from .interface import CallContext, LayerRunner, Pass, Unsupported
from .request import (
    ENVIRONMENT_VARIABLE,
    IMPLEMENTATIONS,
    WAVE,
    asked,
    requested,
    use_kernels,
)

__all__ = [
    "AUTOMATIC",
    "ENVIRONMENT_VARIABLE",
    "IMPLEMENTATIONS",
    "MOST",
    "UNTRIED",
    "WAVE",
    "CallContext",
    "CallShape",
    "ExecutionPlan",
    "KernelUnavailableError",
    "LayerRunner",
    "Pass",
    "Plans",
    "StepPlan",
    "Unsupported",
    "asked",
    "forget_plans",
    "has_sequences",
    "plan",
    "plan_step",
    "requested",
    "untried",
    "use_kernels",
]
