"""What runs kvlane on Kubernetes: manifests, images, and what checks them without a cluster."""
