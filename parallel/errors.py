"""Errors of planning that name the numbers which do not fit."""


class PlanError(ValueError):
    """No plan exists for these lengths and limits, or a given plan breaks its own rules."""
