"""What ends a training run before its last step."""


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what to change."""


class HostsLostError(TrainingError):
    """A weight host died; weights can be loaded again from the last checkpoint."""
