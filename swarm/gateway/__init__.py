"""The door: OpenAI's routes, a console and metrics over one swarm client. Needs the extra ``gateway``."""
