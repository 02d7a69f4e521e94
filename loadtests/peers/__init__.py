"""Routers side by side: the same load on the same simulated replicas, in one run, in turns."""
