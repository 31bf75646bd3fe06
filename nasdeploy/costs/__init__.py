"""What an architecture costs: parameters, FLOPs, latency and file size."""
