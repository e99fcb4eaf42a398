"""How Ray Serve chooses the replica of a request: by our own knowledge of load and speed.

Serve makes the router in the process that asks, which is how `workers.serve_teacher` learns the
replica that a request went to before any answer has come. It makes it from a copy of this module,
so what is shared with the rest of the process lies in `workers.replica_loads`.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from workers.replica_loads import Route, knowledge


class TeacherRouter(RequestRouter):
    """Sends a request to the replica that will be done with it first."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        # Otherwise Serve would try again at once, and for ever.
        pending_request.routing_context.should_backoff = True
        known = knowledge(self.app_name)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known.replicas = frozenset(by_name)
        route: Route = pending_request.kwargs["route"]
        # A replica chosen before did not even say how long its queue is.
        chosen = known.loads.pick(
            by_name, route.num_rows, route.exclude.union(route.tried[-len(by_name) + 1 :])
        )
        route.tried.append(chosen)
        return [[by_name[chosen]]]
