"""Policies pick replicas. Pure and synchronous; a plugin is a class behind the entry-point group `kvlane.policies`."""
