"""The service as replicas of one deployment, behind one address."""
