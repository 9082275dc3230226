"""Work that the devices of a mesh share by explicit collectives, inside `jax.shard_map`."""
