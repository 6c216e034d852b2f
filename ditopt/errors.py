"""Every error that ditopt raises on purpose; each message names the thing, the value and the way out."""

from __future__ import annotations


class DitoptError(Exception):
    """Base of all deliberate errors."""


class InputError(DitoptError, ValueError):
    """An argument, file or callable that the user handed in cannot be used."""


class TraceError(DitoptError):
    """The model was captured, but what a plan needs was not found in its graphs."""


class PlanError(InputError):
    """A plan file or object is malformed; says file, line and field where they are known."""


class PlanMismatchError(PlanError):
    """A valid plan that was made for something else: another model, schedule or sampler."""


class ProfileError(InputError):
    """A profile is damaged, malformed or of something else than another; says file and field where they are known."""


class AuditError(DitoptError):
    """A compiled graph does not contain what its plan decided."""


class StateError(DitoptError):
    """A state slot was read that is not there: not stored yet, or dropped. It is never read as zeros."""


class RolloutError(DitoptError):
    """A sampling loop did not behave: never called the model, is not deterministic, or gave NaN."""


class NonFiniteError(RolloutError):
    """A generation has NaN or infinite values."""
