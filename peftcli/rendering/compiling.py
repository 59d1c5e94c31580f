"""What Jinja makes of a template: `{% generation %}`, and code whose joins and cuts are counted."""

from __future__ import annotations

from jinja2 import nodes  # noqa: TID253 - this file is heavy
from jinja2.compiler import CodeGenerator, Frame  # noqa: TID253
from jinja2.ext import Extension  # noqa: TID253
from jinja2.parser import Parser  # noqa: TID253
from jinja2.runtime import Macro  # noqa: TID253

from peftcli.rendering.marks import CLOSE, OPEN


class Generation(Extension):
    """`{% generation %}`: its text is put between OPEN and CLOSE, so that its place is known."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("mark"), [], [], body)
        return block.set_lineno(line)

    def mark(self, caller: Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class CountingGenerator(CodeGenerator):
    """Python code in which joining and cutting texts can be counted."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.part(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
            self.write(", ")
        self.write("))")
