"""tensornetwork: nodes that are split by SVD and contracted edge by edge, matrix by matrix.

Letters as in `torch_backend`. Nodes have no batch dimensions, so a batch is a loop. Every node names the torch backend
itself; the library's default backend is not touched.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import tensornetwork
import torch
from tensornetwork import Edge, Node
from torch import Tensor

from tnadapt.backends.contractions import contract_cp
from tnadapt.backends.torch_backend import TorchPrimitives

__all__ = ["TensorNetworkBackend"]


class TensorNetworkBackend(TorchPrimitives):
    """Splits and contracts nodes; CP stays torch's, because an index shared by all factors is no edge between two nodes
    (a copy node would hold it as a dense tensor of R^m entries)."""

    name = "tensornetwork"

    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        """By nodes, where every index but that of the batch is an edge between two tensors or an open one; else by torch."""
        terms, result = _edges(equation)
        if terms is None:
            return super().contract(equation, *tensors)
        results = []
        for one in _members(tensors):
            nodes = [_node(tensor) for tensor in one]
            ends: dict[str, list[Edge]] = {}
            for node, term in zip(nodes, terms, strict=True):
                for axis, index in enumerate(term):
                    ends.setdefault(index, []).append(node[axis])
            for edges in ends.values():
                if len(edges) == 2:
                    edges[0] ^ edges[1]
            contracted = tensornetwork.contractors.greedy(nodes, output_edge_order=[ends[index][0] for index in result])
            results.append(contracted.tensor)
        return torch.stack(results)

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

    def cp_contract(self, factors: Sequence[Tensor]) -> Tensor:
        return contract_cp(factors)[0]


def _edges(equation: str) -> tuple[list[str] | None, str]:
    """The terms and the result of an equation without the batch index; no terms where an index is no edge between nodes."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms, batch = inputs.split(","), result[:1]
    if not all(term[:1] == batch for term in terms) or len(terms) < 2:
        return None, result
    terms, result = [term[1:] for term in terms], result[1:]
    counts = Counter(itertools.chain(*terms))
    joins = all((count == 1) if index in result else (count == 2) for index, count in counts.items())
    loops = any(len(set(term)) < len(term) for term in terms)
    return (terms if joins and not loops and batch not in counts else None), result


def _node(tensor: Tensor) -> Node:
    return Node(tensor, backend="pytorch")


def _contract(nodes: Sequence[Node], open_edges: Sequence[Edge]) -> Tensor:
    """All nodes to one, with the library's greedy order; flat."""
    result: Tensor = tensornetwork.contractors.greedy(nodes, output_edge_order=open_edges).tensor
    return result.reshape(-1)


def _members(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
