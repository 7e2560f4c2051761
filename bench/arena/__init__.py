"""Detectors of broken training runs, on real runs: who catches what breaks, and spares what does not."""
