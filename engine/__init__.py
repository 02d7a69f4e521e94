"""The engine side: vLLM or a simulated engine behind a lane server, as a Ray Serve deployment."""
