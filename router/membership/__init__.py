"""Who the replicas are: from Ray, or from the configuration."""
