"""The governor in other people's trainers: one module for each, which imports its package; and sinks.

No package is imported here: ``from tolaria.integrations.lightning import TolariaCallback``.
"""

from tolaria.telemetry import CsvSink, JsonLinesSink, LoggingSink, TensorBoardSink, TrackioSink, WandbSink

__all__ = ["CsvSink", "JsonLinesSink", "LoggingSink", "TensorBoardSink", "TrackioSink", "WandbSink"]
