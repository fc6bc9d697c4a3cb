"""A fleet: pools of equal replicas behind one router.

What is deployed is a list of pools, each a replica spec and a count; pools of unlike replicas share the load.

    fleet = Fleet((Pool(deploy("meta-llama/Meta-Llama-3-8B", "h100"), 4),), router="least_outstanding_requests")
    run = simulate(workload, fleet.deployments, router=fleet.router)
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.cluster import Deployment


@dataclass(frozen=True, eq=False)
class Pool:
    """`count` replicas of one kind."""

    deployment: Deployment
    count: int


@dataclass(frozen=True, eq=False)
class Fleet:
    """Pools behind a router."""

    pools: tuple[Pool, ...]
    router: str = "round_robin"

    @property
    def deployments(self) -> list[Deployment]:
        """One entry for each replica, pool after pool, as `simulator.cluster.simulate` takes them."""
        return [pool.deployment for pool in self.pools for _ in range(pool.count)]

    @property
    def replicas(self) -> int:
        return sum(pool.count for pool in self.pools)
