"""What ``swarm bench`` measures: ``transformers`` in a process of its own, generations on swarms, peak memory."""
