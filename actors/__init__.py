"""Thin Ray actors: a clock, sockets and delegation to the engine."""
