"""What Prometheus, Grafana and the Ray dashboard see of a run."""
