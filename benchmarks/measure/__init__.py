"""What `speed.py` measures: one module for each idea.

Each has `options(parser)`, `measure(arguments, device)`, which yields lines of results, and
`table(lines)`, the part of docs/performance.md that shows them.
"""
