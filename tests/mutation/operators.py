"""What is changed in a module to see whether the tests notice: cosmic-ray's operators, and three of our own."""

from __future__ import annotations

import ast
import difflib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

#: negation and boundary of each comparison, one other operator for each sum or product
SWAPS = {
    "Comparison": "Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is",
    "Binary": "Add_Sub Sub_Add Mul_FloorDiv Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd",
}
CORE = [
    *(f"Replace{kind}Operator_{swap}" for kind, swaps in SWAPS.items() for swap in swaps.split()),
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ExceptionReplacer",
    "ZeroIterationForLoop",
    "NumberReplacer",
    "RemoveDecorator",
]


class Rewrite(Operator):  # type: ignore[misc]
    """An operator that replaces a child of a node by source text."""

    def places(self, node: Any) -> Iterator[tuple[int, str]]:
        """Index of each child to replace, and the new text."""
        raise NotImplementedError

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        for k, _ in self.places(node):
            yield node.children[k].start_pos, node.children[k].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        k, text = list(self.places(node))[index]
        node.children[k] = parso.parse(node.children[k].get_first_leaf().prefix + text)  # type: ignore[no-untyped-call]
        return node

    @classmethod
    def examples(cls) -> Sequence[Any]:
        return ()


class NegateCondition(Rewrite):
    """`if a or b` -> `if not (a or b)`. Lone comparisons are negated by replacing their operator."""

    def places(self, node: Any) -> Iterator[tuple[int, str]]:
        if getattr(node, "type", "") in ("if_stmt", "while_stmt", "test", "comp_if"):
            for k, child in enumerate(node.children[1:], 1):
                after = getattr(node.children[k - 1], "value", "") in ("if", "elif", "while")
                if after and child.type not in ("comparison", "not_test"):
                    yield k, f"not ({child.get_code(include_prefix=False)})"


class NegateMembership(Rewrite):
    """`in` <-> `not in`."""

    def places(self, node: Any) -> Iterator[tuple[int, str]]:
        if getattr(node, "type", "") == "comparison":
            for k, child in enumerate(node.children):
                text = " ".join(child.get_code(include_prefix=False).split()) if k % 2 else ""
                if text in ("in", "not in"):
                    yield k, "not in" if text == "in" else "in"


class RemoveStatement(Rewrite):
    """A call for its effect, an assignment into an object, an update or a `raise` -> `pass`."""

    def places(self, node: Any) -> Iterator[tuple[int, str]]:
        if getattr(node, "type", "") == "simple_stmt":
            made = node.children[0]
            if made.type == "expr_stmt":
                target, sign = made.children[0].get_code(), made.children[1].get_code().strip()
                removed = "." in target or "[" in target or sign in ("+=", "-=", "*=", "//=")
            else:
                removed = made.type in ("atom_expr", "raise_stmt")
            if removed:
                yield 0, "pass"


OPERATORS: dict[str, Operator] = {
    **{name: get_operator(f"core/{name}")() for name in CORE},
    **{made.__name__: made() for made in (NegateCondition, NegateMembership, RemoveStatement)},
}


@dataclass(frozen=True)
class Mutant:
    """One change: the lines before and after it, and the module's source with it."""

    operator: str
    line: int
    before: str
    after: str
    source: str


def excluded(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Stretches that are not mutated: annotations, what an error or a warning says, `strict=` of zip, `@abstractmethod`, and
    what only a type checker runs."""
    nodes: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.AnnAssign, ast.arg)) and node.annotation is not None:
            nodes.append(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            nodes.append(node.returns)
        if isinstance(node, ast.FunctionDef):
            nodes += [one for one in node.decorator_list if ast.unparse(one) == "abstractmethod"]
        if isinstance(node, ast.Raise) and node.exc is not None:
            nodes.append(node.exc)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes.append(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            nodes.append(node.args[0])
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            nodes.append(node.value)
    # a decorator starts at its sign, which is not part of the expression
    return [((n.lineno, max(0, n.col_offset - 1)), (n.end_lineno, n.end_col_offset)) for n in nodes]  # type: ignore[attr-defined]


def mutants(source: str) -> list[Mutant]:
    """Every change of every operator that compiles to something else, without those that are the same."""
    tree, outside, seen = get_ast(source), excluded(source), {ast.dump(ast.parse(source))}
    found: list[Mutant] = []
    kept = pickle.dumps(
        tree
    )  # a change is made in the tree itself, and to load one takes less time than to parse it again
    for name, operator in OPERATORS.items():
        positions = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, position in enumerate(positions):
            if any(start <= position < end for start, end in outside):
                continue
            changed = MutationVisitor(occurrence, operator).walk(pickle.loads(kept)).get_code()
            try:
                meaning = ast.dump(ast.parse(changed))
            except SyntaxError:
                continue
            if meaning not in seen:
                seen.add(meaning)
                found.append(described(name, position[0], source, changed))
    return sorted(found, key=lambda mutant: mutant.line)


def described(name: str, line: int, source: str, changed: str) -> Mutant:
    old, new = source.splitlines(), changed.splitlines()
    sides: tuple[list[str], list[str]] = ([], [])
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            sides[0].extend(text.strip() for text in old[a:b])
            sides[1].extend(text.strip() for text in new[c:d])
    before, after = (" ".join(" ".join(side).split()) for side in sides)
    return Mutant(name, line, before, after, changed)
