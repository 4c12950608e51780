"""Compiled kernels, and the choice of an implementation for each call."""

from .dispatch import (
    AUTOMATIC,
    EXPERIMENTAL,
    MAX_PLANS,
    CallShape,
    KernelUnavailableError,
    Plans,
    forget_plans,
    has_sequence_kernels,
    is_experimental,
    plan,
    plan_step,
)
from .interface import (
    CallContext,
    ExecutionPlan,
    LayerRunner,
    Pass,
    StepPlan,
    Unsupported,
    WavefrontRunner,
)
from .request import (
    ENVIRONMENT_VARIABLE,
    IMPLEMENTATIONS,
    WAVE,
    requested,
    requested_name,
    use_kernels,
)

__all__ = [
    "AUTOMATIC",
    "ENVIRONMENT_VARIABLE",
    "EXPERIMENTAL",
    "IMPLEMENTATIONS",
    "MAX_PLANS",
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
    "WavefrontRunner",
    "forget_plans",
    "has_sequence_kernels",
    "is_experimental",
    "plan",
    "plan_step",
    "requested",
    "requested_name",
    "use_kernels",
]
