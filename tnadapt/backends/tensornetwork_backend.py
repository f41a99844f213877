"""tensornetwork: nodes that are split by SVD and contracted edge by edge, matrix by matrix.

Letters as in `torch_backend`. Nodes have no batch dimensions, so a batch is a loop. Every node names the torch backend
itself; the library's default backend is not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import tensornetwork
import torch
from tensornetwork import Edge, Node
from torch import Tensor

from tnadapt.backends.autograd_backend import AutogradBackend

__all__ = ["TensorNetworkBackend"]


class TensorNetworkBackend(AutogradBackend):
    """Splits and contracts nodes; CP stays torch's, because an index shared by all factors is no edge between two nodes
    (a copy node would hold it as a dense tensor of R^m entries)."""

    name = "tensornetwork"

    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """By node splitting; tensor-train and Tucker decompositions are made of these."""
        each = []
        for one in matrix:
            node = _node(one)
            left, values, right, _ = tensornetwork.split_node_full_svd(
                node, [node[0]], [node[1]], max_singular_values=rank
            )
            each.append((left.tensor, torch.diagonal(values.tensor), right.tensor))
        u, s, vh = (torch.stack(list(tensors)) for tensors in zip(*each, strict=True))
        return u, s, vh

    def chain_contract(self, cores: Sequence[Tensor]) -> Tensor:
        results = []
        for one in _members(cores):
            nodes = [_node(core) for core in one]
            for before, after in itertools.pairwise(nodes):
                before[2] ^ after[0]
            # the outer bonds have size 1 and stay open, so that no edge is left without an end
            results.append(_contract(nodes, [nodes[0][0], *(node[1] for node in nodes), nodes[-1][2]]))
        return torch.stack(results)

    def tucker_contract(self, factors: Sequence[Tensor], core: Tensor) -> Tensor:
        results = []
        for *one, core_tensor in _members([*factors, core]):
            nodes, centre = [_node(factor) for factor in one], _node(core_tensor)
            for k, node in enumerate(nodes):
                node[1] ^ centre[k]
            results.append(_contract([*nodes, centre], [node[0] for node in nodes]))
        return torch.stack(results)


def _node(tensor: Tensor) -> Node:
    return Node(tensor, backend="pytorch")


def _contract(nodes: Sequence[Node], open_edges: Sequence[Edge]) -> Tensor:
    """All nodes to one, with the library's greedy order; flat."""
    result: Tensor = tensornetwork.contractors.greedy(nodes, output_edge_order=open_edges).tensor
    return result.reshape(-1)


def _members(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
