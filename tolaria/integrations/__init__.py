"""The governor in other people's trainers: one module for each, which imports its package.

Nothing is imported here: ``from tolaria.integrations.lightning import TolariaCallback``.
"""
