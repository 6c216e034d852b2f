"""ditopt: a loop optimiser for diffusion transformers.

Names are loaded when they are first used: ``import ditopt`` starts no compiler and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditopt.api import apply, optimize, profile_model
    from ditopt.errors import (
        AuditError,
        DitoptError,
        InputError,
        PlanError,
        PlanMismatchError,
        RolloutError,
        StateError,
        TraceError,
    )
    from ditopt.plan import Plan
    from ditopt.profile import Profile
    from ditopt.runtime.streams import Generation

__version__ = "0.1.0"

__all__ = [
    "AuditError",
    "DitoptError",
    "Generation",
    "InputError",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "Profile",
    "RolloutError",
    "StateError",
    "TraceError",
    "__version__",
    "apply",
    "optimize",
    "profile_model",
]

_HOMES = {
    **dict.fromkeys(("apply", "optimize", "profile_model"), "ditopt.api"),
    "Generation": "ditopt.runtime.streams",
    "Plan": "ditopt.plan",
    "Profile": "ditopt.profile",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'ditopt' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value: object = getattr(importlib.import_module(_HOMES.get(name, "ditopt.errors")), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
