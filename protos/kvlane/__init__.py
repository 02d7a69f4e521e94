"""Clients and wire types of kvlane, an LLM request router."""
