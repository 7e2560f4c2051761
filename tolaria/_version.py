"""The version: here alone; the metadata of a distribution takes it from here."""

VERSION = "0.1.0"
