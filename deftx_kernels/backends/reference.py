"""Registers the plain-torch functions for every device on which no compiled kernel serves."""

from deftx_kernels import _op_checks, _ops, reference

for _name in _ops.SCHEMAS:
    _function = _op_checks.checked(_name, getattr(reference, _name), reads_contents=True)
    _ops.LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
