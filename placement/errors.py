"""What can go wrong while planning."""


class PlacementError(Exception):
    """Root of the planning errors."""


class InfeasiblePlanError(PlacementError):
    """No plan satisfies the caps; the message states the shortfall and the knob."""


class NoDeviceError(PlacementError):
    """No device that is available now may run a slot; the message says what to do."""
