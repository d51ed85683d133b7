"""The front door: gRPC and OpenAI-compatible HTTP over the same dispatcher."""
