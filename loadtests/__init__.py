"""Load tests: bounded, on loopback, with processes that they start and end themselves."""
