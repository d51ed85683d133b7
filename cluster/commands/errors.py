"""Conditions that a command reports with an exit status of their own."""

from __future__ import annotations


class UnauthorizedError(RuntimeError):
    """The deployment refused the token."""


class NotReadyError(RuntimeError):
    """The deployment answers but does not serve yet, or can take no more now."""


class ChecksFailedError(RuntimeError):
    """`motley doctor` found something that will not work."""


class RefusedError(RuntimeError):
    """The deployment cannot serve the request as asked."""
