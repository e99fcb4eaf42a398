"""Ways to harm the replicas of a teacher."""

from typing import Any

import ray


def actor_name(replica: str) -> str | None:
    """Ray's name of a replica by its own; None when it is gone."""
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors]
    return next((name for name in names if name.endswith(f"#{replica}")), None)


def is_actor(replica: str) -> bool:
    return actor_name(replica) is not None


def flip_bit_in_memory(replica: str) -> None:
    """Flips a bit of the parameters that a replica computes with."""

    def flip(actor: Any) -> None:
        import jax.numpy as jnp

        params = actor._replica_impl._user_callable_wrapper._callable._teacher._params
        bits = params["embedding"].view(jnp.uint32)
        params["embedding"] = bits.at[3, 3].set(bits[3, 3] ^ (1 << 20)).view(jnp.float32)

    name = actor_name(replica)
    assert name is not None
    ray.get(ray.get_actor(name, "serve").__ray_call__.remote(flip))
