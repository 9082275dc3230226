"""What a job needs and costs before a chip is rented: counted anywhere, compiled ahead for TPUs."""

from mmjax.plan.chips import CHIPS, Chip, PlanError, Topology, parse_topology
from mmjax.plan.estimate import Estimate, best_meshes, estimate
from mmjax.plan.job import Job, Request, read_request

__all__ = [
    "CHIPS",
    "Chip",
    "Estimate",
    "Job",
    "PlanError",
    "Request",
    "Topology",
    "best_meshes",
    "estimate",
    "parse_topology",
    "read_request",
]
