"""What ``swarm`` can do, one command (or two that belong together) a module; ``swarm.cli`` puts them together."""
