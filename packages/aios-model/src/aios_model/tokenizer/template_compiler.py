"""How chat templates are compiled: with calls that count steps and measure values (see `template_sandbox`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser


class MeteredCode(CodeGenerator):
    """Writes the calls that count steps and measure values into the compiled template."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        """The body of a loop, branch, macro or template."""
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """The `~` operator."""
        self.write("environment.concatenated((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        """`[a, b]`."""
        self._measure(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        """`{a: b}`."""
        self._measure(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        """`(a, b)`, unless it is what a loop or `set` assigns to."""
        if node.ctx == "load":
            self._measure(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _measure(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        # Literals and calls nest values deeper, and calls are measured too: nothing of exponential size can come to be.
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")


class GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant said, for training; here its contents are simply shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Called at the tag: its contents, in a scope of their own."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)
