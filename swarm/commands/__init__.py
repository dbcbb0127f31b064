"""What ``swarm`` can do, one command (or two that belong together) a module; ``app`` puts them together."""
