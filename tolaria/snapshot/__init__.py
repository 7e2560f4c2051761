"""Snapshots: what is covered, the two slots that hold it, and how it is put back. Knows of no governor.

Read :mod:`~tolaria.snapshot.covered` first (which tensors there are, by which keys), then
:mod:`~tolaria.snapshot.slots` (where their copies lie) and :mod:`~tolaria.snapshot.host_state` (what a
capture keeps beside the tensors: rates, schedulers, extras, random generators).
"""
