"""What a compiled program does, read before it runs."""

from clip_jax.planning.hlo import COLLECTIVES, Collective, Program

__all__ = ["COLLECTIVES", "Collective", "Program"]
