"""How busy each replica is, and what it will take to compute a prompt there."""
