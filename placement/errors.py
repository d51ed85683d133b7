"""What can go wrong while planning."""


class PlacementError(Exception):
    """Root of the planning errors."""


class InfeasiblePlanError(PlacementError):
    """No plan satisfies the caps; the message states the shortfall and the knob."""
