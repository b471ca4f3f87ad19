"""What the server tells Prometheus, and the signals of security; docs/monitoring.md lists all of it."""
