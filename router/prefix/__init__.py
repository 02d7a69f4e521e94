"""What replicas hold of a prompt: canonical bytes, chained hashes, and the index of who holds which."""
