"""The engine: load a slice of a checkpoint, run it, sample. Knows neither Ray nor gRPC."""
