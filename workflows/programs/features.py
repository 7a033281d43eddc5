"""What the frozen parts of a model make of data, once and for all."""

from __future__ import annotations

from pipelines import features
from workflows.programs.job import data_program

PROGRAMS = {"features": data_program(features.FeaturesConfig, features)}
