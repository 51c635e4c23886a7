"""Registers the plain-torch functions for every device on which no compiled kernel serves."""

from deftx_kernels import _ops, reference

for _name in _ops.SCHEMAS:
    _ops.LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
