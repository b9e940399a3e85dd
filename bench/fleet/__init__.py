"""Many replicas of the service under one virtual clock: routing, autoscaling, loss of replicas."""
