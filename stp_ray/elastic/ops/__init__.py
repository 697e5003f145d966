"""One rule per operation: how axes pass through it, what it needs to run sliced, what it costs.

A rule is a function from a `Visit` (one node of the traced graph) to the dimensions of the
node's output. On the way it unifies dimensions that must agree and writes into the node's
`Step` which parameters have which dimensions, which attributes or arguments hold sizes, and
how many multiply-accumulates it makes. The same step then runs a subnet as views, extracts it
as copies and prices it as integers. An operation without a rule freezes whatever reaches it.
"""

from .table import module_rule, rule_for
from .visit import Shape, Size, Step, Value, Visit, constants, tensors, tensors_in, unknown

__all__ = [
    "Shape",
    "Size",
    "Step",
    "Value",
    "Visit",
    "constants",
    "module_rule",
    "rule_for",
    "tensors",
    "tensors_in",
    "unknown",
]
