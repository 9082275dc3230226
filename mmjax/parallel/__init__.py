"""Layers spread over the mesh by hand, in `jax.shard_map`."""
