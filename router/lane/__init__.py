"""The lane: the one long-lived, two-way connection between one router process and one replica."""
