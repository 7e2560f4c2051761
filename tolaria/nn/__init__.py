"""Hosts, seed slots, seed blueprints and alpha schedules."""

from tolaria.nn.graft import graft
from tolaria.nn.host import CNNHost, TransformerHost, create_host, list_hosts, register_host
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.schedule import AlphaSchedule, ScheduleKind
from tolaria.nn.seeds import Blueprint, get_blueprint, list_blueprints, register_blueprint
from tolaria.nn.slot import SeedSlot
from tolaria.nn.stage import IllegalTransitionError, SeedStage

__all__ = [
    "AlphaSchedule",
    "Blueprint",
    "CNNHost",
    "IllegalTransitionError",
    "MorphogeneticModel",
    "ScheduleKind",
    "SeedSlot",
    "SeedStage",
    "TransformerHost",
    "create_host",
    "get_blueprint",
    "graft",
    "list_blueprints",
    "list_hosts",
    "register_blueprint",
    "register_host",
]
